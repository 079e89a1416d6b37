import json
import shutil

import numpy as np
import pytest
import support
import torch
from torch.nn import functional

from mpifedlora.errors import AdapterError
from mpifedlora.training.base import BaseModel
from mpifedlora.training.image_classification import ImageTask, image_classification
from mpifedlora.training.task import TaskSetup


def encoded(task, num_channels=1, side=6):
    shape = (5, side, side, num_channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels.flags.writeable = False  # as those that are mapped from a file
    return pixels, task.encode({"image": pixels}, np.arange(5))


def test_images_stay_bytes_until_they_are_a_batch():
    task = ImageTask((6, 6), 1)
    pixels, examples = encoded(task)
    assert examples.columns["pixels"] is pixels
    inputs, labels = task.collate(examples, np.array([3, 1]))
    assert inputs.keys() == {"pixel_values"}
    assert inputs["pixel_values"].dtype == torch.float32
    wanted = torch.from_numpy(pixels[[3, 1]]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(inputs["pixel_values"], (wanted - 0.5) / 0.5)
    assert labels.tolist() == [3, 1]


def test_clients_share_no_more_than_their_images():
    task = ImageTask((6, 6), 1)
    pixels, examples = encoded(task)
    own = examples.take(np.array([4, 2]))
    assert np.array_equal(own.columns["pixels"], pixels[[4, 2]])
    assert torch.equal(
        task.collate(own, np.array([1]))[0]["pixel_values"],
        task.collate(examples, np.array([2]))[0]["pixel_values"],
    )


def test_grey_images_serve_as_all_channels_and_colours_are_averaged_for_one():
    grey, colour = ImageTask((6, 6), 3, [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]), ImageTask((6, 6), 1, [0.0], [1.0])
    pixels, examples = encoded(grey)
    values = grey.collate(examples, np.arange(5))[0]["pixel_values"]
    for channel, (mean, std) in enumerate([(0.1, 1.0), (0.2, 2.0), (0.3, 4.0)]):
        wanted = (torch.from_numpy(pixels[..., 0].copy()) / 255 - mean) / std
        torch.testing.assert_close(values[:, channel], wanted)
    pixels, examples = encoded(colour, num_channels=3)
    values = colour.collate(examples, np.arange(5))[0]["pixel_values"]
    torch.testing.assert_close(values[:, 0], torch.from_numpy(pixels.copy()).float().mean(dim=3) / 255)


def test_images_are_scaled_to_what_the_model_takes():
    task = ImageTask((12, 9), 1, [0.0], [1.0])
    pixels, examples = encoded(task)
    values = task.collate(examples, np.arange(5))[0]["pixel_values"]
    source = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
    wanted = functional.interpolate(source, (12, 9), mode="bilinear", antialias=True)
    torch.testing.assert_close(values, wanted)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return str(support.make_vit(tmp_path_factory.mktemp("models") / "vit"))


def test_the_model_has_a_fresh_head_and_the_task_its_sizes(vit):
    base, task = image_classification(TaskSetup(vit, ("a", "b", "c"), 8))
    assert isinstance(base, BaseModel)
    assert base.head_names == ("classifier",)
    assert (task.size, task.num_channels) == ((6, 6), 1)
    _, examples = encoded(task)
    inputs, _ = task.collate(examples, np.arange(5))
    assert base.module(**inputs).logits.shape == (5, 3)


def test_the_folder_may_say_how_channels_are_normalised(vit, tmp_path):
    shutil.copytree(vit, tmp_path / "vit")
    options = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.25], "image_std": [2.0]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(options))
    _, task = image_classification(TaskSetup(str(tmp_path / "vit"), ("a", "b"), 8))
    assert (task.mean.item(), task.std.item()) == (0.25, 2.0)


def test_a_head_for_texts_is_refused(vit):
    with pytest.raises(AdapterError, match=r'model\.head must be "auto" or "stock" .* got "mean_pooling"'):
        image_classification(TaskSetup(vit, ("a", "b"), 8, head="mean_pooling"))
