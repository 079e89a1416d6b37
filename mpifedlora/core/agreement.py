"""What every process says of itself before the first round, and whether all of them agree.

Each process sends one fixed-size record, also when its own set-up failed: so a bad set-up anywhere
is one clear error that names process and field, never a hang.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpifedlora.errors import ConfigError

FIELDS = ("package version", "configuration", "data", "model", "folder for clients' states")
_DIGEST_CHARS = 64
Bytes = npt.NDArray[np.uint8]
_ERROR_BYTES = 3720
_RECORD = np.dtype(
    [("host", "S56"), ("device", "S64"), ("digests", f"S{_DIGEST_CHARS}", (len(FIELDS),))]
    + [("error", f"S{_ERROR_BYTES}")]
)
STATUS_BYTES = _RECORD.itemsize


@dataclass(frozen=True)
class Status:
    """One process's report of its set-up.

    Args:
        host: name of its node.
        digests: by field of FIELDS, a hexadecimal digest; fields not yet known are left out.
        error: why the set-up failed; empty where it did not.
        device: kind of device and number of threads, once known: where these are equal on all
            processes, so are the bits that they compute.
    """

    host: str
    digests: Mapping[str, str]
    error: str = ""
    device: str = ""

    def pack(self) -> Bytes:
        """Write STATUS_BYTES bytes; a long error is cut."""
        record = np.zeros((), _RECORD)
        record["host"], record["device"] = self.host.encode()[:56], self.device.encode()[:64]
        record["digests"] = [self.digests.get(field, "")[:_DIGEST_CHARS].encode() for field in FIELDS]
        # "replace": a path that is not UTF-8 has lone surrogates, which encode() alone refuses.
        record["error"] = self.error.encode(errors="replace")[:_ERROR_BYTES]
        return np.frombuffer(record.tobytes(), np.uint8).copy()

    @staticmethod
    def unpack(data: Bytes) -> Status:
        """Read a packed status."""
        record = data.view(_RECORD)[0]
        digests = {
            field: bytes(digest).decode() for field, digest in zip(FIELDS, record["digests"], strict=True)
        }
        error = bytes(record["error"]).decode(errors="replace")
        host, device = (bytes(record[name]).decode(errors="replace") for name in ("host", "device"))
        return Status(host, digests, error, device)


def check_agreement(statuses: Sequence[Status], names: Sequence[str]) -> None:
    """Check that every process is set up, and in the same way as the server.

    Args:
        statuses: one a process, the server's first.
        names: what to call each process in a message.

    Raises:
        ConfigError: naming the first process that failed, or the field in which one differs.
    """
    for status, name in zip(statuses, names, strict=True):
        if status.error:
            same = [other for other in statuses if other.error == status.error]
            where = "" if len(same) == len(statuses) else f" ({name} on {status.host})"
            raise ConfigError(status.error + where)
    for field in FIELDS:
        for status, name in zip(statuses, names, strict=True):
            got, wanted = status.digests.get(field, ""), statuses[0].digests.get(field, "")
            if got != wanted:
                raise ConfigError(
                    f"every process must have the same {field}, got {got} on {name} ({status.host}) and "
                    f"{wanted} on {names[0]} ({statuses[0].host}); "
                    "use one shared folder, or the same versions and files on every node"
                )
