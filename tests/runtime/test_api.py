"""Federations made by a script, and those who are told of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import support

import mpifedlora
from mpifedlora import Callback, Federation, MpiFedLoraError, RunConfig, read_results
from mpifedlora.errors import ConfigError
from mpifedlora.runtime import launch

ROOT = Path(__file__).parents[2]
TWO = {"federation.num_rounds": 2}


class Recorder(Callback):
    def __init__(self, stop_after=None):
        self.seen, self.stop_after = [], stop_after

    def on_start(self, run):
        self.run = run
        self.seen.append(("start", [row.round_num for row in run.rows]))

    def on_round_start(self, round_num, stage, lora_rank_mean):
        self.seen.append(("round", round_num, stage, lora_rank_mean))

    def on_round_end(self, row):
        self.seen.append(("end of round", row.round_num))
        if row.round_num == self.stop_after:
            self.run.stop()

    def on_warning(self, text):
        self.seen.append(("warning", text))

    def on_end(self, results):
        self.seen.append(("end", results.status))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    return support.make_run_file(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def by_command_line(run_file):
    out = run_file.parent / "by-command-line"
    assert launch.run(run_file, [], out, False) == 0
    return out


def tables_of(run_file):
    import tomllib

    return tomllib.loads(run_file.read_text())


def adapter_bytes(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


class TestPublicNames:
    def test_are_ten_and_all_there(self):
        assert len(mpifedlora.__all__) == 10
        for name in mpifedlora.__all__:
            assert getattr(mpifedlora, name) is not None
        assert dir(mpifedlora) == sorted(mpifedlora.__all__)
        with pytest.raises(AttributeError, match="no attribute 'Federaton'"):
            _ = mpifedlora.Federaton

    def test_are_all_in_the_documentation(self):
        headings = [line for line in (ROOT / "docs/api.md").read_text().splitlines() if line.startswith("#")]
        for name in mpifedlora.__all__:
            assert any(f"`{name}" in heading for heading in headings), name

    def test_importing_and_configuring_loads_no_torch(self, run_file):
        code = (
            "import sys; import mpifedlora as m; assert 'numpy' not in sys.modules\n"
            f"m.Federation({str(run_file)!r}, out='x'); m.read_results; m.Callback\n"
            "assert not {'torch', 'mpi4py', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


class TestConfiguration:
    def test_a_file_its_tables_and_its_models_are_the_same_run(self, run_file, tmp_path):
        overrides = {"lora.rank_max": 3, "lora.target_modules": ("query", "value")}
        by_file = Federation(run_file, overrides=overrides, out=tmp_path).config
        assert (by_file.lora.rank_max, by_file.lora.target_modules) == (3, ["query", "value"])
        tables = tables_of(run_file)
        tables["data"]["source"] = Path(tables["data"]["source"])
        tables["model"]["dropout"] = None
        tables["lora"]["rank_max"] = 3
        by_tables = Federation(tables, overrides={"lora.target_modules": ["query", "value"]}, out="x").config
        assert by_tables.model_copy(update={"model": by_file.model}) == by_file
        assert Federation(by_file, out="x").config == by_file

    def test_an_override_takes_its_rival_out(self, run_file):
        config = Federation(run_file, overrides={"training.local_epochs": 1}, out="x").config
        assert (config.training.local_epochs, config.training.local_steps) == (1, None)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"lora.rank_mx": 3}, r"override lora.rank_mx=3.*rank_max"),
            ({"lora.rank_max": "3"}, r'rank_max must be .*, got "3" \(override lora.rank_max=.3.\)'),
            ({"rank_max": 3}, r"must be section.key, got 'rank_max'"),
        ],
    )
    def test_mistakes_are_told_at_once(self, run_file, overrides, message):
        with pytest.raises(ConfigError, match=message):
            Federation(run_file, overrides=overrides, out="x")

    def test_mistakes_in_tables_name_the_table(self):
        with pytest.raises(MpiFedLoraError) as caught:
            Federation({"model": {"name": "minilm"}, "data": {"source": "x.csv", "alpha": -1}}, out="x")
        assert "alpha must be above 0, got -1 (the run's tables: [data])" in str(caught.value)

    def test_a_folder_without_a_run_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"the run file must exist, got .*run\.toml"):
            Federation(out=tmp_path)


class TestRun:
    def test_gives_the_command_line_s_bits_and_tells_all(self, run_file, by_command_line, tmp_path, capsys):
        recorder = Recorder()
        federation = Federation(run_file, out=tmp_path / "run")
        results = federation.run([recorder], progress=False)
        assert capsys.readouterr().out == ""
        assert adapter_bytes(federation.out) == adapter_bytes(by_command_line)
        stored = read_results(federation.out)
        assert (results.status, results.info.created) == ("finished", stored.info.created)
        for name, values in results.rounds.items():
            assert values.dtype == stored.rounds[name].dtype
            np.testing.assert_array_equal(values, stored.rounds[name])
        np.testing.assert_array_equal(results.clients["outcome"], stored.clients["outcome"])
        assert results.baselines == stored.baselines
        assert recorder.run.announcement[0].startswith("mpifedlora ")
        assert isinstance(recorder.run.config, RunConfig)
        told = [event for event in recorder.seen if event[0] != "round"]
        assert told == [("start", []), *[("end of round", n) for n in (1, 2, 3, 4)], ("end", "finished")]
        rounds = [event for event in recorder.seen if event[0] == "round"]
        assert rounds[0] == ("round", 1, "initiating", 4.0)
        assert [event[1] for event in rounds] == [1, 2, 3, 4]

    def test_stopped_by_a_callback_it_goes_on_as_if_it_never_was(
        self, run_file, by_command_line, tmp_path, capsys
    ):
        federation = Federation(run_file, out=tmp_path / "run")
        results = federation.run([Recorder(stop_after=1)])
        # Round 1 is told while round 2 trains, which is therefore the last.
        assert (results.status, results.rounds["round_num"].tolist()) == ("interrupted", [1, 2])
        assert (
            "interrupted after round 2 of 4; go on with: mpifedlora run --resume" in capsys.readouterr().out
        )
        recorder = Recorder()
        again = Federation(out=tmp_path / "run")
        assert again.config == federation.config
        results = again.run([recorder], resume=True, progress=False)
        assert (results.status, len(results.rounds["round_num"])) == ("finished", 4)
        assert recorder.seen[0] == ("start", [1, 2])
        assert adapter_bytes(again.out) == adapter_bytes(by_command_line)

    def test_stop_before_and_after_a_run_does_nothing(self, run_file, tmp_path):
        federation = Federation(run_file, overrides=TWO, out=tmp_path / "run")
        federation.stop()
        assert federation.run(progress=False).status == "finished"
        federation.stop()

    def test_a_folder_with_a_run_is_refused(self, run_file, by_command_line):
        before = adapter_bytes(by_command_line)
        with pytest.raises(ConfigError, match=r"which holds results\.h5"):
            Federation(run_file, out=by_command_line).run()
        assert adapter_bytes(by_command_line) == before

    def test_a_callback_that_raises_ends_a_run_that_can_go_on(self, run_file, by_command_line, tmp_path):
        class Raises(Recorder):
            def on_round_end(self, row):
                super().on_round_end(row)
                raise LookupError("mine")

            def on_end(self, results):
                super().on_end(results)
                raise LookupError("too late to matter")

        raises, other = Raises(), Recorder()
        federation = Federation(run_file, out=tmp_path / "run")
        with pytest.raises(LookupError, match="mine"):
            federation.run([raises, other], progress=False)
        assert raises.seen[-1] == other.seen[-1] == ("end", "failed")
        assert read_results(federation.out).status == "failed"
        assert federation.run(resume=True, progress=False).status == "finished"
        assert adapter_bytes(federation.out) == adapter_bytes(by_command_line)


SCRIPT = """
import sys
from mpifedlora import Callback, Federation

class Tell(Callback):
    def on_end(self, results):
        print("told", results.status, flush=True)

for num_rounds in (1, 2):
    rounds = {"federation.num_rounds": num_rounds}
    federation = Federation(sys.argv[1], overrides=rounds, out=f"{sys.argv[2]}/{num_rounds}")
    results = federation.run([Tell()], progress=False)
    if results:
        print("rounds", len(results.rounds["round_num"]), results.info.num_workers, flush=True)
try:
    Federation(sys.argv[1], out=sys.argv[2] + "/1").run()
except ValueError as error:
    print("refused", flush=True)
"""


@pytest.mark.slow
def test_the_same_script_on_every_process_makes_runs_one_after_another(run_file, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = f'. tests/mpi_env.sh && exec mpirun -n 2 "{sys.executable}" "$@"'
    arguments = [str(tmp_path / "script.py"), str(run_file), str(tmp_path / "runs")]
    done = subprocess.run(
        ["bash", "-c", command, "bash", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = done.stdout.splitlines()
    assert lines == ["told finished", "rounds 1 1", "told finished", "rounds 2 1", "refused"], done.stderr
