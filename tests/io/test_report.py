"""Reports of real and made-up runs: files that parse, pages that load nothing and run nothing."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import support
from made_runs import make_run

from mpifedlora.errors import CheckpointError, ConfigError
from mpifedlora.io.html import Html, element, link_papers, math, safe, table
from mpifedlora.io.report import Report, write_report

ALWAYS = {"loss_by_round", "loss_by_bytes", "bytes_by_round", "client_loss", "time_by_round", "overview"}
VOID = {"meta", "br", "hr", "img", "input", "link"}
EVIL = '"><script src="http://evil.example/a.js"></script>'
HOSTILE = {
    "labels": ("<script>alert(1)</script>", "a&b", "$x^2$ \\frac{", "\x01 ]]>"),
    "events": ("<img src=http://evil.example/x.png onerror=alert(1)>", "</style></body>"),
    "info": {
        "dataset": EVIL,
        "model": "$\\frac{1}$ & <b>",
        "client_names": ("<script>alert(3)</script>", "$x", "c.jsonl", "d"),
        "mpi_library": "<iframe src='//evil.example'>",
        "devices": ("<a href='javascript:alert(1)'>x</a>",) * 3,
        "module_names": ("<svg onload=alert(1)>", "$\\bad{", "x'y\""),
    },
    "model": {"name": "</td><script>alert(2)</script>"},
}


class Page(HTMLParser):
    """What a page consists of; its elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        addresses = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.loads += [(tag, name, value or "") for name, value in attrs if name in addresses]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def read_page(report: Report) -> Page:
    """Parse a report's page and check what holds for every one."""
    source = report.page.read_text(encoding="utf-8")
    page = Page(source)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "iframe", "link", "object", "embed", "b onload"} & set(page.tags)
    assert not {name for name in page.attributes if name.startswith("on")}
    for tag, name, address in page.loads:
        if address.startswith("#"):
            assert address[1:] in page.ids, address
        else:
            inline = address.startswith("data:image/png;base64,")
            paper = (tag, name) == ("a", "href") and address.startswith("https://arxiv.org/abs/")
            assert inline or paper, address
    assert "@import" not in source
    assert source.count("url(") == source.count("url(#")
    return page


def check_figures(report: Report) -> set[str]:
    """Check that each figure is a PNG and an SVG of one shape, and return their names."""
    names = {path.stem for path in report.figures}
    assert {path.name for path in report.figures} == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    for name in names:
        folder = report.page.parent / "figures"
        header = (folder / f"{name}.png").read_bytes()[:24]
        assert header.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", header[16:])
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        _, _, wide, high = map(float, root.get("viewBox", "").split())
        assert width > 500
        assert width / height == pytest.approx(wide / high, rel=0.02)
    return names


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mpifedlora.runtime import launch

    folder = tmp_path_factory.mktemp("report")
    run_file = support.make_run_file(folder)
    assert launch.run(run_file, [], folder / "run", False) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def real_report(real: Path) -> Report:
    return write_report(real)


def test_the_report_of_a_real_run_has_every_figure(real_report: Report) -> None:
    assert check_figures(real_report) == ALWAYS | {
        "accuracy_by_round",
        "accuracy_by_bytes",
        "rank_by_round",
        "module_ranks",
        "bytes_total",
        "aggregation",
        "labels",
    }


def test_the_page_of_a_real_run_says_what_its_results_say(real_report: Report) -> None:
    page, results = read_page(real_report), real_report.results
    assert page.tags.count("figure") == 12
    assert page.tags.count("svg") == 12
    assert f"{results.rounds['eval_accuracy'][-1]:.3f}" in page.text
    assert results.baselines is not None
    assert f"{100 * results.baselines.reduction_vs_full_model:.2f} % less" in page.text
    assert "4 of 4" in page.text
    assert "Every client's update was used in every round." in page.text
    for module in ("0.attention.self.query", "1.output"):
        assert module in page.text
    assert "b(t) = max(1, ⌊rmin + (rmax" in page.text


def test_the_same_run_gives_the_same_report(real: Path, real_report: Report, tmp_path: Path) -> None:
    again = write_report(real / "results.h5", tmp_path / "again")
    assert again.page.read_bytes() == real_report.page.read_bytes()
    for path in real_report.figures:
        if path.suffix == ".svg":
            assert (tmp_path / "again" / "figures" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_new_run_in_the_folder_takes_the_old_report_away(tmp_path: Path) -> None:
    from mpifedlora.io.output_folder import prepare_output_folder

    report = write_report(make_run(tmp_path, num_finished=0))
    prepare_output_folder(tmp_path, "", resumes=True)
    assert report.page.exists()
    prepare_output_folder(tmp_path, "")
    assert not report.page.parent.exists()


def test_one_round_one_module_and_metrics_of_the_tasks_own(tmp_path: Path) -> None:
    few = {"num_rounds": 1, "num_modules": 1, "num_clients": 1}
    metrics = ("perplexity", "$exact_<b>")
    report = write_report(make_run(tmp_path, **few, metrics=metrics, epsilon=1.25, info={"is_private": True}))
    assert {"accuracy_by_bytes", "metric_0", "metric_1"} <= check_figures(report)
    text = read_page(report).text
    assert "1 of 1" in text
    assert "epsilon1.25at delta 1e-05" in text
    assert "perplexity by round: 5.701 after round 1." in text
    assert "$exact_<b> by round: 6.701" in text


def test_clients_that_were_measured_on_examples_of_their_own(tmp_path: Path) -> None:
    names = ("ann", "bob", "cy", "dot")
    run = make_run(tmp_path, measures_clients=True, every=3, info={"client_names": names})
    report = write_report(run)
    assert "client_eval_accuracy" in check_figures(report)
    text = read_page(report).text
    last = report.results.clients["eval_accuracy"][-1]
    assert f"in the last, {last.min():.3f} to {last.max():.3f}." in text
    assert "The accuracy is the last that was measured on the client's own examples." in text
    assert "the global model, on what each client has held out" in text
    for name, value in zip(names, last, strict=True):
        assert re.search(rf"{name}\D.*{value:.3f}", text)


@pytest.mark.slow
def test_many_rounds_modules_clients_and_labels(tmp_path: Path) -> None:
    labels = tuple(f"label {place}" for place in range(90))
    many = {"num_rounds": 500, "num_modules": 200, "num_clients": 500, "every": 10, "labels": labels}
    report = write_report(make_run(tmp_path, loses_clients=True, **many))
    assert "outcomes" in check_figures(report)
    assert read_page(report).tags.count("tr") > 500
    assert report.page.stat().st_size < 3_000_000


def test_lost_clients_and_rounds_that_were_not_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path, every=100, num_finished=4, status="interrupted", loses_clients=True,
                   num_clients=8, labels=(), events=("client 0 was late",))  # fmt: skip
    report = write_report(run)
    page = read_page(report)
    assert check_figures(report) == ALWAYS | {"rank_by_round", "module_ranks", "bytes_total", "aggregation",
                                              "outcomes"}  # fmt: skip
    assert "interrupted after 4 of 6 rounds" in page.text
    assert "No accuracy was measured." in page.text
    assert "client 0 was late" in page.text
    assert "failed 2, late 2" in page.text


def test_a_method_without_ranks_that_is_still_running(tmp_path: Path) -> None:
    run = make_run(tmp_path, has_ranks=False, method="fedavg", num_finished=3, status="running",
                   has_baselines=False, training={"scope": "full"})  # fmt: skip
    report = write_report(run)
    page = read_page(report)
    assert not {"rank_by_round", "module_ranks", "aggregation", "bytes_total"} & check_figures(report)
    assert "after 3 of 6 rounds" in page.text
    assert "there are no LoRA ranks" in page.text
    assert "there is no LoRA rank." in page.text


def test_before_the_first_round_there_is_a_page_without_figures(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path, num_finished=0, status="failed"))
    assert report.figures == []
    assert "nothing to draw" in read_page(report).text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report(make_run(tmp_path_factory.mktemp("hostile"), **HOSTILE))  # type: ignore[arg-type]


def test_hostile_names_are_text(hostile: Report) -> None:
    check_figures(hostile)
    page = read_page(hostile)
    for text in (EVIL, HOSTILE["events"][0], "</td><script>alert(2)</script>", "0 <script>alert(3)</script>"):  # type: ignore[index]
        assert text in page.text, text


def test_a_configuration_of_another_version_is_shown_without_a_formula(tmp_path: Path) -> None:
    report = write_report(
        make_run(tmp_path, num_finished=0, info={"config": '{"new": {"key": 7}, "odd": 3}'})
    )
    text = read_page(report).text
    assert "does not know the run's configuration" in text
    assert "[new]key7" in text.replace(" ", "")
    report = write_report(make_run(tmp_path, num_finished=0, info={"config": "not JSON"}))
    assert "no configuration" in read_page(report).text


def test_a_folder_without_a_run_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold results.h5, got .*; name the --out of a"):
        write_report(tmp_path)


def test_without_matplotlib_one_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'mpifedlora\[plot\]'"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_renders_the_page_without_a_complaint(hostile: Report, tmp_path: Path) -> None:
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    )
    options += "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --window-size=700,900"
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [str(CHROMIUM), *options.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}",
         f"file://{hostile.page}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shot.stat().st_size > 20_000  # an empty page is smaller
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Refused to" in line]
    assert complaints == []


# Pieces of HTML


def test_what_is_not_html_is_escaped() -> None:
    assert safe("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
    assert element("p", Html("<b>x</b>"), "<i>", title='"') == '<p title="&quot;"><b>x</b>&lt;i&gt;</p>'
    assert "&lt;td&gt;" in table(["<td>"], [["a"]])


def test_numbers_stand_to_the_right() -> None:
    assert '<td class="n">7</td>' in table(["a", "b"], [["x", 7]], numeric=[1])
    assert "<thead>" not in table([], [["x"]])


def test_papers_become_links_and_nothing_else_does() -> None:
    text = link_papers("arXiv 2405.09394 v1 <arXiv 99>")
    assert text == '<a href="https://arxiv.org/abs/2405.09394">arXiv 2405.09394</a> v1 &lt;arXiv 99&gt;'


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("floor(1 + u(t))", "⌊1 + <i>u</i>(<i>t</i>)⌋"),
        ("floor((a + 1) * 2)", "⌊(<i>a</i> + 1) · 2⌋"),
        ("a^3", "<i>a</i><sup>3</sup>"),
        ("cos(pi)", "cos(π)"),
        ("a < b", "<i>a</i> &lt; <i>b</i>"),
    ],
)
def test_math(expression: str, shown: str) -> None:
    assert math(expression) == shown
