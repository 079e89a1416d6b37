from __future__ import annotations

import dataclasses
import errno
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from killed_writers import INSTANTS, KilledWriters

from mpifedlora.core.screening import ABOVE_BOUND, ABSENT, NOT_CHOSEN, NOT_FINITE, USED
from mpifedlora.core.wire import FAILED, LATE
from mpifedlora.errors import CheckpointError
from mpifedlora.io.results import ResultsWriter, read_results
from mpifedlora.io.results_schema import COLUMNS, Baselines, RoundRow, RunInfo

NUM_CLIENTS, MODULES = 3, ("layer.0.query", "layer.0.value")
ROOT = str(Path(__file__).parents[2])
FORMAT_PAGE = Path(ROOT, "docs", "results-format.md")


def make_info(**changes: Any) -> RunInfo:
    values: dict[str, Any] = {
        "package_version": "0.1.0",
        "config": '{"lora": {"rank_max": 16}}',
        "method": "sa-fedlora",
        "model": "minilm",
        "dataset": "20newsgroups",
        "num_clients": NUM_CLIENTS,
        "num_workers": 2,
        "seed": 2**32 - 1,
        "mpi_library": "in process",
        "survives_lost_workers": True,
        "devices": ("cpu", "cuda:0", "cuda:1"),
        "eval_model": "personal",
        "is_private": False,
        "reproducible": True,
        "collect": "gather in parts",
        "uplink_dtype": "int8",
        "downlink_dtype": "bfloat16",
        "gpu_buffers": "staged",
        "startup_s": 12.25,
        "module_names": MODULES,
        "label_names": ("sport", "Вибори"),
        "metric_names": ("perplexity",),
        "label_table": np.arange(NUM_CLIENTS * 2).reshape(NUM_CLIENTS, 2),
    }
    return RunInfo(**(values | changes))


MEASURED = ("num_evaluated", "eval_loss", "eval_accuracy", "eval_macro_f1")


def make_row(round_num: int = 1, **changes: Any) -> RoundRow:
    values: dict[str, Any] = {}
    shapes: dict[str, Any] = {
        "int64": round_num,
        "float64": round_num / 2,
        "bool": True,
        "S16": "used",
    }
    for column in COLUMNS:
        if column.axis == "clients":
            values[column.name] = np.full(NUM_CLIENTS, shapes[column.dtype], column.dtype)
        elif column.axis == "metrics":
            values[column.name] = (round_num / 2,)
        elif not column.axis:
            values[column.name] = shapes[column.dtype]
    return RoundRow(**(values | {"stage": "annealing", "module_ranks": (round_num, 2)} | changes))


def assert_same(one: RoundRow, other: RoundRow) -> None:
    for column in COLUMNS:
        got, wanted = getattr(one, column.name), getattr(other, column.name)
        np.testing.assert_array_equal(got, wanted, column.name)
        assert np.asarray(got).dtype.kind == np.asarray(wanted).dtype.kind, column.name


def write_rounds(path: Path, count: int) -> ResultsWriter:
    writer = ResultsWriter(path, make_info())
    for round_num in range(1, count + 1):
        writer.add(make_row(round_num))
    writer.write()
    return writer


class TestRoundTrip:
    def test_run_info_comes_back(self, tmp_path: Path) -> None:
        info = make_info()
        ResultsWriter(tmp_path / "results.h5", info).write()
        back = read_results(tmp_path / "results.h5").info
        np.testing.assert_array_equal(back.label_table, info.label_table)
        for info_field in dataclasses.fields(RunInfo):
            if info_field.name != "label_table":
                got, wanted = getattr(back, info_field.name), getattr(info, info_field.name)
                assert (got, type(got)) == (wanted, type(wanted)), info_field.name

    def test_what_no_client_was_measured_by_is_absent_and_read_as_nan(self, tmp_path: Path) -> None:
        writer = ResultsWriter(tmp_path / "results.h5", make_info())
        nothing: dict[str, Any] = {f"client_{name}": None for name in MEASURED}
        writer.add(make_row(1, **nothing))
        writer.write()
        with h5py.File(tmp_path / "results.h5") as file:
            assert not set(MEASURED) & set(file["clients"])
        back = read_results(tmp_path / "results.h5")
        assert back.clients["num_evaluated"].tolist() == [[0] * NUM_CLIENTS]
        assert np.isnan(back.clients["eval_accuracy"]).all()
        resumed = ResultsWriter(tmp_path / "resumed.h5", make_info(), back.rows())
        resumed.write()
        with h5py.File(tmp_path / "resumed.h5") as file:
            assert not set(MEASURED) & set(file["clients"])
        resumed.add(make_row(2))
        resumed.write()
        back = read_results(tmp_path / "resumed.h5")
        assert back.clients["eval_loss"][1].tolist() == [1.0] * NUM_CLIENTS
        assert np.isnan(back.clients["eval_loss"][0]).all()

    def test_a_start_of_unknown_length_is_nan(self, tmp_path: Path) -> None:
        ResultsWriter(tmp_path / "results.h5", make_info(startup_s=math.nan)).write()
        assert math.isnan(read_results(tmp_path / "results.h5").info.startup_s)

    def test_plain_h5py_sees_the_documented_names(self, tmp_path: Path) -> None:
        write_rounds(tmp_path / "results.h5", 3)
        with h5py.File(tmp_path / "results.h5") as file:
            assert (file.attrs["format_version"], file.attrs["status"]) == (5, "running")
            assert file["rounds/uplink_bytes"].shape == (3,)
            assert file["rounds/stage"][0] == b"annealing"
            assert file["rounds/module_ranks"].shape == (3, 2)
            assert list(file["rounds/module_ranks"].attrs["module_names"]) == list(MODULES)
            names = {"num_examples", "train_loss", "train_s", "participated", "outcome"}
            assert set(file["clients"]) == {*names, *MEASURED}
            assert file["rounds/eval_metrics"][:].tolist() == [[0.5], [1.0], [1.5]]
            assert list(file["rounds/eval_metrics"].attrs["metric_names"]) == ["perplexity"]
            assert file["clients/outcome"].shape == (3, NUM_CLIENTS)
            assert file["clients/outcome"][0].tolist() == [b"used"] * NUM_CLIENTS
            assert file["rounds/epsilon"][:].tolist() == [0.5, 1.0, 1.5]
            assert (file.attrs["eval_model"], file.attrs["is_private"]) == ("personal", False)
            names = ("collect", "uplink_dtype", "downlink_dtype", "gpu_buffers", "startup_s")
            expected = ["gather in parts", "int8", "bfloat16", "staged", 12.25]
            assert [file.attrs[name] for name in names] == expected
            assert file["clients/participated"].shape == (3, NUM_CLIENTS)
            assert file["clients/participated"].dtype == np.bool_

    def test_outcomes_are_text_to_a_reader(self, tmp_path: Path) -> None:
        writer = ResultsWriter(tmp_path / "results.h5", make_info())
        writer.add(make_row(client_outcome=np.array([USED, ABOVE_BOUND, ABSENT], "S16")))
        writer.write()
        outcome = read_results(tmp_path / "results.h5").clients["outcome"]
        assert outcome.tolist() == [["used", "above bound", "absent"]]

    def test_every_outcome_fits_into_its_column(self) -> None:
        assert np.array(OUTCOMES, "S16").astype("U").tolist() == list(OUTCOMES)

    def test_no_round_yet(self, tmp_path: Path) -> None:
        write_rounds(tmp_path / "results.h5", 0)
        back = read_results(tmp_path / "results.h5")
        assert back.rows() == []
        assert back.rounds["module_ranks"].shape == (0, 2)
        assert back.clients["train_loss"].shape == (0, NUM_CLIENTS)
        assert back.baselines is None

    def test_whole_model_run_has_neither_modules_nor_labels(self, tmp_path: Path) -> None:
        info = make_info(module_names=(), label_names=(), label_table=np.zeros((NUM_CLIENTS, 0), np.int64))
        writer = ResultsWriter(tmp_path / "results.h5", info)
        writer.add(make_row(module_ranks=()))
        writer.write()
        back = read_results(tmp_path / "results.h5")
        assert back.rounds["module_ranks"].shape == (1, 0)
        assert (back.info.label_names, back.info.label_table.shape) == ((), (NUM_CLIENTS, 0))

    def test_status_and_baselines(self, tmp_path: Path) -> None:
        writer = write_rounds(tmp_path / "results.h5", 1)
        baselines = Baselines(
            sent_bytes=25,
            full_model_bytes=1000,
            fixed_rank_bytes=20,
            sent_values=5,
            full_model_values=0,
            fixed_rank_values=10,
        )
        writer.set_baselines(baselines)
        writer.set_status("finished")
        writer.write()
        back = read_results(tmp_path / "results.h5")
        assert back.status == "finished"
        assert back.baselines is not None
        np.testing.assert_equal(vars(back.baselines), vars(baselines))
        with h5py.File(tmp_path / "results.h5") as file:
            kept = file["baselines"].attrs
            assert kept["reduction_vs_full_model"] == 0.975
            assert kept["reduction_vs_fixed_rank"] == -0.25
            assert math.isnan(kept["values_reduction_vs_full_model"])
            assert kept["values_reduction_vs_fixed_rank"] == 0.5

    def test_thousands_of_labels_and_odd_text_fit(self, tmp_path: Path) -> None:
        labels = tuple(f"label {i}" for i in range(9000))
        table = np.zeros((NUM_CLIENTS, len(labels)), np.int64)
        info = make_info(label_names=labels, label_table=table, config="x" * 200_000, model="m\0\udcff")
        ResultsWriter(tmp_path / "results.h5", info).write()
        back = read_results(tmp_path / "results.h5").info
        assert (back.label_names, back.config, back.model) == (labels, info.config, "m\ufffd?")

    def test_a_reused_array_does_not_change_a_row_that_was_added(self, tmp_path: Path) -> None:
        buffer = np.zeros(NUM_CLIENTS)
        writer = ResultsWriter(tmp_path / "results.h5", make_info())
        writer.add(make_row(client_train_loss=buffer))
        buffer += 7
        assert writer.rows[0].client_train_loss.tolist() == [0, 0, 0]


OUTCOMES = (ABSENT, USED, NOT_FINITE, ABOVE_BOUND, NOT_CHOSEN, FAILED, LATE)
floats = st.floats(width=64)
counts = st.integers(0, 2**63 - 1)
by_kind: dict[tuple[str, str], st.SearchStrategy[Any]] = {
    ("int64", ""): counts,
    ("float64", ""): floats,
    ("S16", ""): st.sampled_from(["initiating", "annealing"]),
    ("float64", "metrics"): st.tuples(floats),
    ("int32", "modules"): st.tuples(*[st.integers(0, 2**31 - 1)] * len(MODULES)),
    ("int64", "clients"): st.lists(counts, min_size=NUM_CLIENTS, max_size=NUM_CLIENTS).map(np.array),
    ("float64", "clients"): st.lists(floats, min_size=NUM_CLIENTS, max_size=NUM_CLIENTS).map(np.array),
    ("bool", "clients"): st.lists(st.booleans(), min_size=NUM_CLIENTS, max_size=NUM_CLIENTS).map(np.array),
    ("S16", "clients"): st.lists(st.sampled_from(OUTCOMES), min_size=NUM_CLIENTS, max_size=NUM_CLIENTS).map(
        lambda outcomes: np.array(outcomes, "S16")
    ),
}
any_row = st.builds(RoundRow, **{c.name: by_kind[c.dtype, c.axis] for c in COLUMNS})


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(any_row, max_size=4))
def test_any_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[RoundRow]) -> None:
    path = tmp_path_factory.mktemp("rows") / "results.h5"
    rows = [dataclasses.replace(row, round_num=i) for i, row in enumerate(rows, start=1)]
    writer = ResultsWriter(path, make_info())
    for row in rows:
        writer.add(row)
    writer.write()
    back = read_results(path).rows()
    assert len(back) == len(rows)
    for one, other in zip(back, rows, strict=True):
        assert_same(one, other)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"round_num": 2}, "round_num must be above"),
            ({"stage": "warm-up"}, "stage must be one of initiating, annealing"),
            ({"module_ranks": (1,)}, r"module_ranks of round 3 must have shape \(2,\), got \(1,\)"),
            ({"client_train_s": np.zeros(2)}, "client_train_s of round 3"),
            ({"client_outcome": np.zeros(4, "S16")}, "client_outcome of round 3"),
            ({"train_loss": np.zeros(2)}, "train_loss of round 3"),
        ],
    )
    def test_a_row_that_does_not_fit(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        writer = write_rounds(tmp_path / "results.h5", 2)
        with pytest.raises(ValueError, match=message):
            writer.add(make_row(**({"round_num": 3} | changes)))
        assert len(writer.rows) == 2

    def test_unknown_status(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="running, interrupted, finished, failed"):
            write_rounds(tmp_path / "results.h5", 1).set_status("done")  # type: ignore[arg-type]

    def test_label_table_of_another_shape(self) -> None:
        with pytest.raises(ValueError, match="label_table must have shape"):
            make_info(label_table=np.zeros((1, 2), np.int64))

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"must hold results\.h5, got .*; name the --out"):
            read_results(tmp_path / "results.h5")

    @pytest.mark.parametrize("keep", [0, 7, 0.3, 0.9, 0.999])
    def test_truncated_file(self, tmp_path: Path, keep: float) -> None:
        path = tmp_path / "results.h5"
        write_rounds(path, 3)
        size = path.stat().st_size
        os.truncate(path, int(keep if keep == 7 else keep * size))
        with pytest.raises(CheckpointError, match="must be a complete file"):
            read_results(path)

    def test_foreign_older_and_newer_files(self, tmp_path: Path) -> None:
        path = tmp_path / "results.h5"
        with h5py.File(path, "w") as file:
            file["x"] = 1
        with pytest.raises(CheckpointError, match="another HDF5 file"):
            read_results(path)
        for version in (4, 6):
            with h5py.File(path, "a") as file:
                file.attrs["format_version"] = version
            with pytest.raises(CheckpointError, match=f"must be 5, got {version}"):
                read_results(path)

    @pytest.mark.parametrize("name", ["rounds/uplink_bytes", "clients", "label_table"])
    def test_file_without_a_part(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / "results.h5"
        write_rounds(path, 2)
        with h5py.File(path, "a") as file:
            del file[name]
        with pytest.raises(CheckpointError, match="must be a complete file"):
            read_results(path)


def results_writer(path: Path) -> Callable[[int], None]:
    writer = ResultsWriter(path, make_info())

    def write(round_num: int) -> None:
        writer.add(make_row(round_num))
        writer.write()

    return write


def assert_complete(path: Path, at_least: int) -> None:
    with h5py.File(path) as file:
        count = len(file["rounds/round_num"])
        assert count >= at_least
        numbers = np.arange(1, count + 1)
        for column in COLUMNS:
            assert column.path in file or column.is_optional
            assert len(file.get(column.path, numbers)) == count, column.path
        np.testing.assert_array_equal(file["rounds/round_num"], numbers)
        np.testing.assert_array_equal(file["rounds/train_loss"], numbers / 2)
        np.testing.assert_array_equal(file["clients/num_examples"][:, 2], numbers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_instant_the_file_reads_and_holds_every_finished_round(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    write_rounds(path, 0)
    writers, chance = KilledWriters(__file__, "results_writer(path)", path), random.Random(0)
    try:
        for instant in INSTANTS:
            before = path.stat().st_ino
            written = writers.run_until_killed(instant, chance.uniform(0, 0.06))
            assert_complete(path, written)
            if instant in ("half-written", "before-replace"):
                assert len(list(tmp_path.iterdir())) == 2
                assert path.stat().st_ino == before
    finally:
        writers.end()
    ResultsWriter(path, make_info())
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_beside_the_writer_never_fails(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    writer = write_rounds(path, 0)
    ended = threading.Event()

    def write_many() -> None:
        for round_num in range(1, 16):
            writer.add(make_row(round_num))
            writer.write()
        ended.set()

    thread = threading.Thread(target=write_many)
    thread.start()
    seen = [0]
    while not ended.is_set():
        rounds = read_results(path).rounds
        assert {len(values) for values in rounds.values()} == {len(rounds["round_num"])}
        seen.append(len(rounds["round_num"]))
        time.sleep(0.001)
    thread.join()
    assert seen == sorted(seen)
    assert len(read_results(path).rows()) == 15


class TestTemporaries:
    def name(self, path: Path, host: str, pid: int) -> Path:
        return path.with_name(f".{path.name}.{host}.{pid}.00ff.tmp")

    def test_only_those_of_dead_writers_are_removed(self, tmp_path: Path) -> None:
        path, here = tmp_path / "results.h5", os.uname().nodename
        ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
        dead = [
            self.name(path, here, int(ended.stdout)),
            self.name(path, here, os.getpid()),
            self.name(path, "other.node", os.getppid()),
            path.with_name(".results.h5.odd.tmp"),
        ]
        kept = [self.name(path, here, os.getppid()), tmp_path / ".other.h5.a.1.b.tmp", tmp_path / "notes.tmp"]
        for file in dead + kept:
            file.write_text("")
        ResultsWriter(path, make_info())
        assert sorted(tmp_path.iterdir()) == sorted(kept)

    def test_a_link_is_followed_and_a_chdir_changes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "real").mkdir()
        link = tmp_path / "results.h5"
        link.symlink_to(tmp_path / "real" / "r.h5")
        monkeypatch.chdir(tmp_path)
        writer = ResultsWriter("results.h5", make_info())
        monkeypatch.chdir("/")
        writer.write()
        assert link.is_symlink()
        assert read_results(link).rows() == []
        assert (tmp_path / "real" / "r.h5").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


FULL_DISK = """
import resource, sys
sys.path[:0] = sys.argv[2:]
from test_results import *
path = Path(sys.argv[1])
writer = write_rounds(path, 2)
if "limit" in path.name:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
else:
    filler = open(path.with_name("filler"), "wb", buffering=0)
    with pytest.raises(OSError):
        while filler.write(bytes(4096)):
            pass
writer.add(make_row(3))
for _ in range(2):
    with pytest.raises(OSError, match=path.name) as caught:
        writer.write()
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG), caught.value
    assert isinstance(caught.value, CheckpointError)
    assert len(read_results(path).rows()) == 2
    assert not list(path.parent.glob(".*.tmp"))
if "limit" in path.name:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
else:
    filler.truncate(0)
writer.write()
assert len(read_results(path).rows()) == 3
"""


def run_full_disk(path: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    folders = [str(Path(__file__).parent), str(Path(ROOT, "tests")), ROOT]
    command = [*prefix, sys.executable, "-c", FULL_DISK, str(path), *folders]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


class TestDiskRefuses:
    def test_file_size_limit(self, tmp_path: Path) -> None:
        done = run_full_disk(tmp_path / "limit.h5")
        assert done.returncode == 0, done.stderr

    def test_full_disk(self, tmp_path: Path) -> None:
        # In a mount namespace of its own: nothing stays mounted, whatever happens.
        script = 'mount -t tmpfs -o size=256k tmpfs "$0" && exec "$@"'
        private = ["unshare", "-m", "sh", "-c", script, str(tmp_path)]
        if (
            shutil.which("unshare") is None
            or subprocess.run([*private, "true"], capture_output=True).returncode
        ):
            pytest.skip("mounting a small tmpfs needs root")
        done = run_full_disk(tmp_path / "results.h5", *private)
        assert done.returncode == 0, done.stderr

    def test_folder_removed_and_restored(self, tmp_path: Path) -> None:
        path = tmp_path / "run" / "results.h5"
        path.parent.mkdir()
        writer = write_rounds(path, 1)
        shutil.rmtree(path.parent)
        with pytest.raises(OSError, match="No such file or directory") as caught:
            writer.write()
        assert caught.value.errno == errno.ENOENT
        assert str(path) in str(caught.value)
        assert ".tmp" not in str(caught.value)
        path.parent.mkdir()
        writer.write()
        assert len(read_results(path).rows()) == 1

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_late_failure_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        writer = write_rounds(tmp_path / "results.h5", 1)
        writer.add(make_row(2))

        def refuse(*_: Any) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        with monkeypatch.context() as patch:
            patch.setattr(os, step, refuse)
            with pytest.raises(OSError, match="quota"):
                writer.write()
        assert [path.name for path in tmp_path.iterdir()] == ["results.h5"]
        assert len(read_results(tmp_path / "results.h5").rows()) == 1

    def test_an_interrupt_removes_the_temporary_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ResultsWriter(tmp_path / "results.h5", make_info()).write()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
    def test_a_file_system_that_cannot_sync_folders(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        real = os.fsync

        def sync_files_only(descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(code, "folders cannot be synced")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", sync_files_only)
        write_rounds(tmp_path / "results.h5", 1)


def test_the_format_page_names_everything() -> None:
    page = FORMAT_PAGE.read_text(encoding="utf-8")
    names = [column.path.split("/")[1] for column in COLUMNS] + ["status"]
    names += [entry.name for kind in (RunInfo, Baselines) for entry in dataclasses.fields(kind)]
    assert [name for name in names if f"`{name}`" not in page] == []
