"""Parts of the set-up after which all processes go on, or none."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

from mpifedlora.core.agreement import Status, check_agreement
from mpifedlora.errors import MpiFedLoraError
from mpifedlora.transport.base import Endpoint

T = TypeVar("T")


def agree(endpoint: Endpoint, work: Callable[[], tuple[T, Mapping[str, str], str]]) -> tuple[T, list[Status]]:
    """Do a part of the set-up, and go on only if every process could, with the same outcome.

    Args:
        endpoint: to the other processes, all of which call this.
        work: returns a result, digests of what must be equal everywhere, and the kind of device.

    Returns:
        This process's result, and all processes' statuses, the server's first.

    Raises:
        ConfigError: if another process could not, or its digests differ.
    """
    try:
        result, digests, device = work()
    except Exception as error:
        # The others are told before this process gives up: nobody waits for it.
        endpoint.exchange(Status(endpoint.place.host, {}, error=_describe(error)))
        raise
    statuses = endpoint.exchange(Status(endpoint.place.host, digests, device=device))
    check_agreement(statuses, endpoint.process_names())
    return result, statuses


def _describe(error: Exception) -> str:
    if isinstance(error, MpiFedLoraError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()[-3000:]
