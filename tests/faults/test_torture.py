"""The short form of `make torture`: ten runs hit at random."""

import pytest
from faults.torture import torture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_random_faults_lose_nothing(tmp_path):
    tally = torture(tmp_path / "runs", num_runs=10, seed=1, jobs=2, limit_s=600)
    assert tally.is_good(), "\n".join(tally.lines())
    assert tally.runs > 0
    assert tally.survived + tally.resumed == tally.runs
