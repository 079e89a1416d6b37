import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpifedlora.core.charts import ASCII, BLOCKS, bars, columns, sparkline

values_of_rounds = st.lists(st.floats(0, 1e12) | st.just(math.nan), max_size=40)


@given(values_of_rounds, st.integers(0, 60), st.integers(1, 50), st.integers(1, 6))
def test_every_curve_has_its_size_and_is_empty_where_rounds_are_to_come(values, more, width, height):
    num_rounds = max(1, len(values) + more)
    lines = bars(values, num_rounds, width, height)
    assert [len(line) for line in lines] == [width] * height
    assert set("".join(lines)) <= set(BLOCKS)
    for column, value in enumerate(columns(values, num_rounds, width)):
        assert (lines[-1][column] == " ") == math.isnan(value)
        if column * num_rounds // width >= len(values):
            assert math.isnan(value)


def test_rounds_that_share_a_column_are_averaged():
    assert columns([1.0, 3.0, 5.0, math.nan], 4, 2) == [2.0, 5.0]


def test_height_is_in_proportion_and_the_least_is_seen():
    assert sparkline([100.0, 50.0, 25.0, 0.1], 4, 4) == "█▄▂▁"
    assert bars([1.0, 2.0, 3.0], 3, 3, 2, low=1.0) == ["  █", "▁██"]


def test_one_value_and_none():
    assert sparkline([5.0], 2, 4) == "██  "
    assert sparkline([0.0, 0.0], 2, 2) == "▁▁"
    assert sparkline([], 3, 3) == "   "


@pytest.mark.parametrize("shades", [BLOCKS, ASCII])
def test_shades_rise(shades):
    assert sparkline([8.0, 4.0, 1.0], 3, 3, shades) == shades[8] + shades[4] + shades[1]
    assert len(shades) == len(set(shades)) == 9
