"""One run from its run file to its results: every process starts here."""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mpifedlora.core.agreement import Status
from mpifedlora.core.config import RunConfig
from mpifedlora.errors import MpiFedLoraError, RunLost, WorkerLost
from mpifedlora.io.output_folder import CLIENT_STATES_FOLDER, RUN_FILE, FolderLock, check_output_folder
from mpifedlora.io.process import (
    end_in_time,
    end_with_launcher,
    starting_together,
    tell_when_terminated,
)
from mpifedlora.io.run_file import ResolvedRun, config_digest, read_run_file
from mpifedlora.runtime import setup
from mpifedlora.runtime.agreement import agree
from mpifedlora.runtime.callbacks import Callback, Outcome
from mpifedlora.runtime.data import FederatedData, read_data
from mpifedlora.runtime.gpu_buffers import DIRECT_MARK, choose_gpu_buffers
from mpifedlora.runtime.interruption import Interruption
from mpifedlora.runtime.method import check_parts, client_keeps_state, wire_format
from mpifedlora.runtime.resuming import Resumable, find_resumable
from mpifedlora.transport.base import EXIT_RESUMABLE, Endpoint

if TYPE_CHECKING:
    from mpifedlora.io.client_store import ClientStore
    from mpifedlora.runtime.checkpointing import Resumption
    from mpifedlora.runtime.setup import Replica
    from mpifedlora.runtime.worker import Worker
    from mpifedlora.transport.mpi import Communicator

EXIT_FAILED_ELSEWHERE = 2
_LONGEST_END_S = 60


@dataclass(frozen=True)
class Request:
    """What the command line, or a script, asks for.

    Args:
        resolve: returns the configuration, or says what is wrong with it.
        out: folder for the results.
        overwrite: whether an older run in `out` is replaced.
        resumes: whether the run in `out` goes on; where it has finished no round, it starts anew.
        lock: of `out`.
        interruption: what may end the run early.
        callbacks: told of the run, on the server.
        shows_progress: whether the terminal is one of them.
    """

    resolve: Callable[[], ResolvedRun]
    out: Path
    overwrite: bool
    resumes: bool
    lock: FolderLock
    interruption: Interruption
    callbacks: Sequence[Callback] = ()
    shows_progress: bool = True


def run(
    run_file: Path | None,
    overrides: Sequence[str],
    out: Path,
    overwrite: bool,
    comm: Communicator | None = None,
    *,
    resumes: bool = False,
) -> int:
    """Run a federation: all of it in one process, or this process's part of it under MPI.

    Args:
        run_file: TOML run file; None is that of the run in `out`.
        overrides: `section.key=value` texts.
        out: folder for the results.
        overwrite: whether an older run in `out` is replaced.
        comm: communicator of the federation; by default the whole job's, if MPI started it.
        resumes: whether the run in `out` goes on; where it has finished no round, it starts anew.

    Returns:
        Exit code; 85 where a signal or Slurm's time limit ended the run early. A failed set-up is
        raised on the server and a mere code on the workers, so that it is reported once.

    Raises:
        MpiFedLoraError: if the set-up failed, on the server's process.
    """
    out = Path(out).expanduser()
    resolve = partial(read_run_file, out / RUN_FILE if run_file is None else run_file, overrides)
    request = Request(resolve, out, overwrite, resumes, FolderLock(out), Interruption())
    return federate(request, comm).exit_code


def federate(request: Request, comm: Communicator | None = None) -> Outcome:
    """Do this process's part of a federation; see `run`."""
    setup.collect_rarely()
    setup.quiet_libraries()
    with request.interruption:
        try:
            return _run(request, comm)
        finally:
            request.lock.release()


def _run(request: Request, comm: Communicator | None) -> Outcome:
    endpoint = _connect(comm)
    request.interruption.is_server = endpoint.is_server
    advice = f"resume it with `mpifedlora run --resume --out {request.out}`"
    if comm is None and endpoint.process_names()[1:]:
        _end_with_the_job(endpoint, advice)
    try:
        (resolved, resumable), _ = agree(endpoint, lambda: _check(request, endpoint))
        endpoint.watch(resolved.config.faults.worker_timeout_s, advice)
        data = read_data(resolved.config, endpoint)
        replica, statuses = agree(endpoint, lambda: _build(request, resolved.config, data, endpoint))
        if client_keeps_state(resolved.config):
            agree(endpoint, lambda: _find_token(replica.memory.store, endpoint))
    except RunLost as error:
        endpoint.abort(f"error: {error}", EXIT_RESUMABLE)
        raise
    except MpiFedLoraError:
        if endpoint.is_server:
            raise
        return Outcome(EXIT_FAILED_ELSEWHERE)
    try:
        outcome = _take_part(request, resolved, resumable, replica, statuses, endpoint)
        endpoint.part()
        return outcome
    except (RunLost, WorkerLost) as error:
        endpoint.abort(f"error: {error}", EXIT_RESUMABLE)
        raise
    except Exception as error:
        endpoint.abort(_last_words(error))
        raise


def _end_with_the_job(endpoint: Endpoint, advice: str) -> None:
    """Outlive neither the launcher nor a job that somebody ends, and say how to go on."""
    end_in_time(_LONGEST_END_S)
    end_with_launcher(f"error: the MPI launcher has ended; {advice}", EXIT_RESUMABLE)
    if endpoint.is_server:
        tell_when_terminated(
            f"the job was ended from outside, or a process of it died (mpirun says which); {advice}"
        )


def _connect(comm: Communicator | None) -> Endpoint:
    from mpifedlora.transport import inprocess, mpi

    if comm is None and not mpi.is_launched():
        return inprocess.Alone()
    is_watched = comm is None and mpi.is_fault_tolerant()
    with starting_together("start it again") if is_watched else nullcontext():
        return mpi.connect(comm) or inprocess.Alone()


def _check(
    request: Request, endpoint: Endpoint
) -> tuple[tuple[ResolvedRun, Resumable | None], Mapping[str, str], str]:
    resolved, resumable = request.resolve(), None
    if endpoint.is_server:
        check_output_folder(request.out, overwrite=request.overwrite or request.resumes)
        if request.out.is_dir():
            request.lock.take()
        if request.resumes:
            resumable = find_resumable(request.out, resolved.config)
        setup.check_inputs(resolved.config)
    return (resolved, resumable), _digests(resolved.config), ""


def _build(
    request: Request, config: RunConfig, data: FederatedData, endpoint: Endpoint
) -> tuple[Replica, Mapping[str, str], str]:
    place, training = endpoint.place, config.training
    device = setup.choose_device(
        training.device, setup.num_visible_gpus(), place.worker_index, place.num_workers
    )
    setup.check_quantization(config.model.quantize, device)
    buffers = _gpu_buffers(config, device, endpoint)
    threads = setup.choose_threads(training.threads, place.num_cores, place.num_sharing_cores)
    setup.configure_torch(threads, device, is_deterministic=config.federation.reproducible)
    replica = setup.build_replica(config, data, device, request.out / CLIENT_STATES_FOLDER)
    check_parts(config, replica.model.shapes)
    if endpoint.is_server and client_keeps_state(config):
        replica.memory.store.write_token(secrets.token_hex(8))
    found = {"data": data.dataset.digest, "model": replica.model.digest()}
    described = setup.describe_device(device, threads)
    return replica, {**_digests(config), **found}, described + f", {DIRECT_MARK}" * (buffers == "direct")


def _gpu_buffers(config: RunConfig, device: str, endpoint: Endpoint) -> str:
    from mpifedlora.transport.mpi.gpu import is_gpu_aware

    requested, is_server = config.transport.gpu_buffers, endpoint.is_server
    return choose_gpu_buffers(requested, device, is_server=is_server, is_aware=is_gpu_aware)


def _find_token(store: ClientStore, endpoint: Endpoint) -> tuple[None, Mapping[str, str], str]:
    """Find what the server left in the folder of clients' states when it was built."""
    return None, {"folder for clients' states": store.read_token() or "one without the server's mark"}, ""


def _digests(config: RunConfig) -> dict[str, str]:
    return {"package version": version("mpifedlora"), "configuration": config_digest(config)}


def _take_part(
    request: Request,
    resolved: ResolvedRun,
    resumable: Resumable | None,
    replica: Replica,
    statuses: list[Status],
    endpoint: Endpoint,
) -> Outcome:
    from mpifedlora.runtime.federation import Start, conduct
    from mpifedlora.runtime.worker import serve
    from mpifedlora.transport import inprocess, mpi

    model = replica.model
    is_pinned = model.device.type == "cuda"
    config = resolved.config
    endpoint.open(
        model.shapes,
        config.federation.num_clients,
        wire_format(config),
        part_bytes=config.transport.chunk_bytes,
        is_pinned=is_pinned,
    )
    resumption = _recover(request, resumable, replica, endpoint)
    told = request.callbacks, request.shows_progress
    start = Start(request.lock, request.interruption, *told, resumable, resumption)
    if isinstance(endpoint, mpi.MpiWorker):
        is_direct = _gpu_buffers(config, str(model.device), endpoint) == "direct"
        worker = _worker(endpoint.worker_id, endpoint.num_workers, replica, config, is_direct=is_direct)
        serve(worker, endpoint)
        return Outcome(0)
    if isinstance(endpoint, mpi.MpiServer):
        return conduct(request.out, resolved, replica, endpoint, endpoint.library, statuses, start)
    own, _, device = _build(request, config, replica.data, endpoint)
    if resumption is not None:
        resumption.recover(own.model)
    alone = inprocess.InProcessTransport([_worker(0, 1, own, config)])
    both = [*statuses, Status(endpoint.place.host, {}, device=device)]
    return conduct(request.out, resolved, replica, alone, endpoint.library, both, start)


def _recover(
    request: Request, resumable: Resumable | None, replica: Replica, endpoint: Endpoint
) -> Resumption | None:
    """Bring a process's model to where the run goes on; only the server has read the checkpoint."""
    from mpifedlora.runtime.checkpointing import Resumption

    content = endpoint.share(resumable.content if resumable else b"") if request.resumes else b""
    if not content:
        return None
    resumption = Resumption.read(content)
    resumption.recover(replica.model)
    return resumption


def _worker(
    worker_id: int, num_workers: int, replica: Replica, config: RunConfig, *, is_direct: bool = False
) -> Worker:
    from mpifedlora.runtime.worker import Worker

    return Worker(
        worker_id,
        num_workers,
        replica,
        wire_format(config),
        reduce_dtype=config.transport.reduce_dtype,
        counts_examples=config.aggregation.weights == "examples",
        late_exponent=config.faults.late_exponent,
        is_direct=is_direct,
        round_deadline_s=config.faults.round_deadline_s,
    )


def _last_words(error: Exception) -> str:
    trace = "".join(traceback.format_exception(error)).strip()
    return f"{trace}\nerror: {error}\nthe run ends here; what was saved before is in its folder"
