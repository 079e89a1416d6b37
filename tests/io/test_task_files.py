import hashlib

import pytest

from mpifedlora.errors import ConfigError
from mpifedlora.io.run_file import config_digest, read_run_file, write_run_file
from mpifedlora.io.task_files import digest_of, load_builder

SOURCE = """
import dataclasses

@dataclasses.dataclass
class Box:
    x: int

def build(setup):
    return Box(setup)
"""
RUN = """
[model]
name = "minilm"
[data]
source = "reuters-r8"
partition = "iid"
[task]
name = "mine.py:build"
"""


@pytest.fixture
def task_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    return file


def test_the_function_of_the_file_is_returned(task_file):
    build = load_builder(f"{task_file}:build", hashlib.sha256(SOURCE.encode()).hexdigest())
    assert build(3).x == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def build(:", r"valid Python, got .*line 1.*; correct it"),
        ("def other(): pass", "got 'build' where there are other"),
        ("def build(): pass\n1 / 0\n", r"runs, got ZeroDivisionError: division by zero \(.*mine.py:2\)"),
        ("import no_such_module\ndef build(): pass", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_wrong_is_told_with_its_place(task_file, content, message):
    task_file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_builder(f"{task_file}:build", None)


@pytest.mark.parametrize("name", ["absent.py:build", "mine.txt:build", ".py:build"])
def test_the_file_must_be_there(task_file, name):
    with pytest.raises(ConfigError, match="must name a Python file that exists"):
        digest_of(str(task_file.parent / name))


def test_the_digest_is_part_of_the_configuration_and_pins_the_file(task_file, tmp_path):
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN)
    config = read_run_file(run_file).config
    assert config.task.sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert config.task.name == f"{tmp_path}/mine.py:build"  # found beside the run file
    (tmp_path / "resolved.toml").write_text(write_run_file(config))
    assert read_run_file(tmp_path / "resolved.toml").config == config
    task_file.write_text(SOURCE + "\n")
    assert config_digest(read_run_file(run_file).config) != config_digest(config)
    with pytest.raises(ConfigError, match="the file has changed since the run"):
        read_run_file(tmp_path / "resolved.toml")


def test_options_come_back_as_they_were(task_file, tmp_path):
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN + 'options = { width = 3, names = ["a", "b"], deep = { "x y" = -0.5 } }\n')
    config = read_run_file(run_file).config
    assert config.task.options == {"width": 3, "names": ["a", "b"], "deep": {"x y": -0.5}}
    (tmp_path / "resolved.toml").write_text(write_run_file(config))
    assert read_run_file(tmp_path / "resolved.toml").config == config


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('name = "clasification"', "did you mean classification"),
        ("options = { a = 1 }", "options needs a task of your own"),
        ('sha256 = "00"\nname = "mine.py:build"', "the file has changed"),
    ],
)
def test_wrong_tasks_are_refused(task_file, tmp_path, lines, message):
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.replace('name = "mine.py:build"', lines))
    with pytest.raises(ConfigError, match=message):
        read_run_file(run_file)


def test_sharing_out_by_label_needs_labels(task_file, tmp_path):
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.replace("iid", "dirichlet"))
    with pytest.raises(ConfigError, match=r"shares out by label.*data.partition = \"iid\""):
        read_run_file(run_file)
    read_run_file(run_file, ["data.label_column=topic"])
    with pytest.raises(ConfigError, match=r"data\.columns"):
        read_run_file(run_file, ["task.name=classification", 'data.columns=["a"]'])
