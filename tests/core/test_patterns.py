import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpifedlora.core.patterns import compile_pattern, matches_whole, matches_within
from mpifedlora.errors import AdapterError

atoms = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d"])
borders = st.sampled_from(["^", "$", r"\b"])
repeats = st.sampled_from(["", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?"])
patterns = st.recursive(
    borders | st.tuples(atoms, repeats).map("".join),
    lambda inner: (
        st.lists(inner, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
        | st.tuples(inner, repeats).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
        | st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda pair: f"{pair[0]}{pair[1]})")
    ),
    max_leaves=5,
)


@given(pattern=patterns, name=st.text("ab.1", max_size=6))
def test_a_pattern_means_what_it_means_to_python(pattern, name):
    # Python 3.10 reads {,2} as text.
    theirs = re.compile(pattern.replace("{,2}", "{0,2}"))
    step = compile_pattern(pattern)
    assert matches_whole(step, name) == (theirs.fullmatch(name) is not None)
    assert matches_within(step, name) == (theirs.search(name) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(.+)+x",
        "(a|a.*)*$x",
        ".*" * 300 + "x",
        "(.|.)" * 100 + "x",
        ".?" * 300 + "x",
        "((((a?){999}){999}){999})x",
    ],
)
def test_no_pattern_takes_long(pattern):
    assert not matches_whole(compile_pattern(pattern), "a" * 60)


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "[",
        "*a",
        "a{2",
        "(?i)a",
        r"(a)\1",
        "(?<=a)b",
        "(?P<x>a)",
        "a" * 1001,
        "(" * 400 + ")" * 400,
        "[b-a]",
    ],
)
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(AdapterError, match="regular expression"):
        compile_pattern(pattern)
