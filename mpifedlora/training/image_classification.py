"""Classification of images: bytes become the model's numbers batch by batch, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpifedlora.core.seeding import torch_seed
from mpifedlora.errors import AdapterError
from mpifedlora.training.base import BaseModel, build_base
from mpifedlora.training.labels import LabelTask
from mpifedlora.training.task import Batch, Columns, EncodedExamples, Indices, TaskSetup

HALF = 0.5
"""Mean and deviation of the channels where the model does not name its own: numbers from -1 to 1."""


class ImageTask(LabelTask):
    """Cross-entropy on one label an image.

    Args:
        size: height and width that the model takes; images of another size are scaled.
        num_channels: that the model takes; grey images serve as all of them.
        mean: of each channel, on the scale 0 to 1.
        std: of each channel.
        device: where batches go.
    """

    def __init__(
        self,
        size: tuple[int, int],
        num_channels: int,
        mean: Sequence[float] = (HALF,),
        std: Sequence[float] = (HALF,),
        device: str = "cpu",
    ) -> None:
        self.size, self.num_channels = size, num_channels
        self.device = torch.device(device)
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)
            for values in (mean, std)
        )

    def encode(self, columns: Columns, labels: Indices) -> EncodedExamples:
        """Keep images as they are: (num_examples, height, width, channels) uint8, in memory or mapped."""
        return EncodedExamples.without_tokens({"pixels": columns["image"], "labels": labels})

    def collate(self, examples: EncodedExamples, indices: Indices, *, is_training: bool = False) -> Batch:
        """Make some images into what the model takes.

        Returns:
            `pixel_values` (examples, channels, height, width) float32, and labels.
        """
        pixels = torch.from_numpy(examples.columns["pixels"][indices]).to(self.device, non_blocking=True)
        labels = torch.from_numpy(examples.labels[indices]).to(self.device, non_blocking=True)
        return {"pixel_values": self._normalised(pixels.permute(0, 3, 1, 2))}, labels

    def processor(self) -> dict[str, Any]:
        """Return the same for transformers, as the settings of an image processor."""
        height, width = self.size
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": self.num_channels == 3,
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean.flatten().expand(self.num_channels).tolist(),
            "image_std": self.std.flatten().expand(self.num_channels).tolist(),
        }

    def _normalised(self, pixels: Tensor) -> Tensor:
        values = pixels.float() / 255
        if values.shape[2:] != self.size:
            values = functional.interpolate(values, self.size, mode="bilinear", antialias=True)
        if values.shape[1] == 1:
            values = values.expand(-1, self.num_channels, -1, -1)
        elif self.num_channels == 1:
            values = values.mean(dim=1, keepdim=True)
        return (values - self.mean) / self.std


def image_classification(setup: TaskSetup) -> tuple[BaseModel, ImageTask]:
    """Build a vision model with a linear head, and the classification of images.

    Raises:
        AdapterError: if the model takes no images, or a head is asked for that is for texts.
    """
    if setup.head == "mean_pooling":
        raise AdapterError(
            'model.head must be "auto" or "stock" under task.name = "image-classification", got '
            '"mean_pooling", which is for texts; leave it out'
        )
    base = build_base(
        setup.model,
        num_labels=len(setup.label_names),
        head="image",
        dtype=setup.dtype,
        dropout=setup.dropout,
        seed=torch_seed(setup.seed, "head"),
    )
    config: Any = base.module.config
    mean, std = _normalisation(setup.model)
    side = config.image_size
    size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    return base, ImageTask(size, config.num_channels, mean, std, setup.device)


def _normalisation(model: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and deviation of the channels, as the model's preprocessor_config.json has them."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        options, _ = ImageProcessingMixin.get_image_processor_dict(model)
    except OSError:  # none, as in a folder of one's own
        return (HALF,), (HALF,)
    return options.get("image_mean") or (HALF,), options.get("image_std") or (HALF,)
