"""Where every exchanged tensor lies in one contiguous flat buffer.

A message is not packed: the tensors of the model *are* views into the buffer that is sent. After a
cut there is a new, smaller layout and a new, smaller buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mpifedlora.errors import AdapterError

Parts = Literal["", "a", "b", "ab"]
DENSE = -1  # in place of a rank: the whole (out_features, in_features) matrix, where that is smaller


class LinearShape(NamedTuple):
    """A linear layer that carries an adapter: weight (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int


class TensorShape(NamedTuple):
    """A tensor that is exchanged whole: the task head, or a weight of the base model."""

    name: str
    shape: tuple[int, ...]


class Factors(NamedTuple):
    """One module's adapter: `a` (lora_rank, in_features), `b` (out_features, lora_rank)."""

    a: Tensor
    b: Tensor

    @property
    def lora_rank(self) -> int:
        """Inner dimension of b @ a."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class AdapterLayout:
    """Offsets of A, B and whole tensors in a flat buffer: A_1 B_1 ... A_M B_M, then the whole ones.

    Args:
        modules: the adapted linear layers, in order.
        lora_ranks: one rank a module, each 0 to min(in_features, out_features).
        whole: tensors exchanged whole, after the factors.
        parts: which factors the buffer holds; a factor that it does not hold is seen with rank 0.

    Raises:
        AdapterError: if the ranks do not fit the modules.

    >>> layout = AdapterLayout((LinearShape("q", 3, 4),), (2,), (TensorShape("head", (5,)),))
    >>> layout.num_values  # 2 * (3 + 4) + 5
    19
    """

    modules: tuple[LinearShape, ...]
    lora_ranks: tuple[int, ...]
    whole: tuple[TensorShape, ...] = ()
    parts: Parts = "ab"

    def __post_init__(self) -> None:
        if len(self.modules) != len(self.lora_ranks):
            raise AdapterError(
                f"a layout needs one rank a module, got {len(self.lora_ranks)} ranks for "
                f"{len(self.modules)} modules; pass one for each"
            )
        for module, lora_rank in zip(self.modules, self.lora_ranks, strict=True):
            largest = min(module.out_features, module.in_features)
            if not 0 <= lora_rank <= largest:
                raise AdapterError(
                    f"the LoRA rank of {module.name} must be 0 to {largest}, got {lora_rank}; lower it"
                )

    @cached_property
    def factor_values(self) -> int:
        """Values in all A and B: the sum over modules of lora_rank * (in_features + out_features)."""
        return sum(
            rank_a * module.in_features + rank_b * module.out_features
            for module, (rank_a, rank_b) in zip(self.modules, self._held, strict=True)
        )

    @cached_property
    def _held(self) -> list[tuple[int, int]]:
        """Directions that the buffer holds of each module's A and B."""
        has_a, has_b = "a" in self.parts, "b" in self.parts
        return [(lora_rank * has_a, lora_rank * has_b) for lora_rank in self.lora_ranks]

    @cached_property
    def num_values(self) -> int:
        """Values in the whole buffer."""
        return self.factor_values + sum(math.prod(tensor.shape) for tensor in self.whole)

    @cached_property
    def piece_values(self) -> tuple[int, ...]:
        """Values of each piece in the order of the buffer: a module's A and B, or a whole tensor."""
        pairs = zip(self.modules, self._held, strict=True)
        modules = (a * module.in_features + b * module.out_features for module, (a, b) in pairs)
        return (*modules, *(math.prod(tensor.shape) for tensor in self.whole))

    def select(self, first: int, last: int) -> AdapterLayout:
        """Return the layout of pieces first..last-1, which are contiguous in the buffer."""
        num = len(self.modules)
        whole = self.whole[max(0, first - num) : max(0, last - num)]
        return AdapterLayout(self.modules[first:last], self.lora_ranks[first:last], whole, self.parts)

    def factors(self, flat: Tensor) -> list[Factors]:
        """Return views of each module's A and B.

        Args:
            flat: buffer (num_values,), any dtype and device.
        """
        views, offset = [], 0
        for module, (rank_a, rank_b) in zip(self.modules, self._held, strict=True):
            middle = offset + rank_a * module.in_features
            end = middle + rank_b * module.out_features
            a = flat[offset:middle].view(rank_a, module.in_features)
            views.append(Factors(a, flat[middle:end].view(module.out_features, rank_b)))
            offset = end
        return views

    def whole_tensors(self, flat: Tensor) -> list[Tensor]:
        """Return views of the tensors that are exchanged whole, in their shapes."""
        sizes = [math.prod(tensor.shape) for tensor in self.whole]
        pieces = torch.split(self.whole_values(flat), sizes)
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, self.whole, strict=True)]

    def whole_values(self, flat: Tensor) -> Tensor:
        """Return the flat part of the buffer behind all factors."""
        return flat[self.factor_values : self.num_values]


def piece_span(sizes: Sequence[int], first: int, last: int) -> slice:
    """Return where pieces first..last-1 lie, from the sizes of all.

    >>> piece_span((3, 5, 2), 1, 3)
    slice(3, 10, None)
    """
    start = sum(sizes[:first])
    return slice(start, start + sum(sizes[first:last]))


def copy_common(source: AdapterLayout, values: Tensor, target: AdapterLayout, out: Tensor) -> Tensor:
    """Copy what two layouts of one model both hold: leading directions of factors, and whole tensors.

    Args:
        source: layout of `values`.
        values: (source.num_values,).
        target: layout of `out`; its ranks may be lower or higher.
        out: (target.num_values,), whose other values are left as they are, and returned.
    """
    if source == target:
        return out.copy_(values)
    for given, taken in zip(source.factors(values), target.factors(out), strict=True):
        rank_a = min(given.a.shape[0], taken.a.shape[0])
        rank_b = min(given.b.shape[1], taken.b.shape[1])
        taken.a[:rank_a].copy_(given.a[:rank_a])
        taken.b[:, :rank_b].copy_(given.b[:, :rank_b])
    if source.whole and target.whole:
        target.whole_values(out).copy_(source.whole_values(values))
    return out


@dataclass(frozen=True)
class ModelShapes:
    """What a base model looks like to the core.

    Args:
        modules: linear layers that carry an adapter.
        head: tensors trained and exchanged beside the adapter (task head, modules to save).
        body: every other weight of the base model.
    """

    modules: tuple[LinearShape, ...]
    head: tuple[TensorShape, ...]
    body: tuple[TensorShape, ...]

    @cached_property
    def head_values(self) -> int:
        """Values of the head, the last of every buffer of trained values."""
        return sum(math.prod(tensor.shape) for tensor in self.head)

    def adapter(self, lora_ranks: Sequence[int], parts: Parts = "ab") -> AdapterLayout:
        """Layout of adapter and head, or of a part of the factors and the head."""
        ranks = tuple(lora_ranks)
        return self._remembered((ranks, parts), lambda: AdapterLayout(self.modules, ranks, self.head, parts))

    def frozen(self, lora_ranks: Sequence[int]) -> AdapterLayout:
        """Layout of what is added to the base weights: factors, or whole matrices where the rank is DENSE."""
        ranks = tuple(lora_ranks)
        return self._remembered((ranks, "frozen"), lambda: self._frozen(ranks))

    def _frozen(self, lora_ranks: tuple[int, ...]) -> AdapterLayout:
        dense = tuple(
            TensorShape(module.name, (module.out_features, module.in_features))
            for module, lora_rank in zip(self.modules, lora_ranks, strict=True)
            if lora_rank == DENSE
        )
        ranks = tuple(0 if lora_rank == DENSE else lora_rank for lora_rank in lora_ranks)
        return AdapterLayout(self.modules, ranks, dense)

    def _remembered(
        self, key: tuple[tuple[int, ...], str], make: Callable[[], AdapterLayout]
    ) -> AdapterLayout:
        # A layout remembers its offsets: the same one is asked for many times a round.
        if key not in self._layouts:
            self._layouts[key] = make()
        return self._layouts[key]

    @cached_property
    def _layouts(self) -> dict[tuple[tuple[int, ...], str], AdapterLayout]:
        return {}

    def full(self) -> AdapterLayout:
        """Layout of every weight, what is exchanged when the scope is `full`."""
        return self._full

    @cached_property
    def _full(self) -> AdapterLayout:
        return AdapterLayout((), (), self.body + self.head)

    def base(self) -> AdapterLayout:
        """Layout of the weights without the head, sent once when the `full` stage has ended."""
        return AdapterLayout((), (), self.body)
