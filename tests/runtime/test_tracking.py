"""Experiment trackers: what they hold is what results.h5 holds, and none of them can end a run."""

import struct

import numpy as np
import pytest
import support
from made_runs import make_row

from mpifedlora import Callback, Federation, read_results
from mpifedlora.core.sections import TrackingConfig
from mpifedlora.errors import ConfigError
from mpifedlora.io import trackers
from mpifedlora.runtime.tracking import metrics_of


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    return support.make_run_file(tmp_path_factory.mktemp("tracking"), "[federation]\nnum_rounds = 3\n")


def federation(run_file, out, tool):
    return Federation(run_file, overrides={"tracking.tool": tool, "tracking.project": "topics"}, out=out)


class StopAfterFirst(Callback):
    def on_start(self, run):
        self.run = run

    def on_round_end(self, row):
        self.run.stop()


def logged_by(run_file, out, tool):
    """Run two rounds, then the last; return the results."""
    first = federation(run_file, out, tool).run([StopAfterFirst()], progress=False)
    assert (first.status, len(first.rounds["round_num"])) == ("interrupted", 2)
    results = federation(run_file, out, tool).run(resume=True, progress=False)
    assert (results.status, results.events[-1].text) == ("finished", "resumed after round 2")
    return results


def expected(results):
    """Return (name, step) to value for every number of a run."""
    sent = np.cumsum(results.rounds["uplink_bytes"] + results.rounds["downlink_bytes"])
    found = {("bytes/sent_so_far", step): value for step, value in enumerate(sent.tolist(), 1)}
    for row in results.rows():
        found |= {(name, row.round_num): value for name, value in metrics_of(row, ()).items()}
    return found


def test_a_round_s_numbers_have_groups_and_none_is_nan():
    row = make_row(3, eval_metrics=(0.5, float("nan")))
    named = metrics_of(row, ("top_3", "rmse"))
    assert (named["eval/accuracy"], named["eval/top_3"]) == (row.eval_accuracy, 0.5)
    assert (named["bytes/uplink"], named["seconds/round"]) == (row.uplink_bytes, 10.0)
    assert (named["round/train_loss"], named["round/lora_rank_mean"]) == (row.train_loss, 14.0)
    assert not {"eval/rmse", "round/epsilon", "round/round_num", "round/stage"} & set(named)
    assert np.isfinite(list(named.values())).all()


@pytest.mark.parametrize(
    ("tool", "tools"),
    [("none", []), ("mlflow", ["mlflow"]), (["wandb", "mlflow", "wandb"], ["wandb", "mlflow"]), ([], [])],
)
def test_one_tool_or_several(tool, tools):
    assert TrackingConfig(tool=tool).tools == tools


def test_a_package_that_is_missing_is_told_before_anything_is_loaded(run_file, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("wandb_that_nobody_has", "wandb"))
    with pytest.raises(
        ConfigError, match=r'tracking.tool = "wandb" needs the package wandb, .* pip install wandb'
    ):
        federation(run_file, tmp_path / "run", ["tensorboard", "wandb"]).run(progress=False)
    assert not (tmp_path / "run").exists()


def records_of(file):
    """Yield what a TensorBoard event file holds; its framing is length, CRC, data, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event()
        event.ParseFromString(content[12 : 12 + length])
        yield event
        content = content[16 + length :]


class TestTensorBoard:
    def test_holds_what_the_results_hold(self, run_file, tmp_path):
        pytest.importorskip("tensorboardX")
        results = logged_by(run_file, tmp_path / "run", "tensorboard")
        files = sorted((tmp_path / "run" / "tracking" / "tensorboard").glob("events.*"))
        assert len(files) == 2
        values = [
            (event.step, value)
            for file in files
            for event in records_of(file)
            for value in event.summary.value
        ]
        found = {
            (value.tag, step): value.simple_value for step, value in values if not value.HasField("tensor")
        }
        wanted = expected(results)
        assert set(found) == set(wanted)
        for key, value in found.items():
            assert value == pytest.approx(wanted[key], rel=1e-6), key
        texts = {
            value.tag: value.tensor.string_val[0].decode() for _, value in values if value.HasField("tensor")
        }
        assert "| lora.rank_max | 4 |" in texts["configuration/text_summary"]
        assert texts["status/text_summary"] == "finished"

    def test_one_that_fails_is_warned_of_once_and_ends_nothing(self, run_file, tmp_path, capsys):
        pytest.importorskip("tensorboardX")
        out = tmp_path / "run"

        class Breaks(Callback):
            def on_round_end(self, row):
                if row.round_num == 1:
                    self.tracker._writer.close()
                    self.tracker._writer = None

        breaks, real = Breaks(), trackers._OPEN["tensorboard"]

        def opened(run):
            breaks.tracker = real(run)
            return breaks.tracker

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(trackers._OPEN, "tensorboard", opened)
            results = federation(run_file, out, "tensorboard").run([breaks])
        assert results.status == "finished"
        (event,) = [event for event in read_results(out).events if "tracking" in event.text]
        assert event.text.startswith("tracking by tensorboard has failed and ends here; the run goes on (")
        assert capsys.readouterr().out.count("warning: tracking by tensorboard has failed") == 1

    def test_one_that_cannot_begin_ends_nothing(self, run_file, tmp_path):
        pytest.importorskip("tensorboardX")
        settings = {"tracking.tool": "tensorboard", "federation.num_rounds": 1, "initiating.rounds": 0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trackers.Path, "mkdir", _refuse_tracking(trackers.Path.mkdir))
            results = Federation(run_file, overrides=settings, out=tmp_path / "run").run(progress=False)
        assert results.status == "finished"
        assert "No space left" in results.events[0].text


def _refuse_tracking(mkdir):
    def made(path, *args, **kwargs):
        if path.name == "tensorboard":
            raise OSError(28, "No space left on device")
        return mkdir(path, *args, **kwargs)

    return made


def test_mlflow_holds_what_the_results_hold(run_file, tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    results = logged_by(run_file, tmp_path / "run", "mlflow")
    store = (tmp_path / "run" / "tracking" / "mlflow").as_uri()
    client = tracking.MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("topics")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["lora.rank_max"] == "4"
    wanted = expected(results)
    for name in {name for name, _ in wanted}:
        for metric in client.get_metric_history(run.info.run_id, name):
            assert metric.value == pytest.approx(wanted.pop((name, metric.step)), rel=1e-12)
    assert wanted == {}


def wandb_records(content):
    """Yield the records of an offline run's file: LevelDB's log format after a head of 7 bytes."""
    position, block, parts = 7, 32768, b""
    while position + 7 <= len(content):
        left = block - position % block
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


def test_wandb_offline_holds_what_the_results_hold(run_file, tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    results = logged_by(run_file, tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run" / "tracking" / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    found, configured = {}, {}
    for file in files:
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            configured |= {item.key: item.value_json for item in record.run.config.update}
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if "/" in name:
                    found[name, record.history.step.num] = float(item.value_json)
    wanted = expected(results)
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-9), key
    assert configured["lora.rank_max"] == "4"
