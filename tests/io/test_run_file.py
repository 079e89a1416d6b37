from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mpifedlora.core.config import RunConfig
from mpifedlora.core.methods import METHODS, apply_method
from mpifedlora.core.sections import LARGEST_INT
from mpifedlora.errors import ConfigError
from mpifedlora.io import overrides
from mpifedlora.io.config_reference import (
    alternatives_of,
    configuration_reference,
    section_models,
    section_schema,
)
from mpifedlora.io.run_file import ResolvedRun, config_digest, read_run_file, write_run_file

ROOT = Path(__file__).parents[2]
MINIMAL = '[model]\nname = "minilm"\n[data]\nsource = "20newsgroups"\n'

Read = Callable[..., ResolvedRun]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    monkeypatch.chdir(tmp_path)

    def read_text(text: str | bytes = MINIMAL, *changes: str) -> ResolvedRun:
        content = text.encode() if isinstance(text, str) else text
        Path("run.toml").write_bytes(content)
        return read_run_file("run.toml", changes)

    return read_text


def refuse(read: Callable[..., ResolvedRun], *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*args)
    return str(caught.value)


# What is read


def test_a_minimal_file_gets_the_defaults(read: Read) -> None:
    run = read()
    assert run.ignored_keys == ()
    given = {"model": {"name": "minilm"}, "data": {"source": "20newsgroups"}}
    assert run.config == RunConfig.model_validate(apply_method(given)[0])


def test_the_method_wins_and_says_so(read: Read) -> None:
    run = read(MINIMAL + '[federation]\nmethod = "fedit"\n[training]\nmu = 1\n', "aggregation.kind=product")
    assert run.ignored_keys == ("training.mu", "aggregation.kind")
    assert (run.config.aggregation.kind, run.config.training.mu) == ("factors", 0.0)


def test_byte_order_mark_and_windows_line_ends(read: Read) -> None:
    assert read(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()).config == read().config


@pytest.mark.parametrize("name", ["newsgroups", "reuters", "own_csv"])
def test_the_examples_are_run_files(name: str) -> None:
    run = read_run_file(ROOT / "examples" / f"{name}.toml")
    assert run.ignored_keys == ()
    assert run.config.model.name == "minilm"


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.source=reuters-r8", "source", "reuters-r8"),
        ('lora.target_modules=["query","value"]', "target_modules", ["query", "value"]),
        ("lora.target_modules=query|value", "target_modules", "query|value"),
        (" training.local_steps = 4 ", "local_steps", 4),
        ("training.learning_rate=1e-3", "learning_rate", 1e-3),
        ("federation.reproducible=false", "reproducible", False),
        ('model.name="2024"', "name", "2024"),
        ("data.source=a=b", "source", "a=b"),
        ("data.source=4\nx = 5", "source", "4\nx = 5"),
        ("data.text_column=", "text_column", ""),
    ],
)
def test_overrides(read: Read, override: str, key: str, value: Any) -> None:
    section = override.strip().partition(".")[0]
    assert getattr(getattr(read(MINIMAL, override).config, section), key) == value


def test_the_last_override_of_a_key_wins(read: Read) -> None:
    assert read(MINIMAL, "lora.rank_max=4", "lora.rank_max=8").config.lora.rank_max == 8


def test_an_override_takes_the_other_alternative_out_of_the_file(read: Read) -> None:
    text = MINIMAL + "[training]\nlocal_epochs = 2\n"
    training = read(text, "training.local_steps=4").config.training
    assert (training.local_steps, training.local_epochs) == (4, None)
    message = refuse(read, text, "training.local_steps=4", "training.local_epochs=3")
    assert message.startswith("only one of local_steps and local_epochs may be given, got 4 and 3")


def test_alternatives_are_what_the_models_refuse_together() -> None:
    for group in overrides.ALTERNATIVES:
        sections = {dotted.partition(".")[0] for dotted in group}
        table = {dotted.partition(".")[2]: 1 for dotted in group}
        for section in sections:
            with pytest.raises(ValidationError, match="only one of"):
                section_models()[section].model_validate(table)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("lora.rank_max", ["--set must be section.key=value, got lora.rank_max;"]),
        ("rank_max=3", ["must be section.key=value"]),
        ("a.b.c=3", ["must be section.key=value"]),
        ("=3", ["must be section.key=value"]),
        ("", ["must be section.key=value"]),
        ("lora.rank_max=0", ["lora.rank_max must be at least 1, got 0 (--set lora.rank_max=0);"]),
        ("lora.rank_mx=1", ["got rank_mx (--set lora.rank_mx=1); did you mean rank_max?"]),
        ("lorra.rank_max=1", ["got [lorra] (--set lorra.rank_max=1); did you mean lora?"]),
        ("lora.target_modules=[query,value]", ["must be valid TOML", "in quotes for the shell"]),
        ("federation.reproducible=True", ['got "True"', "write true or false without quotes"]),
        ("model.name=2024", ["model.name must be text", "put it in quotes"]),
        ("data.source=\udcff", ["--set must be UTF-8 text"]),
        ("lora.rank_max=" + "9" * 5000, ["must be a whole number"]),
        ("lora.rank_max=" + "[" * 5000, ["must be valid TOML"]),
    ],
)
def test_wrong_overrides(read: Read, override: str, parts: list[str]) -> None:
    message = refuse(read, MINIMAL, override)
    assert all(part in message for part in parts), message
    assert "\n" not in message


# Paths


def test_paths_are_looked_up_here_then_beside_the_run_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("set/train.csv", "set/test.csv", "set/minilm/x", "test.csv"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")
    Path("set/run.toml").write_text(
        '[model]\nname = "minilm"\n[data]\nsource = "train.csv"\ntest_source = "test.csv"\n'
    )
    config = read_run_file("set/run.toml").config
    assert config.data.source == os.path.join("set", "train.csv")
    assert config.data.test_source == "test.csv"
    # A packaged name stays what it is, whatever lies beside the run file.
    assert config.model.name == "minilm"
    Path("again.toml").write_text(write_run_file(config))
    assert read_run_file("again.toml").config == config


@pytest.mark.parametrize("name", ["org/model", "absent.csv", "a\0b", "x" * 5000, "/absent", "~"])
def test_names_that_are_no_files_stay(read: Read, name: str) -> None:
    assert read(MINIMAL, f"data.source={json.dumps(name)}").config.data.source == name


# Files that cannot be read


def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("newsgroups.toml").write_text(MINIMAL)
    message = refuse(read_run_file, "newsgroup.toml")
    looked = tmp_path / "newsgroup.toml"
    assert message == (
        f"the run file must exist, got newsgroup.toml (looked for {looked}); did you mean newsgroups.toml?"
    )
    assert "check the path" in refuse(read_run_file, "absent/zzz.toml")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        (".", "got the folder ."),
        ("", "got the folder ."),
        (os.devnull, "must be a regular file"),
        ("run\0.toml", "null"),  # the words are Python's own, and change
        ("x" * 5000, "File name too long"),
        (f"{__file__}/run.toml", "Not a directory"),
    ],
)
def test_what_is_no_file(path: str, part: str) -> None:
    message = refuse(read_run_file, path)
    assert part in message
    assert message.startswith("the run file must")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"\x89PNG\r\n\x1a\n", ["must be UTF-8 text, got byte 0x89 at offset 0 (run.toml)"]),
        (b"\xff\xfe[\0", ["must be UTF-8 text"]),
        (b"\0", ["must be valid TOML", "run.toml, line 1, column 1"]),
        (b"#" * 70_000, ["at most 64 KiB"]),
        ("x = " + "[" * 5000, ["brackets nested too deeply (run.toml)"]),
        ("x = " + "9" * 5000, ["too long a number (run.toml)"]),
        (
            MINIMAL + "[lora]\nalpha = abc\n",
            ["got `alpha = abc` (run.toml, line 6, column 9: Invalid value)"],
        ),
        (MINIMAL + "[lora]\nrank max = 3\n", ["got `rank max = 3` (run.toml, line 6"]),
        (MINIMAL + "[lora]\nalpha = [1,\n", ["got `alpha = [1,` (run.toml, "]),
        (MINIMAL + "[lora]\nalpha = 1\nalpha = 2\n", ["got `alpha = 2` (run.toml", "no key may stand twice"]),
    ],
)
def test_text_that_is_no_toml(read: Read, text: str | bytes, parts: list[str]) -> None:
    message = refuse(read, text)
    assert all(part in message for part in parts), message
    assert "\n" not in message


# Keys and values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rank_max = 0", "lora.rank_max must be at least 1, got 0 {at}; raise it, or leave it out for 16"),
        (
            "rank_max = true",
            "lora.rank_max must be a whole number, at least 1, got true {at}; write a number",
        ),
        (
            'rank_max = "3"',
            'lora.rank_max must be a whole number, at least 1, got "3" {at}; write a number without quotes',
        ),
        (
            "rank_max = 3.0",
            "lora.rank_max must be a whole number, at least 1, got 3.0 {at}; write a whole number",
        ),
        (
            f"rank_max = {10**30}",
            f"lora.rank_max must be at least 1 and at most {LARGEST_INT}, got a huge number {{at}}; lower "
            "it, or leave it out for 16",
        ),
        ("alpha = 0", "lora.alpha must be above 0, got 0 {at}; raise it, or leave it out for 32.0"),
        ("alpha = nan", "lora.alpha must be finite, got nan {at}; write a finite number"),
        ("dropout = -inf", "lora.dropout must be finite, got -inf {at}; write a finite number"),
        ("alpha = {x = 1}", "lora.alpha must be a number, above 0, got a table {at}; leave it out for 32.0"),
        (
            "alpha = 2020-01-01",
            "lora.alpha must be a number, above 0, got 2020-01-01 {at}; leave it out for 32.0",
        ),
        (
            "dropout = 1",
            "lora.dropout must be at least 0 and below 1, got 1 {at}; lower it, or leave it out for 0.0",
        ),
        (
            "rank_min = 16\nrank_max = 8",
            "rank_min must be at most rank_max, got 16 and 8 {at}; swap them",
        ),
        (
            'modules_to_save = "x"',
            'lora.modules_to_save must be a list of texts, got "x" {at}; put square brackets around it',
        ),
        (
            "target_modules = [1, 2]",
            "lora.target_modules must be a list of texts or text, got [1, 2] {at}; put each in quotes",
        ),
        ("rank_mx = 3", "[lora] must hold known keys only, got rank_mx {at}; did you mean rank_max?"),
        (
            "num_rounds = 3",
            "[lora] must hold known keys only, got num_rounds {at}; num_rounds belongs in [federation]",
        ),
        (
            "zzz = 3",
            "[lora] must hold known keys only, got zzz {at}; known keys are rank_max, rank_min, "
            "client_ranks, client_capacities, alpha, use_rslora, use_dora, dropout, target_modules, "
            "modules_to_save",
        ),
        (
            "client_ranks = [4, 0]",
            "lora.client_ranks must be a list of whole numbers, each at least 1, not empty, got [4, 0] {at}; "
            "correct the list, or leave it out",
        ),
        (
            "client_ranks = 4",
            "lora.client_ranks must be a list of whole numbers, each at least 1, not empty, got 4 {at}; put "
            "square brackets around it",
        ),
        (
            "client_capacities = [nan]",
            "lora.client_capacities must be a list of numbers, each above 0 and at most 1, not empty, got "
            "[nan] {at}; correct the list, or leave it out",
        ),
        (
            "client_ranks = [4, 17]",
            "client_ranks must be at most rank_max, got 17 and 16 {at}; lower the client rank above "
            "rank_max, or raise rank_max",
        ),
    ],
)
def test_wrong_keys_and_values(read: Read, line: str, message: str) -> None:
    assert refuse(read, f"{MINIMAL}[lora]\n{line}\n") == message.format(at="(run.toml: [lora])")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (MINIMAL + "[lora]\n'' = 3\n", ["[lora] must hold known keys only, got '' (run.toml: [lora])"]),
        ("'' = 3\n" + MINIMAL, ["must hold keys in tables only"]),
        ("[model]\n[data]\nsource = 'x'\n", ["model.name must be given, got nothing (run.toml: [model])"]),
        (
            "",
            ["model.name must be given, got nothing (run.toml: [model]); add name", "\ndata.source must be"],
        ),
        ("lora = 3\n" + MINIMAL, ["[lora] must be a table, got 3 (run.toml); write it as [lora]"]),
        ("[[model]]\nname = 'x'\n[data]\nsource = 'x'\n", ["[model] must be a table, got [a table]"]),
        ("num_rounds = 3\n" + MINIMAL, ["got num_rounds (run.toml); num_rounds belongs in [federation]"]),
        ("alpha = 3\n" + MINIMAL, ["alpha belongs in [data] or [lora]"]),
        (MINIMAL + "[lorra]\n", ["known tables only, got [lorra] (run.toml); did you mean lora?"]),
        (MINIMAL + "[zzz]\n", ["known tables are model, data, task, federation"]),
        (MINIMAL + "[annealing]\nschedule = 'cubik'\n", ['got "cubik"', "did you mean cubic?"]),
        (MINIMAL + "[annealing]\ncut = 'zzz'\n", ['one of "drop", "freeze", got "zzz"', "choose one"]),
        (MINIMAL + "[federation]\nmethod = 3\n", ['federation.method must be one of "sa-fedlora"', "got 3"]),
        (
            MINIMAL + "[federation]\nmethod = 'fedprox'\n[training]\nmu = 0\n",
            ["training.mu must be above 0 with method fedprox, got 0 (run.toml: [training]); without"],
        ),
        (
            MINIMAL + "[federation]\nnum_rounds = 1\n",
            ["initiating.rounds must be at most federation.num_rounds, got 2 and 1 (run.toml); lower"],
        ),
        (MINIMAL + "[evaluation]\nsplit = 'validation'\n", ["(run.toml); set data.validation_fraction"]),
        (
            MINIMAL + "[federation]\nmethod = 'fedsa-lora'\n[evaluation]\nmodel = 'global'\n",
            [
                'needs evaluation.model = "personal" (',
                '), got "global" (run.toml); set evaluation.model = "pers',
            ],
        ),
        (
            MINIMAL + "[privacy]\nclip_norm = 1\n",
            [
                'needs training.scope = "b-only" or "full" (',
                '), got "adapter" (run.toml); set training.scope',
            ],
        ),
    ],
)
def test_wrong_tables(read: Read, text: str, parts: list[str]) -> None:
    message = refuse(read, text)
    assert all(part in message for part in parts), message


def test_several_errors_are_reported_together(read: Read) -> None:
    text = MINIMAL + "[federation]\nmethod = 'fedvag'\nnum_rounds = 1\nnum_clients = 0\n[lora]\nalpha = 0\n"
    lines = refuse(read, text).split("\n")
    assert [line.partition(" ")[0] for line in lines] == [
        "federation.method",
        "federation.num_clients",
        "lora.alpha",
    ]


def test_an_unknown_method_hides_no_rule_and_invents_none(read: Read) -> None:
    # fedavg has no initiating rounds: one round is enough for what the user meant.
    message = refuse(read, MINIMAL + "[federation]\nmethod = 'fedvag'\nnum_rounds = 1\n")
    assert "\n" not in message
    assert 'did you mean "fedavg"?' in message


def test_at_most_ten_errors_are_shown(read: Read) -> None:
    lines = refuse(read, MINIMAL + "[lora]\n" + "".join(f"k{i} = 1\n" for i in range(13))).split("\n")
    assert len(lines) == 11
    assert lines[-1] == "and 3 more errors"


# Back and forth


def text_values(schema: Any) -> st.SearchStrategy[str]:
    return st.text(min_size=schema.get("minLength", 0), max_size=8)


def values_of(schema: Any) -> st.SearchStrategy[Any]:
    options = alternatives_of(schema)
    if len(options) > 1:
        return st.one_of(*map(values_of, options))
    (option,) = options
    if "enum" in option:
        return st.sampled_from(option["enum"])
    if option["type"] == "array":
        return st.lists(values_of(option["items"]), min_size=1, max_size=3)
    if option["type"] == "object":
        return st.dictionaries(text_values({}), st.integers() | text_values({}), max_size=2)
    simple = {"boolean": st.booleans(), "string": text_values(option), "integer": st.integers(2, 9)}
    if option["type"] != "number":
        return simple[option["type"]]
    low, high = option.get("exclusiveMinimum", option.get("minimum")), option.get("exclusiveMaximum")
    return st.floats(
        low,
        high,
        exclude_min="exclusiveMinimum" in option,
        exclude_max=high is not None,
        allow_infinity=False,
    )


def tables_of(section: str) -> st.SearchStrategy[dict[str, Any]]:
    required = {k: values_of(s) for k, s in section_schema(section).items() if _is_required(s)}
    optional = {k: values_of(s) for k, s in section_schema(section).items() if not _is_required(s)}
    return st.fixed_dictionaries(required, optional=optional)


def _is_required(schema: Any) -> bool:
    return "default" not in schema and schema.get("type") not in ("array", "object")


# Keys that the rules between the tables tie to each other, and what goes together of them.
TIED = (
    "task.packing task.template data.messages_column lora.use_dora task.name task.sha256 task.options "
    "data.columns model.dtype model.quantize federation.sampling lora.client_ranks "
    "lora.client_capacities initiating.scope "
    "annealing.allocation aggregation.kind aggregation.weights aggregation.robust aggregation.norm_bound "
    "training.scope training.personal training.control_variates server_optimizer.kind privacy.clip_norm "
    "privacy.noise_multiplier evaluation.model training.compile transport.collect transport.uplink_dtype "
    "transport.downlink_dtype transport.error_feedback faults.round_deadline_s faults.late "
    "faults.min_clients"
).split()
FIXED = {"annealing.schedule": "constant", "aggregation.kind": "factors"}
COHERENT: list[dict[str, Any]] = [
    {"task.name": "causal-lm", "task.packing": True, "data.partition": "iid", "data.messages_column": "talk"},
    {"model.dtype": "bfloat16", "initiating.scope": "full", "aggregation.norm_bound": 0.1},
    {"federation.sampling": "poisson", "federation.cohort_size": 4, "aggregation.weights": "frobenius"},
    {"lora.client_ranks": [4, 1, 9], "aggregation.kind": "zero-pad", "annealing.allocation": "spectral"},
    {"lora.client_capacities": [0.3, 1.0], "aggregation.weights": "equal"},
    {"annealing.schedule": "cubic", "aggregation.kind": "stack", "lora.client_ranks": [3]},
    {"annealing.schedule": "target", "aggregation.kind": "residual"},
    {"aggregation.robust": "krum", "aggregation.num_byzantine": 3},
    {"training.scope": "alternating", **FIXED},
    {"training.scope": "b-only", **FIXED, "privacy.clip_norm": 0.5, "privacy.noise_multiplier": 1.5}
    | {"initiating.rounds": 0, "aggregation.weights": "equal"},
    {"training.personal": "b", "evaluation.model": "personal", "initiating.rounds": 0, **FIXED},
    {"training.scope": "full", "initiating.scope": "full", "annealing.schedule": "step"}
    | {"server_optimizer.kind": "fedyogi"},
    {"training.control_variates": True, "aggregation.kind": "factors", "annealing.schedule": "linear"}
    | {"training.optimizer": "sgd", "training.momentum": 0.0, "training.mu": 0.0, "initiating.rounds": 0}
    | {"training.head_rate_factor": 1.0},
    {"transport.collect": "reduce", "federation.reproducible": False, "training.compile": True, **FIXED},
    {"transport.uplink_dtype": "int8", "transport.downlink_dtype": "bfloat16", "model.quantize": "nf4"},
    {"faults.round_deadline_s": 9.0, "faults.late": "next-round", "federation.reproducible": False},
    {"transport.uplink_dtype": "float16", "transport.error_feedback": True, **FIXED},
]


def repaired(tables: dict[str, Any], switches: dict[str, Any]) -> dict[str, Any]:
    """Make the tables keep the rules between keys, with these switches in them."""
    for section, _, key in (dotted.partition(".") for dotted in TIED):
        tables[section].pop(key, None)
    tables["training"].pop("local_epochs" if "local_steps" in tables["training"] else "local_steps", None)
    tables["federation"].pop("cohort_size", None)
    tables["federation"] |= {"num_clients": 9, "num_rounds": 40}
    tables["lora"]["rank_max"] = 9
    tables["lora"]["target_modules"] = tables["lora"].get("target_modules") or "all-linear"
    tables["data"].setdefault("partition_column", "owner")
    if tables["data"].get("partition") == "files":
        tables["data"]["test_source"] = "test.csv"
        tables["data"].pop("max_examples", None)
    tables["data"]["validation_fraction"] = 0.25
    if tables["annealing"].get("schedule") == "metropolis":
        tables["annealing"]["cut"] = "drop"
    for dotted, value in switches.items():
        section, _, key = dotted.partition(".")
        tables[section][key] = value
    return tables


TABLES = st.fixed_dictionaries({name: tables_of(name) for name in section_models()})
PLAIN_RUNS = st.builds(repaired, TABLES, st.just({}))
RUNS = st.builds(repaired, TABLES, st.sampled_from(COHERENT))


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # No name that a generated text could have: a source of that name would be taken for this file.
    return tmp_path_factory.mktemp("runs") / f"{os.getpid()}.toml"


def of_method(tables: dict[str, Any], method: str) -> dict[str, Any]:
    tables["federation"]["method"] = method
    if method == "fedprox":
        tables["training"]["mu"] = tables["training"].get("mu") or 0.5
    return apply_method(tables)[0]


PRESETS = st.sampled_from([name for name in METHODS if name != "custom"])


@settings(deadline=None, max_examples=60)
@given(tables=st.builds(of_method, RUNS, st.just("custom")) | st.builds(of_method, PLAIN_RUNS, PRESETS))
def test_what_is_written_reads_back(shared_file: Path, tables: dict[str, Any]) -> None:
    resolved = RunConfig.model_validate(tables)
    shared_file.write_text(write_run_file(resolved), encoding="utf-8", newline="")
    assert read_run_file(shared_file) == ResolvedRun(resolved, ())


def test_every_key_is_written_under_its_description(read: Read) -> None:
    text = write_run_file(read().config)
    assert "# LoRA rank that annealing starts from.\nrank_max = 16\n" in text
    assert "local_steps" not in re.sub(r"#.*", "", text)
    assert max(map(len, text.splitlines())) <= 100


@settings(deadline=None, max_examples=20)
@given(one=RUNS, other=RUNS)
def test_digests_are_equal_for_equal_configurations_only(one: Any, other: Any) -> None:
    first, second = RunConfig.model_validate(one), RunConfig.model_validate(other)
    assert config_digest(first) == config_digest(RunConfig.model_validate(first.model_dump()))
    assert (config_digest(first) == config_digest(second)) == (first == second)


def test_digest_of_negative_zero_and_of_whole_floats(read: Read) -> None:
    digests = {config_digest(read(MINIMAL, f"initiating.mu={mu}").config) for mu in ("0", "0.0", "-0.0")}
    assert len(digests) == 1
    assert re.fullmatch("[0-9a-f]{64}", digests.pop())


# Hostile input

scalars = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.booleans().map(lambda value: str(value).lower()),
    st.text(max_size=8).map(lambda value: json.dumps(value, ensure_ascii=False)),
    st.sampled_from(
        ["[]", "{}", "[[1]]", "{a.b=1}", "1979-05-27T07:32:00Z", "07:32:00", "0xff", "[nan]", ""]
    ),
)
known_keys = [key for section in section_models() for key in section_schema(section)]
key_texts = st.sampled_from([*known_keys, '"a b"', '"\\n"', "a.b", "rank-max", "''"])
headers = st.sampled_from(
    [*(f"[{name}]" for name in section_models()), "[x]", "[[lora]]", "[model.name]", ""]
)
hostile_lines = st.one_of(headers, st.tuples(key_texts, scalars).map(" = ".join), st.text(max_size=6))
hostile_texts = st.lists(hostile_lines, max_size=12).map("\n".join).map(str.encode)


@settings(deadline=None, max_examples=100)
@given(
    content=hostile_texts | st.binary(max_size=60) | hostile_texts.map(lambda text: MINIMAL.encode() + text)
)
def test_hostile_files_raise_nothing_but_config_errors(shared_file: Path, content: bytes) -> None:
    shared_file.write_bytes(content)
    _read_or_refuse(shared_file, [])


hostile_overrides = st.tuples(
    st.sampled_from([*section_models(), "x", ""]), key_texts, scalars | st.text(max_size=8)
).map(lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}")


@settings(deadline=None, max_examples=60)
@given(changes=st.lists(hostile_overrides | st.text(max_size=12), max_size=3))
def test_hostile_overrides_raise_nothing_but_config_errors(shared_file: Path, changes: list[str]) -> None:
    shared_file.write_text(MINIMAL)
    _read_or_refuse(shared_file, changes)


def _read_or_refuse(path: Path, changes: list[str]) -> None:
    try:
        run = read_run_file(path, changes)
    except ConfigError as error:
        lines = str(error).split("\n")
        assert 1 <= len(lines) <= 11
        assert all(line.isprintable() for line in lines)
    else:
        assert isinstance(run, ResolvedRun)


# The reference


def test_the_committed_reference_is_the_generated_one() -> None:
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    remedy = "run `python -m mpifedlora.io.config_reference > docs/configuration.md`"
    assert committed == configuration_reference(), remedy


def test_every_key_has_a_meaning_and_a_whole_row() -> None:
    text = configuration_reference()
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+` \|", line)]
    keys = [key for section in section_models() for key in section_schema(section)]
    for key, row in zip(keys, rows, strict=False):
        cells = re.split(r"(?<!\\)\|", row)
        assert (len(cells), cells[1].strip()) == (6, f"`{key}`")
        assert len(cells[4].strip()) > 10
