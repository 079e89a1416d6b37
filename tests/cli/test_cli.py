from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mpifedlora.cli.main import VERBS, entry, main
from mpifedlora.core.method_config import default_of
from mpifedlora.core.methods import METHODS
from mpifedlora.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "mpi4py", "transformers", "peft", "h5py", "numpy", "pydantic")

Launch = Callable[[Path, Sequence[str], Path, bool], int]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def fake(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """Put a stand-in under a module's name, as `import` and `from ... import` find it."""
    package, _, name = module.rpartition(".")
    __import__(package)
    stand_in = SimpleNamespace(**functions)
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(sys.modules[package], name, stand_in, raising=False)


def run_entry(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["mpifedlora", *arguments])
    with pytest.raises(SystemExit) as caught:
        entry()
    return caught.value.code


def launch_with(monkeypatch: pytest.MonkeyPatch, run: Launch) -> int | str | None:
    fake(monkeypatch, "mpifedlora.runtime.launch", run=run)
    return run_entry(monkeypatch, "run", "a.toml", "--out", "b")


def failing_with(error: BaseException) -> Launch:
    def run(run_file: Path, overrides: Sequence[str], out: Path, overwrite: bool, *, resumes: bool) -> int:
        raise error

    return run


# Help


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS), ["data", "list"], ["data", "fetch"]])
def test_help_has_a_one_line_example(verb: list[str]) -> None:
    result = invoke(*verb, "--help")
    assert result.exit_code == 0
    lines = result.output.rstrip().splitlines()
    assert lines[-2].strip() == "Example:"
    assert " ".join(["mpifedlora", *verb]) in lines[-1]


def test_the_group_lists_its_verbs_in_order() -> None:
    output = invoke("--help").output
    places = [output.index(f"\n  {verb} ") for verb in VERBS]
    assert places == sorted(places)


def test_unknown_verb() -> None:
    result = invoke("runn")
    assert result.exit_code == 2
    assert "runn" in result.output


# run


def test_run_hands_everything_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def run(run_file: Path, overrides: Sequence[str], out: Path, overwrite: bool, *, resumes: bool) -> int:
        calls.append((run_file, tuple(overrides), out, overwrite, resumes))
        return 85

    fake(monkeypatch, "mpifedlora.runtime.launch", run=run)
    result = invoke("run", "a.toml", "--out", "b", "--set", "x.y=1", "--set", "x.z=[1,2]", "--overwrite")
    assert result.exit_code == 85
    assert calls == [(Path("a.toml"), ("x.y=1", "x.z=[1,2]"), Path("b"), True, False)]
    assert invoke("run", "a.toml", "--out", "b").exit_code == 85
    assert calls[-1] == (Path("a.toml"), (), Path("b"), False, False)
    assert invoke("run", "--resume", "--out", "b").exit_code == 85
    assert calls[-1] == (None, (), Path("b"), False, True)
    assert invoke("run", "files/a.toml", "--resume").exit_code == 85
    assert calls[-1] == (Path("files/a.toml"), (), Path("runs/a"), False, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--resume"],
        ["run", "a.toml", "--out"],
        ["run", "--out", "b"],
        ["run", "a.toml", "--out", "b", "--resume", "--overwrite"],
    ],
)
def test_run_needs_a_file_and_a_folder(arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2


# data


def test_data_list(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [
        ("20newsgroups", "data", "posts", True, Path("/cache/20newsgroups")),
        ("minilm", "model", "sentence encoder", False, Path("/cache/minilm")),
    ]
    fake(monkeypatch, "mpifedlora.io.data_fetch", available=lambda: sources)
    assert [line.split() for line in invoke("data", "list").output.splitlines()] == [
        ["20newsgroups", "data", "fetched", "posts"],
        ["/cache/20newsgroups"],
        ["minilm", "model", "not", "fetched", "sentence", "encoder"],
    ]


def test_data_list_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MPIFEDLORA_CACHE", str(tmp_path))
    sources = {one["name"]: one for one in json.loads(invoke("data", "list", "--json").output)}
    assert sources["20newsgroups"]["present"] is False
    assert sources["20newsgroups"]["path"] == str(tmp_path / "20newsgroups")


def test_data_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, say: Callable[[str], None]) -> Path:
        say(f"{name} is in place")
        return Path("/cache") / name

    fake(monkeypatch, "mpifedlora.io.data_fetch", fetch=fetch)
    assert invoke("data", "fetch", "a", "b").output == "a is in place\nb is in place\n"
    assert invoke("data", "fetch").exit_code == 2


# methods, version


def test_methods_table_has_every_switch_unlike_the_defaults() -> None:
    output = invoke("methods").output
    for method in METHODS.values():
        assert method.title in output
        assert method.paper in output
    blocks = output.split("\n\n")
    assert [block.split()[0] for block in blocks] == list(METHODS)
    for block, method in zip(blocks, METHODS.values(), strict=True):
        shown = " ".join(block.split())
        for key, value in {**method.settings, **method.defaults}.items():
            assert (f"{key} = {json.dumps(value)}" in shown) == (value != default_of(key))
        assert max(map(len, block.splitlines())) <= 110
    assert "training.control_variates = true" in output
    assert "default training.mu = 0.01" in output


def test_methods_as_json() -> None:
    methods = json.loads(invoke("methods", "--json").output)
    assert [method["name"] for method in methods] == list(METHODS)
    assert methods[3]["settings"]["training.control_variates"] is True
    assert methods[2]["defaults"] == {"training.mu": 0.01}


def test_version_as_json() -> None:
    found = json.loads(invoke("version", "--json").output)
    lines = invoke("version", "--verbose").output.splitlines()
    assert [[name, version or "not"] for name, version in found.items()] == [
        line.split()[:2] for line in lines
    ]
    assert found["torch"].startswith("2.")


def test_version() -> None:
    lines = invoke("version", "--verbose").output.splitlines()
    names = ["mpifedlora", "Python", "torch", "mpi4py", "peft", "transformers", "h5py"]
    assert [line.split()[0] for line in lines] == names
    assert lines[:2] == invoke("version").output.splitlines()
    assert lines[1].split()[1] == sys.version.split()[0].rstrip("+")


# Exit codes


def test_an_error_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch_with(monkeypatch, failing_with(ConfigError("a must hold, got b (c); do d"))) == 2
    assert capsys.readouterr() == ("", "error: a must hold, got b (c); do d\n")


def test_several_errors_are_lined_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # CheckpointError is an OSError too, which click looks at on its own account.
    assert launch_with(monkeypatch, failing_with(CheckpointError("one\ntwo"))) == 2
    assert capsys.readouterr().err == "error: one\n       two\n"


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_with(monkeypatch, failing_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_other_errors_keep_their_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "mpifedlora.runtime.launch", run=failing_with(ZeroDivisionError()))
    monkeypatch.setattr(sys, "argv", ["mpifedlora", "run", "a.toml", "--out", "b"])
    with pytest.raises(ZeroDivisionError):
        entry()


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["methods"], 0), (["run", "--bad"], 2), (["zzz"], 2)]
)
def test_exit_codes_without_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    assert run_entry(monkeypatch, *arguments) == code
    assert "Traceback" not in capsys.readouterr().err


# Real processes


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["version", "--verbose"], ["methods"]])
def test_light_verbs_load_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from mpifedlora.cli.main import entry\n"
        f"sys.argv = ['mpifedlora', *{arguments!r}]\n"
        "try:\n    entry()\n"
        f"finally:\n    print('loaded:', *({HEAVY!r} & sys.modules.keys()))\n"
    ).replace(repr(HEAVY), repr(set(HEAVY)))
    done = run_python("-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    # `methods` compares with the run file's defaults, which pydantic's models hold (0.2 s).
    loaded = "loaded: pydantic" if arguments == ["methods"] else "loaded:"
    assert done.stdout.splitlines()[-1] == loaded


def test_bad_input_of_a_real_process() -> None:
    done = run_python("-m", "mpifedlora", "data", "fetch", "20newsgroup")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "20newsgroups" in done.stderr
