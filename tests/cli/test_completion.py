"""What shells complete: Bash itself asks the installed command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpifedlora.core.config import RunConfig
from mpifedlora.core.config_keys import setting_keys, setting_values
from mpifedlora.core.methods import METHODS

ASK = """
eval "$(_MPIFEDLORA_COMPLETE=bash_source mpifedlora)"
compopt() { true; }  # there is no line being edited
while IFS= read -r line; do
    COMPREPLY=(); IFS=' ' read -r -a COMP_WORDS <<< "$line"; COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    _mpifedlora_completion mpifedlora
    IFS=' '; echo "${COMPREPLY[*]}"
done
"""
CASES = {
    "mpifedlora do": "doctor",
    "mpifedlora plan --no": "--no-calibrate",
    "mpifedlora data fetch mini": "minilm",
    "mpifedlora run --set annealing.sch": "annealing.schedule=",
    "mpifedlora run a.toml --set annealing.cut = d": "drop",
    "mpifedlora plan --set federation.method =": " ".join(METHODS),
    "mpifedlora submit --set data.source = reuters-r5": "reuters-r52",
    "mpifedlora run --set lora.rank_max = ": "",
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no Bash")
def test_bash_completes_verbs_options_keys_values_and_names(tmp_path: Path) -> None:
    script = tmp_path / "mpifedlora"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m mpifedlora "$@"\n')
    script.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK],
        input="\n".join(CASES) + "\n",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert dict(zip(CASES, done.stdout.splitlines(), strict=True)) == CASES
    assert done.stderr == ""


def test_keys_and_values_are_those_of_the_run_file() -> None:
    keys = setting_keys()
    assert {"federation.method", "lora.client_ranks", "faults.policy"} <= set(keys)
    tables = [field.annotation for field in RunConfig.model_fields.values()]
    assert len(keys) == sum(len(table.model_fields) for table in tables if table is not None)
    assert setting_values("transport.uplink_dtype") == ["float32", "bfloat16", "float16", "int8"]
    assert setting_values("no.such") == setting_values("lora.no_such") == []
