"""Checkpoints of a run: one file a round, each with the digest of its bytes in its name.

A file's name tells what its bytes must hash to, so damage is found before anything reads them. The content
is safetensors: numbers as JSON, tensors as they are; nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mpifedlora.errors import CheckpointError
from mpifedlora.io.atomic import refusal, remove_stale_temporaries, replace_file

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
_NAME = re.compile(r"round-(\d{5,})\.([0-9a-f]{32})\.safetensors")
_DIGEST_DIGITS = 32


class Found(NamedTuple):
    """A checkpoint that is whole: its file, the last round it holds, and its bytes."""

    path: Path
    round_num: int
    content: bytes


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made by the first write.
        keep: how many of the latest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder.absolute(), keep

    def write(self, round_num: int, content: bytes) -> None:
        """Put a checkpoint in place, and remove those that are too old.

        Args:
            round_num: the last round that it holds.
            content: of `encode`.

        Raises:
            CheckpointError: (an `OSError`, with its `errno`) if the disk refuses; every checkpoint
                written before is untouched.
        """
        path = self._folder / f"round-{round_num:05d}.{_digest(content)}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)
        except OSError as error:
            todo = (
                "free space or restore the folder: those written before are untouched, and the next round is "
                "tried again"
            )
            raise refusal("checkpoints must be writable", error, self._folder, todo) from error
        for _, old in self._files()[self._keep :]:
            with suppress(OSError):
                old.unlink(missing_ok=True)
                remove_stale_temporaries(old)

    def remove_after(self, round_num: int) -> None:
        """Remove checkpoints of later rounds, which a resumed run makes anew, as far as the disk lets it."""
        for its_round, path in self._files():
            if its_round > round_num:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def latest(self, warn: Callable[[str], None]) -> Found | None:
        """Return the latest checkpoint that is whole, or None where there is no file of any.

        Args:
            warn: told of each one that is not.

        Raises:
            CheckpointError: if there are files, and none of them is whole.
        """
        files = self._files()
        for round_num, path in files:
            content, damage = _read(path)
            if not damage:
                return Found(path, round_num, content)
            warn(f"a checkpoint is {damage}, so an older one is looked for ({path})")
        if files:
            raise CheckpointError(
                f"one checkpoint at least must be whole, got {len(files)} damaged ones ({self._folder}); "
                "bring one back from a backup, or start anew with --overwrite"
            )
        return None

    def rounds(self) -> list[int]:
        """Return the rounds that there is a checkpoint of, in order."""
        return sorted({round_num for round_num, _ in self._files()})

    def read(self, round_num: int) -> bytes:
        """Return the content of one round's checkpoint.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        path = next((path for its_round, path in self._files() if its_round == round_num), None)
        if path is None:
            there = ", ".join(map(str, self.rounds())) or "none"
            raise CheckpointError(
                f"--round must be a round with a checkpoint, got {round_num} (in {self._folder}: {there}); "
                "a run keeps the last checkpoint.keep of them, one in checkpoint.every rounds: raise it"
            )
        content, damage = _read(path)
        if damage:
            raise CheckpointError(
                f"a checkpoint must be whole, got one that is {damage} ({path}); use another"
            )
        return content

    def _files(self) -> list[tuple[int, Path]]:
        paths = self._folder.glob("round-*.safetensors") if self._folder.is_dir() else []
        matches = ((_NAME.fullmatch(path.name), path) for path in paths)
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def encode(numbers: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """Return numbers (JSON values) and contiguous CPU tensors as the bytes of a checkpoint."""
    from safetensors.torch import save

    head = {"format_version": str(FORMAT_VERSION), "numbers": json.dumps(numbers)}
    return bytes(save(tensors, head))


def numbers_of(content: bytes) -> dict[str, Any]:
    """Return the numbers of a checkpoint.

    Raises:
        CheckpointError: if the bytes are of another format.
    """
    try:
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        if head["format_version"] != str(FORMAT_VERSION):
            raise ValueError(f"format_version {head['format_version']}")
        numbers = json.loads(head["numbers"])
        if not isinstance(numbers, dict):
            raise TypeError("numbers that are no table")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _other_format(error) from error
    return numbers


def decode(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the numbers and tensors of a checkpoint.

    Raises:
        CheckpointError: if the bytes are of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return numbers_of(content), load(content)
    except (SafetensorError, ValueError, KeyError) as error:  # a dtype that torch does not know is a key
        raise _other_format(error) from error


def _other_format(error: Exception) -> CheckpointError:
    return CheckpointError(
        f"a checkpoint must be of format_version {FORMAT_VERSION}, got {error}; resume with the version of "
        "mpifedlora that wrote it"
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_DIGITS]


def _read(path: Path) -> tuple[bytes, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        return b"", f"not readable ({error.strerror or error})"
    match = _NAME.fullmatch(path.name)
    is_whole = match is not None and _digest(content) == match[2]
    return content, "" if is_whole else "damaged: its bytes are not those its name tells"
