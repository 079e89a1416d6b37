"""A federation as a Python object, for scripts and notebooks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpifedlora.core.config import RunConfig
from mpifedlora.io.output_folder import RUN_FILE, FolderLock
from mpifedlora.io.run_file import resolve_run
from mpifedlora.runtime import launch
from mpifedlora.runtime.callbacks import Callback
from mpifedlora.runtime.interruption import Interruption

if TYPE_CHECKING:
    from mpifedlora.io.results import Results


class Federation:
    """A federation: what to train, and where its results go.

        federation = Federation("run.toml", overrides={"federation.num_rounds": 4}, out="runs/first")
        results = federation.run()
        print(results.rounds["eval_accuracy"][-1])

    A script that mpirun starts does the same on every process: see `run`.

    Args:
        run: path of a run file; or its tables, as a dictionary or a `RunConfig`; None is the run file of
            the run in `out`.
        out: folder for the results.
        overrides: `section.key` to value, in place of what `run` says.

    Raises:
        ConfigError: if a key or a value is wrong; everything that is wrong is told at once.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | Mapping[str, Mapping[str, Any]] | RunConfig | None = None,
        *,
        out: str | os.PathLike[str],
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.out = Path(out).expanduser()
        source = run.model_dump() if isinstance(run, RunConfig) else run
        self._resolved = resolve_run(self.out / RUN_FILE if source is None else source, overrides or {})
        self._interruption = Interruption()

    @property
    def config(self) -> RunConfig:
        """The resolved configuration: each key of the run file, checked, method and defaults applied."""
        return self._resolved.config

    def run(
        self,
        callbacks: Sequence[Callback] = (),
        *,
        overwrite: bool = False,
        resume: bool = False,
        progress: bool = True,
    ) -> Results | None:
        """Train: the whole federation in this process, or this process's part of it under mpirun.

        Args:
            callbacks: told of the run, on the server's process.
            overwrite: whether an older run in `out` is replaced.
            resume: whether the run in `out` goes on; where it has finished no round, it starts anew.
            progress: whether the run is shown on standard output.

        Returns:
            The results, also those of a run that was stopped; under mpirun, None on the workers.

        Raises:
            MpiFedLoraError: if the run cannot start. Under mpirun the server raises it, and the workers
                leave with `SystemExit`, so that it is told once.
        """
        self._interruption = Interruption()
        request = launch.Request(
            lambda: self._resolved,
            self.out,
            overwrite,
            resume,
            FolderLock(self.out),
            self._interruption,
            tuple(callbacks),
            progress,
        )
        outcome = launch.federate(request)
        if outcome.results is None and outcome.exit_code:
            sys.exit(outcome.exit_code)
        return outcome.results

    def stop(self) -> None:
        """End the run after the round in hand, as SIGUSR2 does; it can be resumed, bit for bit.

        From a callback or another thread, on the server's process. In `on_round_end` the next round may be
        in training already: then that is the last.
        """
        self._interruption.ask()
