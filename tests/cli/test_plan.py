"""`mpifedlora plan` and `mpifedlora doctor` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import make_run_file

from mpifedlora.cli.main import main
from mpifedlora.runtime import doctor
from mpifedlora.runtime.findings import Finding


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"COLUMNS": "80"})


def test_plan_prints_text_or_json_and_draws(tmp_path: Path) -> None:
    run_file, figure = str(make_run_file(tmp_path)), tmp_path / "plan.png"
    text = invoke("plan", run_file, "--no-calibrate", "--workers", "2", "--plot", str(figure))
    assert text.exit_code == 0
    assert "4 clients on 2 workers (2 clients each)" in text.stdout
    assert max(map(len, text.stdout.splitlines())) <= 80
    assert figure.stat().st_size > 1000
    assert f"figure in {figure}" in text.stderr
    values = json.loads(
        invoke("plan", run_file, "--no-calibrate", "--json", "--set", "lora.rank_max=3").stdout
    )
    assert values["config"]["lora"]["rank_max"] == 3
    assert values["is_exact"] is True


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("wrong", 1)])
def test_doctors_exit_code_is_1_only_where_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, state: str, code: int
) -> None:
    def check() -> list[Finding]:
        return [Finding("a thing", state, "its text", "what to do" if state != "ok" else "")]  # type: ignore[arg-type]

    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python, check))
    shown, told = invoke("doctor"), invoke("doctor", "--json")
    assert (shown.exit_code, told.exit_code) == (code, code)
    assert f"{state:<6}a thing       its text" in shown.stdout
    assert ("-> what to do" in shown.stdout) == (state != "ok")
    values = json.loads(told.stdout)
    assert values["ok"] is (code == 0)
    assert [one["name"] for one in values["findings"]] == ["Python", "a thing"]


def test_a_check_that_breaks_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_odd() -> list[Finding]:
        raise RuntimeError("odd")

    monkeypatch.setattr(doctor, "CHECKS", (check_odd, doctor.check_python))
    broken, python = doctor.examine()
    assert (broken.name, broken.state) == ("odd", "note")
    assert "RuntimeError: odd" in broken.text
    assert python.state == "ok"
