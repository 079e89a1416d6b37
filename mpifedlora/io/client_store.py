"""What clients keep between rounds, in one folder that every worker sees.

So a client's state follows it to whichever worker trains it next. A worker writes it under the round
that made it, and it counts only once the server has finished that round and names the round to read:
the number is the commit. What was written in a round that never finished is replaced when the round
is done again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mpifedlora.errors import CheckpointError
from mpifedlora.io.atomic import refusal, remove_stale_temporaries, replace_file

TOKEN_FILE = "shared.token"
_NAME = re.compile(r"client-(\d{5,})\.round-(\d{5,})\.safetensors")


class ClientStore:
    """Versions of clients' states, one file for each client and round.

    Args:
        folder: where the files lie; made by the first write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def write(self, client_id: int, round_num: int, state: Mapping[str, Tensor]) -> None:
        """Put a client's state in place under the round that made it.

        Args:
            client_id: whose state it is.
            round_num: 1..num_rounds; a state of the same client and round is replaced.
            state: name to contiguous float32 CPU tensor (num_values,); views of one buffer are fine.

        Raises:
            CheckpointError: (an `OSError`, with its `errno`) if the disk refuses; every file written
                before is untouched.
        """
        self._put(_name(client_id, round_num), _encode(client_id, round_num, state))

    def read(self, client_id: int, round_num: int) -> dict[str, Tensor]:
        """Return a client's state as it was written under a round.

        Args:
            client_id: whose state it is.
            round_num: the round that the server named.

        Returns:
            Name to float32 CPU tensor (num_values,), sorted by name, in memory of their own.

        Raises:
            CheckpointError: if the file is missing, damaged, or of another client or round.
        """
        path = self._folder / _name(client_id, round_num)
        # Read whole, not mapped: another worker may remove the file while its tensors are in use.
        state, *written_for = _decode(_read_bytes(path), path)
        if written_for != [str(client_id), str(round_num)]:
            raise CheckpointError(
                f"a file of client {client_id} and round {round_num} must hold their state, got that of "
                f"client {written_for[0]} and round {written_for[1]} ({path}); put the files back as written"
            )
        return state

    def remove(self, client_id: int, round_num: int) -> None:
        """Remove one version, of an update that was refused, as far as the disk lets it."""
        with suppress(OSError):
            (self._folder / _name(client_id, round_num)).unlink(missing_ok=True)

    def remove_before(self, client_id: int, round_num: int) -> None:
        """Remove a client's versions that are older than a round, as far as the disk lets it."""
        with suppress(OSError):
            for its_client, its_round, path in self._versions():
                if its_client == client_id and its_round < round_num:
                    path.unlink(missing_ok=True)
                    remove_stale_temporaries(path)

    def write_token(self, token: str) -> None:
        """Put a text in place by which other processes know this folder.

        Raises:
            CheckpointError: if the disk refuses.
        """
        self._put(TOKEN_FILE, token.encode())

    def read_token(self) -> str:
        """Return the text that this process finds in the folder, "" where there is none.

        Raises:
            CheckpointError: if there is one that cannot be read.
        """
        try:
            return _read_bytes(self._folder / TOKEN_FILE).decode(errors="replace")
        except CheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return ""
            raise

    def _versions(self) -> Iterator[tuple[int, int, Path]]:
        for path in self._folder.glob("client-*.safetensors"):
            if match := _NAME.fullmatch(path.name):
                yield int(match[1]), int(match[2]), path

    def _put(self, name: str, content: bytes) -> None:
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)
        except OSError as error:
            todo = "free space or restore the folder: what was written before is untouched"
            raise refusal("the folder of clients' states must be writable", error, path, todo) from error


def _name(client_id: int, round_num: int) -> str:
    return f"client-{client_id:05d}.round-{round_num:05d}.safetensors"


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        must_hold = "clients' states must be on storage that every worker sees"
        raise refusal(must_hold, error, path, "put the run's folder on a shared file system") from error


def _encode(client_id: int, round_num: int, state: Mapping[str, Tensor]) -> bytes:
    tensors = {name: tensor.detach().clone() for name, tensor in state.items()}
    metadata = {"client_id": str(client_id), "round_num": str(round_num)}
    return bytes(save(tensors, {**metadata, "sha256": _digest(tensors, **metadata)}))


def _decode(content: bytes, path: Path) -> tuple[dict[str, Tensor], str, str]:
    try:
        # The library gives tensors in an order that differs from call to call.
        state: dict[str, Tensor] = dict(sorted(load(content).items()))
        header_end = 8 + int.from_bytes(content[:8], "little")
        # The library has read the header: a table, whose metadata are texts.
        metadata = json.loads(content[8:header_end]).get("__metadata__") or {}
        client_id, round_num = metadata.get("client_id", ""), metadata.get("round_num", "")
        if metadata.get("sha256") != _digest(state, client_id, round_num):
            raise ValueError("other bytes than were written")
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"a client's state must be read back as it was written, got {error} ({path}); "
            "check the storage and start the run anew"
        ) from error
    return state, client_id, round_num


def _digest(state: Mapping[str, Tensor], client_id: str, round_num: str) -> str:
    """Hash all that a damaged file could change: the bytes, and what the header says of them."""
    digest = hashlib.sha256(repr((client_id, round_num)).encode())
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
