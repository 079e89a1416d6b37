"""Everything that the documents tell a reader to type: run, or at least read by the code that would run it.

Python runs. Run files are checked as `mpifedlora run` checks them. Commands of mpifedlora run where one
process on small files can do it, and are parsed where they need a cluster; of other programs, what this
repository decides is checked: scripts, options, targets, extras. What is not run is listed with the reason.
"""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import support
from click.testing import CliRunner

from mpifedlora.cli.main import main
from mpifedlora.io.run_file import resolve_run

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "slurm/*.md", "benchmarks/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)
LANGUAGES = ("python", "sh", "toml", "text")  # text: what a program prints, and drawings

# Verbs that need no cluster and no network, and end by themselves.
RUN_HERE = (
    "compare",
    "data list",
    "doctor",
    "export",
    "methods",
    "plan",
    "report",
    "results",
    "run",
    "version",
    "watch",
)
# Programs that are not ours, and whose arguments are no files of ours.
OTHERS = {
    **dict.fromkeys(
        ("cd", "chmod", "export", "mkdir", "printf", "cp", ".", "ls", "cat", "eval"), "the shell's own"
    ),
    **dict.fromkeys(("squeue", "scancel", "srun", "sinfo"), "Slurm's own, as its manual has it"),
    "module": "the site's own names",
    "apptainer": "cannot be installed where the tests run",
    "apt-get": "changes the machine",
    "git": "fetches",
    "ompi_info": "tells what is installed",
    "tensorboard": "serves until it is stopped",
    "mlflow": "serves until it is stopped",
    "wandb": "needs an account",
    "pytest": "runs other tests",
}
# Python that cannot run here, by page and the first line of the block.
NOT_RUN: dict[tuple[str, str], str] = {
    ("CONTRIBUTING.md", "def test_sum(comm):"): "a test over MPI; it is only compiled",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    opened: tuple[int, str, str] | None = None
    body: list[str] = []
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        fence = re.match(r"( *)```(.*)$", line)
        if fence and opened is None:
            opened, body = (number, fence[2].strip(), fence[1]), []
        elif fence and opened is not None:
            yield Block(page, opened[0], opened[1], "\n".join(body) + "\n")
            opened = None
        elif opened is not None:
            body.append(line.removeprefix(opened[2]))
    assert opened is None, f"{page}:{opened} must be closed"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def prose_of(page: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def with_language(language: str) -> list[Block]:
    """Return the blocks of one language."""
    return [block for block in BLOCKS if block.language == language]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language(page: str) -> None:
    assert [str(block) for block in BLOCKS if block.page == page and block.language not in LANGUAGES] == []


def test_what_is_not_run_exists() -> None:
    firsts = {(block.page, block.text.splitlines()[0]) for block in with_language("python")}
    assert set(NOT_RUN) <= firsts


# Where snippets run


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documents name: small, but real."""
    from mpifedlora.runtime import launch
    from mpifedlora.runtime.export import export

    folder = tmp_path_factory.mktemp("snippets")
    run_file = support.make_run_file(folder, "[federation]\nnum_rounds = 2\n[checkpoint]\nkeep = 2\n")
    for name in ("RUN.toml", "mine.toml"):
        shutil.copy(run_file, folder / name)
    shutil.copy(folder / "data.csv", folder / "posts.csv")
    for block in with_language("python"):
        if "def build(setup):" in block.text:
            (folder / "mytask.py").write_text(block.text)
    assert launch.run(run_file, [], folder / "runs/demo", False) == 0
    export(folder / "runs/demo", folder / "exported/adapter", merges=False)
    for name in ("runs/fedit", "runs/first", "DIR"):
        shutil.copytree(folder / "runs/demo", folder / name)
    return folder


@pytest.fixture
def inside(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(sandbox)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return sandbox


# Python


@pytest.mark.parametrize("page", sorted({block.page for block in with_language("python")}))
def test_python_runs(inside: Path, page: str) -> None:
    """One page is one session, from top to bottom; what a block makes anew may replace a run."""
    session: dict[str, Any] = {"__name__": "snippet"}
    for block in with_language("python"):
        if block.page == page:
            code = compile(block.text, str(block), "exec")
            if (page, block.text.splitlines()[0]) not in NOT_RUN:
                for made in re.findall(r'out=f?"(runs/[^"{]+)"', block.text):
                    shutil.rmtree(inside / made, ignore_errors=True)
                exec(code, session)


# Run files


def merged(tables: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of a block, with the two keys that a run file must have."""
    base: dict[str, Any] = {"model": {"name": "minilm"}, "data": {"source": "posts.csv"}}
    return {name: {**base.get(name, {}), **tables.get(name, {})} for name in {**base, **tables}}


@pytest.mark.parametrize("block", with_language("toml"), ids=str)
def test_run_files_are_accepted(block: Block, inside: Path) -> None:
    resolve_run(merged(support._parse(block.text)), {})


def test_the_run_file_of_the_readme_trains(inside: Path) -> None:
    from mpifedlora.runtime import launch

    (block,) = (each for each in with_language("toml") if each.page == "README.md")
    (inside / "readme.toml").write_text(block.text)
    small = [f"model.name={inside / 'model'}", "data.max_length=24"]
    small += ["federation.num_rounds=2", "federation.num_clients=2"]
    assert launch.run(inside / "readme.toml", small, inside / "runs/readme", True) == 0


# Commands


def commands_of(block: Block) -> list[list[str]]:
    """Return the commands of a block, each as its words, comments left out."""
    joined = re.sub(r"\$\([^)]*\)", "SUBSTITUTED", re.sub(r"\\\n\s*", "", block.text))
    found: list[list[str]] = []
    for line in joined.splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;") and words:
                found.append(words)
                words = []
            elif not set(word) <= set("|&;"):
                words.append(word)
    return [words for words in (without_variables(words) for words in found) if words]


def without_variables(words: list[str]) -> list[str]:
    """Return a command without the variables that are set for it, and without what it writes to."""
    while words and re.match(r"[A-Z][A-Za-z_0-9]*=", words[0]):
        words = words[1:]
    return words[: words.index(">")] if ">" in words else words


def without_launcher(words: list[str]) -> list[str]:
    """Return what mpirun starts."""
    assert "-n" in words, words
    return words[words.index("-n") + 2 :]


def parse(arguments: list[str]) -> str:
    """Let the command line's own parser read arguments, run nothing, and return the verb."""
    context = main.make_context("mpifedlora", list(arguments))
    command: click.Command = main
    words: list[str] = []
    rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, list(rest))
        assert found is not None, arguments
        words.append(str(name))
        context = found.make_context(name, list(rest), parent=context)
        command = found
        if isinstance(found, click.Group):
            rest = [*getattr(context, "_protected_args", []), *context.args]
    return " ".join(words)


def check_ours(arguments: list[str], folder: Path) -> None:
    """Parse a command of mpifedlora, and run it where it can run here."""
    verb = parse(arguments)
    runs_here = verb in RUN_HERE and not any(word.startswith("examples/") for word in arguments)
    if runs_here:
        if verb == "run" and "--resume" not in arguments:
            arguments = [*arguments, *([] if "--overwrite" in arguments else ["--overwrite"])]
        if verb == "export":
            shutil.rmtree(arguments[2], ignore_errors=True)  # it must be new
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code in (0, None), f"{arguments}: {done.output}{done.exception!r}"
    for word in arguments:
        if word.startswith("examples/"):
            assert (ROOT / word).exists(), arguments


def check_script(words: list[str]) -> None:
    """Check that a script of ours is there and knows its options."""
    place = ROOT / words[0]
    assert place.exists(), words
    known = place.read_text() + "".join(path.read_text() for path in ROOT.glob("benchmarks/*.py"))
    for word in words[1:]:
        if word.startswith("--") and place.suffix == ".py" and "benchmarks" in words[0]:
            assert word.partition("=")[0] in known, words


def extras() -> set[str]:
    """Return the extras that setup.cfg declares."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return set(parser["options.extras_require"])


def check_pip(words: list[str]) -> None:
    """Check that the extras of the package exist."""
    for word in words:
        for names in re.findall(r"(?:mpifedlora|^\.)\[([a-z,]+)\]", word):
            assert set(names.split(",")) <= extras(), words


def check(words: list[str], folder: Path) -> None:
    """Check one command."""
    program, *rest = words
    if program == "mpirun":
        program, *rest = without_launcher(words)
    program = program.removeprefix(".venv/bin/")
    if program.startswith("python"):
        if rest[:1] == ["-m"]:
            program, *rest = rest[1:]
        elif rest[0] == "-c":
            compile(rest[1], "snippet", "exec")
            return
        elif not (folder / rest[0]).exists() and "/" not in rest[0]:
            pytest.fail(f"{words}: a script of the reader's own must be in the sandbox")
        else:
            return check_script(rest)
    if program == "mpifedlora":
        check_ours(rest, folder)
    elif program == "make":
        for word in rest:
            assert "=" in word or word in targets(), words
    elif program == "pip":
        check_pip(rest)
    elif program == "benchmarks/run.sh":
        check_script([f"benchmarks/{rest[0]}", *rest[1:]])
    elif program == "sbatch":
        (script,) = [word for word in rest if word.endswith(".sbatch")]
        assert (ROOT / script).exists(), words
    elif (ROOT / program).is_file():
        pass
    else:
        assert program in {*OTHERS, "ruff", "mypy", "venv", "http.server", "mkdocs"}, (
            f"unknown program: {words}"
        )


def targets() -> set[str]:
    """Return the Makefile's targets."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", sorted({block.page for block in with_language("sh")}))
def test_commands(inside: Path, page: str) -> None:
    for block in with_language("sh"):
        if block.page == page:
            for words in commands_of(block):
                check(words, inside)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text(page: str) -> None:
    """In prose a command may be a part of one: verbs, options and targets must exist."""
    for code in re.findall(r"`([^`\n]+)`", prose_of(page)):
        words = code.split()
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets(), code
        if "mpifedlora" in words[:-1]:
            check_part(words[words.index("mpifedlora") + 1 :], code)


def check_part(words: list[str], code: str) -> None:
    """Check the verb and the options of a command that may be incomplete."""
    command: click.Command | None = main
    while isinstance(command, click.Group) and words and re.fullmatch(r"[a-z]+", words[0]):
        command = command.get_command(click.Context(main), words.pop(0))
        assert command is not None, code
    assert command is not None
    options = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in options | {"--help", "--install-completion"}, code


# Links


def anchor_of(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and the site make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^()\s]+)\)", prose_of(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), f"{page}: {target}"
        if anchor and place.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            assert anchor in [anchor_of(heading) for heading in headings], f"{page}: {target}"
