"""Pre-trained base models with a task head that fits them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpifedlora.errors import AdapterError
from mpifedlora.training.attention import use_float32_attention

# Features of sentence encoders are small (about 0.05 a value); a linear head on them learns at the
# adapter's learning rate only if they are scaled up. Measured on MiniLM and 20 Newsgroups.
FEATURE_SCALE = 10.0
_LONGEST_REASON = 500
# Transformers would ask on the terminal whether to run code that lies in a model's folder.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


Module = nn.Module


class BaseModel(NamedTuple):
    """A base model, and names of modules in it.

    Args:
        module: called with a batch's inputs, it returns something with `logits`.
        head_names: of the modules that make the task head, which are trained whole.
        fixed_names: of modules that no adapter is put on.
    """

    module: nn.Module
    head_names: tuple[str, ...]
    fixed_names: tuple[str, ...] = ()


class Logits(NamedTuple):
    """What a classifier returns: `logits` (examples, num_labels)."""

    logits: Tensor


class MeanPoolingClassifier(nn.Module):
    """A linear head on the mean of an encoder's token features, as sentence encoders want it.

    Args:
        encoder: transformers encoder with `last_hidden_state` (examples, tokens, hidden).
        num_labels: classes.

    References:
        Sentence-BERT, arXiv 1908.10084, section 3 (mean pooling).
    """

    def __init__(self, encoder: Any, num_labels: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Logits:
        """Return logits (examples, num_labels) of padded token ids (examples, tokens)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        return Logits(self.classifier(mean.to(self.classifier.weight.dtype) * FEATURE_SCALE))


class _Loading:
    """How base models are loaded now: where to (None is the CPU), and in how many bits."""

    device_map: str | dict[str, str] | None = None
    quantization: Any = None

    @classmethod
    def options(cls) -> dict[str, Any]:
        found = {"device_map": cls.device_map, "quantization_config": cls.quantization}
        return NO_CODE | {name: value for name, value in found.items() if value is not None}


@contextmanager
def without_weights() -> Iterator[None]:
    """Load base models on the device `meta` inside this block: shapes, and no weights.

    A user's task may build its model by `build_base` too, so that this is no argument of it.
    """
    before, _Loading.device_map = _Loading.device_map, "meta"
    try:
        yield
    finally:
        _Loading.device_map = before


@contextmanager
def quantized(kind: str, dtype: str, device: str) -> Iterator[None]:
    """Load base models with linear layers in 8 or 4 bits inside this block.

    Args:
        kind: `int8`, `nf4` or `none`.
        dtype: of what is not quantised, and that 4-bit layers compute in.
        device: where the model is loaded to.
    """
    before = _Loading.device_map, _Loading.quantization
    if kind != "none":
        from transformers import BitsAndBytesConfig

        _Loading.device_map = {"": device}
        _Loading.quantization = BitsAndBytesConfig(
            load_in_8bit=kind == "int8",
            load_in_4bit=kind == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=["lm_head", "score", "classifier", "pre_classifier", "pooler"],
        )
    try:
        yield
    finally:
        _Loading.device_map, _Loading.quantization = before


def is_quantized(module: nn.Module) -> bool:
    """Say whether a layer's weight is kept in 8 or 4 bits."""
    weight: Any = module.weight
    return not weight.is_floating_point()


def build_base(
    name: str,
    *,
    num_labels: int,
    head: str = "auto",
    dtype: str = "float32",
    dropout: float | None = None,
    seed: int = 0,
) -> BaseModel:
    """Load a pre-trained model and put a fresh head on it, the same on every process.

    Args:
        name: folder, or hub name.
        num_labels: classes.
        head: `mean_pooling`, `stock` or `auto` (see `[model] head`), `causal-lm` or `image`.
        dtype: of the base weights; the head is float32.
        dropout: probability in all of the model's dropout layers; None leaves them as they are.
        seed: of the head's initial weights.

    Raises:
        AdapterError: if there is no such model, or it has no weights.
    """
    torch.manual_seed(seed)
    use_float32_attention()
    try:
        kind = ("mean_pooling" if wants_mean_pooling(name) else "stock") if head == "auto" else head
        base = _BUILDERS[kind](name, num_labels, getattr(torch, dtype))
    # Damaged files and missing packages come as any kind of error.
    except Exception as error:
        raise not_loadable(name, error) from error
    conv1ds_to_linears(base.module)
    for head_name in base.head_names:
        base.module.get_submodule(head_name).float().register_forward_pre_hook(_to_float32)
    if dropout is not None:
        for module in base.module.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
    return base


def not_loadable(name: str, error: Exception) -> AdapterError:
    """Return what to say of a model or tokenizer that transformers cannot load."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST_REASON]
    return AdapterError(
        f"model.name must be a pre-trained model that transformers can load, got {name} ({reason}); "
        'give a folder with config.json and weights, a hub name, or "minilm"; code in the folder is not run'
    )


def load_weights(base: BaseModel, weights: Mapping[str, Tensor]) -> Module:
    """Copy weights into a base model by name, and return it in evaluation mode.

    Raises:
        AdapterError: if a weight does not fit.
    """
    parameters = dict(base.module.named_parameters())
    for name, value in weights.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise AdapterError(
                f"base weights must fit the model, got {name} {tuple(value.shape)}; the model that "
                "[model] name stands for has changed since the run"
            )
        # Trained weights are float32, whatever the model was loaded as.
        parameters[name].data = value.clone()
    return base.module.eval()


def check_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Check that names of `[lora] modules_to_save` are whole names of a model's modules.

    Raises:
        AdapterError: naming the first that is not, and the nearest one.
    """
    known = [name for name, _ in model.named_modules()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f'did you mean "{near[0]}"?' if near else "write its whole name"
            raise AdapterError(
                f"lora.modules_to_save must be whole names of the model's modules, got {name!r}; {advice}"
            )


def wants_mean_pooling(name: str) -> bool:
    """Say whether a model folder asks for mean pooling (sentence-transformers' pooling file)."""
    file = Path(name) / "1_Pooling" / "config.json"
    return file.is_file() and bool(json.loads(file.read_text()).get("pooling_mode_mean_tokens"))


def _mean_pooling(name: str, num_labels: int, dtype: torch.dtype) -> BaseModel:
    from transformers import AutoConfig, AutoModel

    kind = AutoConfig.from_pretrained(name, **NO_CODE).model_type
    # BERT's pooler would be trained by nobody and yet exchanged by the full scope.
    options = {"add_pooling_layer": False} if kind in _WITH_POOLER else {}
    encoder = AutoModel.from_pretrained(name, dtype=dtype, **_Loading.options(), **options)
    return BaseModel(MeanPoolingClassifier(encoder, num_labels), ("classifier",))


def _stock(
    name: str, num_labels: int, dtype: torch.dtype, kind: str = "AutoModelForSequenceClassification"
) -> BaseModel:
    import transformers

    model, report = getattr(transformers, kind).from_pretrained(
        name,
        num_labels=num_labels,
        dtype=dtype,
        **_Loading.options(),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    fresh = {str(key[0] if isinstance(key, tuple) else key) for key in report["missing_keys"]}
    fresh |= {str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]}
    prefix = model.base_model_prefix + "."
    heads = _head_names(model, {key.split(".")[0] for key in fresh if not key.startswith(prefix)})
    inner = {key.rpartition(".")[0] for key in fresh if key.startswith(prefix)}
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = model.config.eos_token_id
    return BaseModel(model, tuple(sorted(heads | inner)))


def _head_names(model: nn.Module, fresh: set[str]) -> set[str]:
    on_top = {
        name
        for name, module in model.named_children()
        if name != getattr(model, "base_model_prefix", None) and any(True for _ in module.parameters())
    }
    # A checkpoint with a trained head leaves none fresh: then it is all that lies on the base model. PEFT
    # takes endings of names, so "classifier" would reach "pre_classifier" too.
    return {name for name in on_top if name.endswith(tuple(fresh))} if fresh else on_top


def _causal_lm(name: str, num_labels: int, dtype: torch.dtype) -> BaseModel:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **_Loading.options())
    model.config.use_cache = False  # training would fill it for nothing
    output = model.get_output_embeddings()
    return BaseModel(model, (), tuple(each for each, module in model.named_modules() if module is output))


def conv1ds_to_linears(module: nn.Module) -> None:
    """Put linear layers in the place of GPT-2's Conv1D, which are linear layers with the weight transposed.

    The adapter of the one is the adapter of the other.
    """
    from transformers.pytorch_utils import Conv1D

    for name, conv in [pair for pair in module.named_modules() if isinstance(pair[1], Conv1D)]:
        linear: Any = nn.Linear(1, 1)
        linear.out_features, linear.in_features = conv.weight.shape[1], conv.weight.shape[0]
        linear.was_conv1d = True
        _replace(module, name, _transposed(conv, linear))


def linears_to_conv1ds(module: nn.Module) -> None:
    """Undo `conv1ds_to_linears`, so that transformers finds the weights as it has written them."""
    from transformers.pytorch_utils import Conv1D

    for name, linear in [pair for pair in module.named_modules() if hasattr(pair[1], "was_conv1d")]:
        _replace(module, name, _transposed(linear, Conv1D(*linear.weight.shape)))


def _transposed(source: Any, target: Any) -> nn.Module:
    target.weight, target.bias = nn.Parameter(source.weight.detach().t().contiguous()), source.bias
    layer: nn.Module = target
    return layer


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def recompute_activations(module: nn.Module) -> None:
    """Make a base model keep only its layers' inputs for the backward pass, and compute the rest again.

    Raises:
        AdapterError: if the model is not one of transformers' that can.
    """
    modules: list[Any] = list(module.modules())
    able = [each for each in modules if getattr(each, "supports_gradient_checkpointing", False)]
    if not able:
        raise AdapterError(
            "training.gradient_checkpointing = true needs a model whose layers can be computed again, got "
            f"{type(module).__name__}; leave it out, or set training.accumulation_steps"
        )
    enable = (
        getattr(able[0], "activation_checkpointing_enable", None) or able[0].gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    # Only for the reentrant kind: a gradient of the embeddings would reach below the first adapted layer.
    able[0].disable_input_require_grads()


_WITH_POOLER = {"bert", "roberta", "xlm-roberta", "mpnet", "albert", "camembert"}
_BUILDERS: dict[str, Callable[[str, int, torch.dtype], BaseModel]] = {
    "mean_pooling": _mean_pooling,
    "stock": _stock,
    "causal-lm": _causal_lm,
    "image": partial(_stock, kind="AutoModelForImageClassification"),
}


def _to_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, Tensor) else value for value in inputs)
