"""What a run is resumed from: found and checked before anything heavy is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpifedlora.core.config import RunConfig
from mpifedlora.core.differences import CHANGES_NO_NUMBER, differing_keys
from mpifedlora.errors import CheckpointError
from mpifedlora.io.checkpoints import CheckpointStore, numbers_of
from mpifedlora.io.output_folder import CHECKPOINTS_FOLDER, RESULTS_FILE, free_name
from mpifedlora.io.results_schema import Event, RoundRow


class Resumable(NamedTuple):
    """What a run goes on from.

    Args:
        content: of its checkpoint.
        rows: of its results, up to the checkpoint.
        created: when the run began, ISO 8601.
        events: of its results.
    """

    content: bytes
    rows: list[RoundRow]
    created: str
    events: list[Event]


def find_resumable(out: Path, config: RunConfig) -> Resumable | None:
    """Return what the run in a folder goes on from, or None where it has finished no round.

    Raises:
        CheckpointError: if no checkpoint is whole, the configuration has changed, or results.h5 does not
            reach up to the checkpoint.
    """
    from mpifedlora.io.results import read_results

    store = CheckpointStore(out / CHECKPOINTS_FOLDER, config.checkpoint.keep)
    found = store.latest(lambda text: print(f"warning: {text}", file=sys.stderr, flush=True))
    path = out / RESULTS_FILE
    results = read_results(path) if found or path.exists() else None
    rows = results.rows() if results else []
    if found is None:
        if rows:
            raise CheckpointError(
                f"a run must have a checkpoint to be resumed, got {len(rows)} rounds and none "
                f"({free_name(out)}); start anew in another folder, or with --overwrite"
            )
        return None
    check_unchanged(config, numbers_of(found.content).get("config", {}), found.path)
    kept = [row for row in rows if row.round_num <= found.round_num]
    if len(kept) != found.round_num or results is None:
        raise CheckpointError(
            f"results.h5 must hold the {found.round_num} rounds of the checkpoint, got {len(kept)} ({path}); "
            "put back the file that belongs to it"
        )
    return Resumable(found.content, kept, results.info.created, results.events)


def check_unchanged(config: RunConfig, saved: Mapping[str, Any], where: Path) -> None:
    """Check that a run is resumed as it was configured; what changes no number may differ.

    Args:
        config: of the resumed run.
        saved: the configuration in its checkpoint.
        where: the checkpoint's file.

    Raises:
        CheckpointError: with the keys that differ.
    """
    now = config.model_dump(mode="json")
    is_table = isinstance(saved, dict) and all(isinstance(keys, dict) for keys in saved.values())
    differing = {
        key: values
        for key, values in differing_keys([saved if is_table else {}, now]).items()
        if key != "federation.num_rounds" and not key.startswith(CHANGES_NO_NUMBER)
    }
    if differing:
        told = "; ".join(f"{key} was {was!r}, got {got!r}" for key, (was, got) in differing.items())
        raise CheckpointError(
            f"a run must be resumed with the configuration that it began with: {told} ({where}); set them "
            "back (federation.num_rounds may be changed), or start anew in another folder"
        )
