"""Hostile files: never a hang, an error that is not ours, a write elsewhere, or code that is run.

`make fuzz` tries many more than the few hundred of an ordinary run, and tells how many. Where a library might
crash (HDF5, the loading of models), the file is read in a child process, and a crash fails as an error does.
"""

import json
import os
import pickle
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import support
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from mpifedlora.core.config import RunConfig
from mpifedlora.errors import MpiFedLoraError
from mpifedlora.io import array_cache
from mpifedlora.io.adapter_files import read_base_weights
from mpifedlora.io.checkpoints import CheckpointStore, decode, encode
from mpifedlora.io.client_store import ClientStore
from mpifedlora.io.config_reference import section_models, section_schema
from mpifedlora.io.model_files import check_model_folder, check_positions, check_targets, read_model_sizes
from mpifedlora.io.results import read_results
from mpifedlora.io.run_file import read_run_file, write_run_file
from mpifedlora.runtime import launch

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
TRIED = Counter()
CPU_S, MEMORY_BYTES = 20, 3 * 2**30


def fuzz(max_examples):
    """Set how many inputs are tried: always the same ones, or `FUZZ_TIMES` as many at random."""
    return settings(
        max_examples=max_examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        phases=[Phase.generate],  # to look for a smaller input that fails too would take minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="module", autouse=True)
def counted(pytestconfig):
    yield
    told = ", ".join(f"{name} {count}" for name, count in sorted(TRIED.items()))
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\ninputs tried: {sum(TRIED.values())} ({told})")


# What a reader may do


class Misdeed(Exception):
    """What reading a file must not do."""


_FOLDERS = []  # where the process may write, while it is watched
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FORBIDDEN = {
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "pickle.find_class",
    "socket.connect",
}
_CHANGING = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
}


def _audit(event, arguments):
    if not _FOLDERS:
        return
    if event in _FORBIDDEN:
        raise Misdeed(f"{event} {arguments}")
    is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if (is_write or event in _CHANGING) and not isinstance(arguments[0], int):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((*_FOLDERS, "/dev/", "/proc/self")):
            raise Misdeed(f"{event} {path}")


sys.addaudithook(_audit)


@contextmanager
def watched(folder):
    """Forbid processes, connections, foreign code, and writes outside a folder."""
    _FOLDERS.append(os.path.realpath(folder))
    try:
        yield
    finally:
        _FOLDERS.clear()


def read_here(folder, kind, read):
    """Read something: it returns within seconds of computing, or raises an error of ours."""
    TRIED[kind] += 1
    told = "as if it were right"
    before = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        with watched(folder):
            read()
    except MpiFedLoraError as error:
        told = str(error)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert 0 < len(told) < 5000, told[:200]


def _too_long(number, frame):
    raise Misdeed(f"computes for {CPU_S} s")


def read_apart(folder, kind, read):
    """Read something in a child process, which may not crash either."""
    TRIED[kind] += 1
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
            read_here(folder, kind, read)
            code = 0
        except BaseException:
            os.write(sink, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status), f"ended by signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) == 0, told


# Damage

damages = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "put", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=4,
)


def damaged(content, changes):
    """Return bytes with some of them cut off, flipped, overwritten or doubled."""
    content = bytearray(content)
    for what, where, value in changes:
        place = int(where * (len(content) - 1)) if content else 0
        if what == "cut":
            del content[place:]
        elif what == "flip" and content:
            content[place] ^= 1 << (value[0] % 8)
        elif what == "put":
            content[place : place + len(value)] = value
        elif what == "repeat":
            content[place:place] = content[place : place + value[0]]
    return bytes(content)


numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**40])
names = st.sampled_from(["../x", "/etc/passwd", "", "\0", "a/../../b", "x" * 300, "~", "client-00001", "ü"])
anything = st.recursive(
    st.none() | st.booleans() | numbers | names | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def changed(tree, draw):
    """Return a tree of JSON with one of its parts replaced."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(tree)))
        return {**tree, key: changed(tree[key], draw)}
    if isinstance(tree, list) and tree and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(tree) - 1))
        return [*tree[:index], changed(tree[index], draw), *tree[index + 1 :]]
    return draw(anything)


# Run files

TABLES = {"model": {"name": "minilm"}, "data": {"source": "reuters-r8"}}
KEYS = [f"{section}.{key}" for section in section_models() for key in section_schema(section)]
values = (
    st.sampled_from(
        ["2147483647", "-1", "1e308", "inf", "nan", "1e-320", "[]", "[1, 2]", '[""]', "true", "'custom'"]
    )
    | names.map(json.dumps)
    | st.integers().map(str)
    | st.lists(st.integers(0, 2**31 - 1), max_size=3).map(json.dumps)
    | st.sampled_from(
        sorted(
            {
                choice
                for name in section_models()
                for schema in section_schema(name).values()
                for choice in schema.get("enum", ())
            }
        )
    ).map(json.dumps)
)


@fuzz(60)
@given(
    changes=st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=6), method=names | st.just("flora")
)
def test_run_files_of_any_values(tmp_path, changes, method):
    tables = {section: dict(table) for section, table in TABLES.items()}
    for key, value in [("federation.method", json.dumps(method)), *changes]:
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    for section, table in TABLES.items():
        tables[section] |= {
            key: json.dumps(value) for key, value in table.items() if tables[section][key] == value
        }
    lines = [
        f"[{name}]\n" + "\n".join(f"{k} = {v}" for k, v in table.items()) for name, table in tables.items()
    ]
    (tmp_path / "run.toml").write_text("\n".join(lines), encoding="utf-8")
    read_here(tmp_path, "run files", lambda: read_run_file(tmp_path / "run.toml"))


@fuzz(60)
@given(changes=damages)
def test_run_files_that_are_damaged(tmp_path, changes):
    text = write_run_file(RunConfig.model_validate(TABLES))
    (tmp_path / "run.toml").write_bytes(damaged(text.encode(), changes))
    read_here(tmp_path, "run files", lambda: read_run_file(tmp_path / "run.toml"))


# A run's own files


@pytest.fixture(scope="module")
def finished(tiny_run_file, tmp_path_factory):
    """Return the folder of a run with every kind of file."""
    out = tmp_path_factory.mktemp("fuzz") / "run"
    chosen = ["federation.method=fedsa-lora", "federation.num_rounds=2", "training.local_steps=1"]
    assert launch.run(tiny_run_file, chosen, out, False) == 0
    return out


@fuzz(50)
@given(changes=damages)
def test_results_that_are_damaged(finished, tmp_path, changes):
    (tmp_path / "results.h5").write_bytes(damaged((finished / "results.h5").read_bytes(), changes))
    read_apart(tmp_path, "results", lambda: read_results(tmp_path / "results.h5").rows())


@fuzz(30)
@given(data=st.data())
def test_results_of_other_types_and_shapes(finished, tmp_path, data):
    import h5py

    path = tmp_path / "results.h5"
    shutil.copy(finished / "results.h5", path)
    with h5py.File(path, "r+") as file:
        is_attribute = data.draw(st.booleans())
        owner = file.attrs if is_attribute else file
        found = []
        file.visit(found.append)
        name = data.draw(st.sampled_from(sorted(owner) if is_attribute else sorted(found)))
        made = [
            b"x",
            "text",
            1,
            -1.5,
            np.zeros((2, 3)),
            np.zeros((0, 1)),
            np.array([b"a"] * 3),
            2**40,
            h5py.Empty("f"),
        ]
        value = data.draw(st.sampled_from([*made, None]))
        del owner[name]
        if value is not None:
            owner[name] = value
    read_apart(tmp_path, "results", lambda: read_results(path).rows())


def resumed(out):
    """Resume a run in this process."""
    launch.run(None, ["federation.num_rounds=3"], out, False, resumes=True)


def copied(finished, folder):
    shutil.rmtree(folder / "run", ignore_errors=True)
    return Path(shutil.copytree(finished, folder / "run"))


@fuzz(8)
@given(data=st.data())
def test_checkpoints_of_any_content_with_a_right_digest(finished, tmp_path, data):
    out = copied(finished, tmp_path)
    store = CheckpointStore(out / "checkpoints", 1)
    found = store.latest(print)
    numbers_, tensors = decode(found.content)
    if data.draw(st.booleans()):
        numbers_ = changed(numbers_, data.draw)
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["gone", "short", "long", "noise", "other type", "as it is"]))
    tensor = tensors.pop(name)
    noise = tensor.flatten().view(-1)[: data.draw(st.integers(0, tensor.numel()))].clone()
    if noise.numel():
        noise[data.draw(st.integers(0, noise.numel() - 1))] = data.draw(st.sampled_from([0, 1, 100, 255]))
    made = {
        "short": tensor.flatten()[:-1].clone(),
        "long": tensor.flatten().repeat(2),
        "noise": noise,
        "other type": tensor.double(),
        "as it is": tensor,
    }
    if kind != "gone":
        tensors[name] = made[kind]
    store.write(found.round_num, encode(numbers_, tensors))
    read_apart(tmp_path, "checkpoints", lambda: resumed(out))


@fuzz(60)
@given(changes=damages)
def test_checkpoints_of_any_bytes_with_a_right_digest(finished, tmp_path, changes):
    found = CheckpointStore(finished / "checkpoints", 1).latest(print)
    read_here(tmp_path, "checkpoints", lambda: decode(damaged(found.content, changes)))


@fuzz(60)
@given(changes=damages)
def test_states_of_clients(finished, tmp_path, changes):
    path = sorted((finished / "client_states").glob("client-*"))[-1]
    (tmp_path / path.name).write_bytes(damaged(path.read_bytes(), changes))
    client_id, round_num = int(path.name[7:12]), int(path.name[19:24])
    read_here(tmp_path, "client states", lambda: ClientStore(tmp_path).read(client_id, round_num))


@fuzz(60)
@given(changes=damages)
def test_cached_arrays_are_made_again(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(array_cache, "cache_folder", lambda: tmp_path)
    right = np.arange(50, dtype=np.int32)
    array_cache.cached_values("tokens", [b"texts"], lambda: right)
    (path,) = (tmp_path / "tokens").glob("*.npy")
    path.write_bytes(damaged(path.read_bytes(), changes))

    def read():
        assert np.array_equal(array_cache.cached_values("tokens", [b"texts"], lambda: right), right)

    read_here(tmp_path, "cached arrays", read)


# Models and adapters


@fuzz(60)
@given(data=st.data())
def test_headers_of_model_folders(tiny_model_folder, tmp_path, data):
    folder = copied(tiny_model_folder, tmp_path)
    tree = json.loads((folder / "config.json").read_text())
    text = json.dumps(changed(tree, data.draw)).encode()
    if data.draw(st.booleans()):
        text = damaged(text, data.draw(damages))
    (folder / "config.json").write_bytes(text)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(changed(json.loads(content[8:end]), data.draw)).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    targets = data.draw(st.sampled_from(["all-linear", ["query"], ["../x"], "(", "(.*a)*b", ".*query"]))

    def read():
        check_model_folder(str(folder))
        read_model_sizes(str(folder), targets)
        check_targets(str(folder), targets)
        check_positions(str(folder), 64)

    read_here(tmp_path, "model folders", read)


LOADED = [
    "config.json",
    "1_Pooling/config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
]


@fuzz(6)
@given(data=st.data())
def test_loading_model_folders(tiny_model_folder, tmp_path, data):
    folder = copied(tiny_model_folder, tmp_path)
    name = data.draw(st.sampled_from(LOADED))
    content = (folder / name).read_bytes()
    if name.endswith(".json") and data.draw(st.booleans()):
        content = json.dumps(changed(json.loads(content), data.draw)).encode()
    else:
        content = damaged(content, data.draw(damages))
    (folder / name).write_bytes(content)

    def read():
        from mpifedlora.training.tasks import load_tokenizer

        load_tokenizer(str(folder))
        support.build_model(folder)

    read_apart(tmp_path, "model folders", read)


pieces = st.sampled_from([*"().*+?|[]{}^$,1a\\", "(.*", ")*", "(?:", "(?!", "{2,}", "layer", "../x", "\0"])


@fuzz(60)
@given(targets=st.lists(pieces, max_size=30).map("".join) | st.text(max_size=20))
def test_patterns_of_target_modules(tiny_model_folder, tmp_path, targets):
    read_here(tmp_path, "patterns", lambda: read_model_sizes(str(tiny_model_folder), targets))


class Evil:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_file_of_a_model_is_run(tiny_model_folder, tmp_path):
    folder, mark = copied(tiny_model_folder, tmp_path), tmp_path / "was run"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    read_apart(tmp_path, "model folders", lambda: support.build_model(folder))
    assert not mark.exists()


def test_no_code_of_a_model_is_run(tiny_model_folder, tmp_path):
    folder, mark = copied(tiny_model_folder, tmp_path), tmp_path / "was run"
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    read_apart(tmp_path, "model folders", lambda: support.build_model(folder))
    assert not mark.exists()


@fuzz(40)
@given(data=st.data())
def test_weights_that_a_run_left(tiny_model_folder, tmp_path, data):
    content = (tiny_model_folder / "model.safetensors").read_bytes()
    tensors = load(content)
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["damage", "shape", "name"]))
    if kind == "shape":
        content = save({**tensors, name: tensors[name].flatten()[1:].clone()})
    elif kind == "name":
        content = save({data.draw(names) or "x": tensors[name]})
    else:
        content = damaged(content, data.draw(damages))
    (tmp_path / "base_model").mkdir(exist_ok=True)
    (tmp_path / "base_model" / "model.safetensors").write_bytes(content)
    read_here(tmp_path, "adapter folders", lambda: read_base_weights(tmp_path))
