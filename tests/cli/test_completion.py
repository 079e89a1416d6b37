"""What shells complete: they ask the installed command themselves."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys

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
FISH_ASK = """
_MPIFEDLORA_COMPLETE=fish_source mpifedlora | source
while read --local line; complete -C $line; end
"""
# Control-X shows the line that is being edited, and empties it.
ZSH_ASK = r"""PS1=; unsetopt prompt_cr; bindkey -e; autoload -Uz compinit; compinit -u -D
eval "$(_MPIFEDLORA_COMPLETE=zsh_source mpifedlora)"
show() { print -r -- "<$BUFFER>"; BUFFER=; }; zle -N show; bindkey '^X' show; print '<'ready'>'
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


# Where a word is one to the shell, as it is to Zsh and fish.
WHOLE = {
    "mpifedlora do": "doctor",
    "mpifedlora plan --no": "--no-calibrate",
    "mpifedlora data fetch mini": "minilm",
    "mpifedlora run --set annealing.sch": "annealing.schedule=",
    "mpifedlora run a.toml --set annealing.cut=d": "annealing.cut=drop",
    "mpifedlora plan --set federation.method=fedi": "federation.method=fedit",
    "mpifedlora compare --out made --cs": "--csv",
}


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"there is no {shell}")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("programs")
    script = folder / "mpifedlora"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m mpifedlora "$@"\n')
    script.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "TERM": "dumb"}


def ask(environment: dict[str, str], *command: str, lines: str = "") -> list[str]:
    done = subprocess.run(
        command, input=lines, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@needs("bash")
def test_bash_completes_verbs_options_keys_values_and_names(environment: dict[str, str]) -> None:
    found = ask(environment, "bash", "--norc", "-c", ASK, lines="\n".join(CASES) + "\n")
    assert dict(zip(CASES, found, strict=True)) == CASES


@needs("fish")
def test_fish_completes_the_same(environment: dict[str, str]) -> None:
    found = ask(environment, "fish", "--no-config", "-c", FISH_ASK, lines="\n".join(WHOLE) + "\n")
    assert dict(zip(WHOLE, (line.split("\t")[0] for line in found), strict=True)) == WHOLE


@needs("zsh")
def test_zsh_completes_the_same_with_no_space_behind_a_key(environment: dict[str, str]) -> None:
    terminal, inside = os.openpty()
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=environment,
        start_new_session=True,
    )
    try:
        os.write(terminal, ZSH_ASK.encode())
        read_until(terminal, "<ready>")
        for line, completed in WHOLE.items():
            os.write(terminal, f"{line}\t\x18".encode())
            (shown,) = re.findall(r"<(mpifedlora [^<>]*)>", read_until(terminal, r"<mpifedlora [^<>]*>"))
            after = "" if completed.endswith("=") else " "
            assert shown == line.rpartition(" ")[0] + f" {completed}{after}"
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)
        os.close(inside)


def read_until(terminal: int, pattern: str) -> str:
    text = ""
    while not re.search(pattern, text):
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, f"{pattern} must be shown within a minute, got {text!r}"
        text += os.read(terminal, 4096).decode(errors="replace")
    return text


def test_keys_and_values_are_those_of_the_run_file() -> None:
    keys = setting_keys()
    assert {"federation.method", "lora.client_ranks", "faults.policy"} <= set(keys)
    tables = [field.annotation for field in RunConfig.model_fields.values()]
    assert len(keys) == sum(len(table.model_fields) for table in tables if table is not None)
    assert setting_values("transport.uplink_dtype") == ["float32", "bfloat16", "float16", "int8"]
    assert setting_values("no.such") == setting_values("lora.no_such") == []
