from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.agreement import FIELDS, STATUS_BYTES, Status, check_agreement
from mpifedlora.errors import ConfigError

LAWS = settings(max_examples=25, deadline=None)
# What a fixed-size record cannot tell apart: text that ends in NUL from text that does not.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
HEX = st.text("0123456789abcdef", max_size=16)
SERVER = Status("node0", dict.fromkeys(FIELDS, "aa"))
NAMES = ("the server", "worker 0", "worker 1")


@LAWS
@given(TEXT, st.fixed_dictionaries(dict.fromkeys(FIELDS, HEX)), TEXT, TEXT)
def test_what_fits_survives_a_round_trip(host: str, digests: dict[str, str], error: str, device: str) -> None:
    status = Status(host[:14], digests, error, device[:6])
    assert status.pack().nbytes == STATUS_BYTES
    assert Status.unpack(status.pack()) == status


def test_fields_not_yet_known_are_empty() -> None:
    assert set(Status.unpack(Status("h", {"data": "ab"}).pack()).digests.items()) == {
        *((field, "") for field in FIELDS if field != "data"),
        ("data", "ab"),
    }


@pytest.mark.parametrize("character", ["e", "é", "€", "😀"])
@pytest.mark.parametrize("shift", range(4))
def test_long_texts_are_cut_anywhere_without_failing(character: str, shift: int) -> None:
    long = "x" * shift + character * 5000
    got = Status.unpack(Status(long, {}, long, long).pack())
    for text in (got.error, got.host, got.device):
        assert long.startswith(text.removesuffix("\N{REPLACEMENT CHARACTER}"))
    assert len(got.error.encode()) >= 3000


def test_a_path_that_is_not_utf8_does_not_fail() -> None:
    # Python hands over its bytes as lone surrogates.
    got = Status.unpack(Status("h", {}, "no such file: caf\udce9.csv").pack())
    assert got.error == "no such file: caf?.csv"


def test_agreement_is_silent() -> None:
    check_agreement([SERVER, replace(SERVER, host="node1", device="cuda:0"), SERVER], NAMES)


@pytest.mark.parametrize("field", FIELDS)
def test_a_difference_names_worker_and_field(field: str) -> None:
    other = Status("node7", {**SERVER.digests, field: "bb"})
    with pytest.raises(ConfigError) as caught:
        check_agreement([SERVER, SERVER, other], NAMES)
    wanted = f"the same {field}, got bb on worker 1 (node7) and aa on the server (node0); "
    assert wanted in str(caught.value)


def test_a_field_that_one_process_does_not_know_is_a_difference() -> None:
    known = {field: "aa" for field in FIELDS if field != "model"}
    with pytest.raises(ConfigError, match="same model, got  on worker 0"):
        check_agreement([SERVER, Status("node1", known)], NAMES[:2])


def test_a_failure_names_its_process() -> None:
    failed = Status("node3", {}, error="no such folder")
    with pytest.raises(ConfigError, match=re.escape("no such folder (worker 0 on node3)")):
        check_agreement([SERVER, failed, SERVER], NAMES)


def test_a_failure_of_all_names_nobody() -> None:
    failed = Status("node3", {}, error="no such file")
    with pytest.raises(ConfigError, match=r"^no such file$"):
        check_agreement([failed, failed, failed], NAMES)


def test_a_failure_comes_before_a_difference() -> None:
    different = Status("node1", dict.fromkeys(FIELDS, "bb"))
    with pytest.raises(ConfigError, match=re.escape("broken (worker 1 on node2)")):
        check_agreement([SERVER, different, Status("node2", {}, error="broken")], NAMES)


def test_the_record_is_a_plain_array_of_bytes() -> None:
    packed = SERVER.pack()
    assert (packed.dtype, packed.shape) == (np.uint8, (STATUS_BYTES,))
    packed[:] = 0
