from __future__ import annotations

import errno
import fcntl
import io
import math
import os
import re
import struct
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mpifedlora.core.units import human_bytes, human_time
from mpifedlora.io.results_schema import Baselines, RoundRow
from mpifedlora.runtime.progress import Progress, format_row, is_terminal, summarise

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FILES = {"results": "runs/demo/results.h5", "adapter": "runs/demo/adapter"}
BASELINES = Baselines(
    sent_bytes=16_400_000,
    full_model_bytes=1_000_000_000,
    fixed_rank_bytes=15_000_000,
    sent_values=1,
    full_model_values=2,
    fixed_rank_values=3,
)


def make_row(round_num: int, **changes: Any) -> RoundRow:
    values: dict[str, Any] = {
        "round_num": round_num,
        "stage": "annealing",
        "temperature": 0.5,
        "lora_rank_mean": 14.2,
        "module_ranks": (14, 14),
        "uplink_bytes": 4_100_000,
        "downlink_bytes": 4_123_456,
        "mpi_bytes": 9,
        "train_loss": 1.234,
        "penalty": 0.0,
        "aggregation_error": 0.0,
        "dropped_energy": 0.0,
        "num_participants": 2,
        "client_num_examples": np.zeros(2, np.int64),
        "client_train_loss": np.zeros(2),
        "client_train_s": np.zeros(2),
        "client_participated": np.ones(2, np.bool_),
        "client_outcome": np.full(2, "used", "S16"),
        "eval_accuracy": 0.512,
        "eval_macro_f1": 0.4,
    }
    seconds = ("train_s", "collect_s", "aggregate_s", "broadcast_s", "evaluate_s", "round_s")
    return RoundRow(**(dict.fromkeys(seconds, 5.0) | values | changes))


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": "xterm-256color"})


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return ESCAPE.sub("", console.file.getvalue())


def show_run(console: Console, num_rounds: int = 20) -> str:
    progress = Progress(num_rounds, console)
    progress.start(["sa-fedlora [lora] on minilm"])
    for round_num in (1, 2, 3):
        progress.on_round_start(round_num, "annealing", 14.2)
        progress.on_round_end(make_row(round_num))
    progress.on_warning("disk full")
    rows = [make_row(n, eval_accuracy=a) for n, a in ((1, 0.1), (2, 0.7), (3, 0.6))]
    progress.finish(summarise(rows, baselines=BASELINES, wall_s=80, files=FILES))
    return shown(console)


class TestUnits:
    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_949, "999.9 kB"),
            (999_950, "1.0 MB"),
            (2_147_483_648, "2.1 GB"),
            (10**15, "1.0 PB"),
        ],
    )
    def test_bytes(self, count: int, text: str) -> None:
        assert human_bytes(count) == text

    @given(st.integers(0, 9 * 10**17))
    def test_bytes_stay_short_and_true(self, count: int) -> None:
        value, unit = human_bytes(count).split()
        factor = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}[unit]
        assert 0 <= float(value) < 1000
        assert abs(float(value) * factor - count) <= 0.0501 * factor

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0s"),
            (59.4, "59s"),
            (59.6, "1m00s"),
            (3599.7, "1h00m"),
            (7500, "2h05m"),
            (86_399.9, "1d00h"),
            (270_000, "3d03h"),
            (-3, "0s"),
            (math.nan, "?"),
            (math.inf, "?"),
        ],
    )
    def test_time(self, seconds: float, text: str) -> None:
        assert human_time(seconds) == text


class TestRow:
    def test_the_whole_line(self) -> None:
        assert format_row(make_row(3), 20, 80) == (
            "round  3/20  annealing   rank 14.2  up 4.1 MB    down 4.1 MB    "
            "loss 1.234  accuracy 0.512  left 1m20s"
        )

    def test_what_is_not_there_is_not_shown_as_a_number(self) -> None:
        row = make_row(3, train_loss=math.nan, eval_accuracy=math.nan, lora_rank_mean=0.0)
        line = format_row(row, 20, math.nan)
        assert "nan" not in line
        assert "accuracy" not in line
        assert "rank - " in line
        assert "loss -" in line
        assert line.endswith("left ?")

    def test_columns_stand_below_each_other(self) -> None:
        lines = [
            format_row(make_row(1, stage="initiating", uplink_bytes=5), 20, 1),
            format_row(make_row(20, eval_accuracy=math.nan, lora_rank_mean=2), 20, 1),
        ]
        for word in ("rank", "up", "down", "loss", "left"):
            assert lines[0].index(word) == lines[1].index(word)


class TestPlain:
    def test_one_line_for_each_round_and_no_control_characters(self) -> None:
        text = show_run(console := plain())
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue() == text
        assert len(re.findall(r"^round +\d+/20 .*accuracy 0\.512", text, re.MULTILINE)) == 3
        assert "\r" not in text
        assert not re.search(r" $", text, re.MULTILINE)
        assert "sa-fedlora [lora] on minilm\n" in text
        assert "warning: disk full\n" in text

    def test_the_final_table(self) -> None:
        lines = dict(re.split(r"  +", line) for line in show_run(plain()).splitlines()[-9:])
        assert lines == {
            "final accuracy": "0.600 (round 3)",
            "best accuracy": "0.700 (round 2)",
            "final macro-F1": "0.400",
            "bytes sent": "24.7 MB (up 12.3 MB, down 12.4 MB)",
            "full-model FedAvg": "1.0 GB: 98.36 % less sent",
            "fixed rank": "15.0 MB: 9.33 % more sent",
            "wall time": "1m20s",
            **FILES,
        }

    def test_nothing_evaluated_and_no_baselines(self) -> None:
        progress = Progress(1, console := plain())
        row = make_row(1, eval_accuracy=math.nan)
        progress.finish(summarise([row], baselines=None, wall_s=math.nan, files={}))
        assert [line.split("  ")[0] for line in shown(console).splitlines()] == ["bytes sent"]

    def test_lines_are_longer_than_the_console_is_wide(self) -> None:
        console = Console(file=io.StringIO(), force_terminal=False, width=20)
        Progress(20, console).on_round_end(make_row(3))
        assert len(shown(console).splitlines()) == 1

    def test_force_color_makes_no_live_bar(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        progress = Progress(20)
        progress.start([])
        progress.on_round_end(make_row(3))
        assert capsys.readouterr().out.startswith("round  3/20")

    def test_output_that_fails_ends_nothing(self) -> None:
        class Gone(io.StringIO):
            def flush(self) -> None:
                raise OSError(errno.EIO, "terminal gone")

        closed = io.StringIO()
        closed.close()
        for file in (Gone(), closed):
            Progress(20, Console(file=file, force_terminal=False)).on_warning("hello")

    def test_an_encoding_without_the_letters(self) -> None:
        raw = io.BytesIO()
        console = Console(file=io.TextIOWrapper(raw, encoding="latin-1"), force_terminal=False)
        Progress(20, console).on_warning("Вибори é")
        assert raw.getvalue() == "warning: ?????? é\n".encode("latin-1")


class TestTerminal:
    def test_history_stays_and_markup_is_text(self) -> None:
        text = show_run(terminal())
        assert len(re.findall(r"round +\d+/20 .*accuracy 0\.512", text)) == 3
        assert "sa-fedlora [lora] on minilm" in text
        assert "warning: disk full" in text
        assert "98.36 % less sent" in text
        assert "runs/demo/results.h5" in text

    def test_the_bar_says_what_runs_now(self) -> None:
        progress = Progress(20, console := terminal())
        progress.start([])
        progress.on_round_end(make_row(3))
        progress.on_round_start(4, "annealing", 13.8)
        progress._bar.refresh()
        progress.close()
        progress.close()
        assert re.search(r"round  4/20  annealing  rank 13\.8 .*left 1m25s", shown(console))

    def test_a_dumb_terminal_gets_plain_lines(self) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
        assert "\x1b" not in show_run(console)


@pytest.mark.parametrize(("columns", "is_live"), [(0, False), (100, True)])
def test_only_a_terminal_with_a_size_is_one(columns: int, is_live: bool) -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with os.fdopen(leader, "rb"), os.fdopen(follower, "w") as stream:
        assert is_terminal(stream) == is_live


def test_a_file_and_a_closed_stream_are_no_terminals(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as stream:
        assert not is_terminal(stream)
    assert not is_terminal(stream)
    assert not is_terminal(io.StringIO())


class TestTimeLeft:
    def left(self, num_rounds: int, *rounds: tuple[int, float]) -> str:
        progress = Progress(num_rounds, console := plain())
        for round_num, round_s in rounds:
            progress.on_round_end(make_row(round_num, round_s=round_s))
        return shown(console).splitlines()[-1].split("left ")[1]

    def test_rounds_to_come_are_like_the_last_ones(self) -> None:
        assert self.left(20, (1, 10.0)) == "3m10s"
        assert self.left(20, *[(n, 1000.0) for n in range(1, 6)], *[(n, 2.0) for n in range(6, 11)]) == "20s"

    def test_a_resumed_run_counts_what_is_left(self) -> None:
        assert self.left(20, (15, 4.0)) == "20s"

    def test_after_the_last_round_nothing_is_left(self) -> None:
        assert self.left(3, (3, 100.0)) == "0s"

    def test_unknown_seconds(self) -> None:
        assert self.left(20, (1, math.nan)) == "?"
        assert self.left(20, (1, math.nan), (2, 10.0)) == "3m00s"
