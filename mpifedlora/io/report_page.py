"""The HTML page of a run: its sections, from what the results hold. It loads nothing and runs nothing."""

from __future__ import annotations

import math as numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mpifedlora.core.curves import measured, measured_clients, summarise_clients
from mpifedlora.core.units import counted, human_bytes, human_time
from mpifedlora.io.client_figures import client_labels
from mpifedlora.io.figures import COLORS
from mpifedlora.io.html import Html, element, join, safe, table
from mpifedlora.io.panels import RunFigure
from mpifedlora.io.report_config import config_section, config_tables, formula_section, num_planned_rounds
from mpifedlora.io.results import Results
from mpifedlora.io.run_figures import has_ranks

_LONG_TABLE = 40
_STATUS = {
    "running": "When this page was made, the run was going on, or had been killed, after {} of {} rounds.",
    "interrupted": "This run was interrupted after {} of {} rounds; it can be resumed.",
    "failed": "This run failed after {} of {} rounds.",
}


class Drawn(NamedTuple):
    """A figure, and its SVG file's text."""

    figure: RunFigure
    svg: str


def page(results: Results, drawn: Sequence[Drawn], style: str) -> str:
    """Return the page of a run.

    Args:
        results: of the run.
        drawn: its figures.
        style: sheet for it.
    """
    info = results.info
    title = f"{info.method} on {info.dataset} with {info.model}"
    sections = [
        ("Figures", _figures(results, drawn)),
        ("Clients", _clients(results)),
        ("Events", _events(results)),
        ("Schedule", formula_section(info)),
        ("Configuration", config_section(info)),
        ("Environment", _environment(results)),
    ]
    links = (element("a", name, href=f"#{name.lower()}") for name, _ in sections)
    body = [
        element("header", _heading(results, title), element("nav", join(links))),
        _tiles(results),
        *(element("section", element("h2", name), content, id=name.lower()) for name, content in sections),
    ]
    head = join([
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", f"{title} - mpifedlora"),
        element("style", Html(style)),
    ])  # fmt: skip
    whole = element("html", element("head", head), element("body", element("main", join(body))), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def _heading(results: Results, title: str) -> Html:
    info, status = results.info, results.status
    parts = [
        element("h1", title, element("span", status, class_=f"status {status}")),
        element(
            "p", f"mpifedlora {info.package_version}, begun {info.created}, seed {info.seed}", class_="quiet"
        ),
    ]
    if status in _STATUS:
        words = _STATUS[status].format(len(results.rounds["round_num"]), num_planned_rounds(info) or "?")
        parts.append(element("p", words, class_="note"))
    return join(parts)


def _tiles(results: Results) -> Html:
    tiles = [element("div", element("dt", name), *(element("dd", word) for word in words if word))
             for name, *words in _facts(results)]  # fmt: skip
    return element("dl", join(tiles), class_="tiles")


def _facts(results: Results) -> Iterator[tuple[str, ...]]:
    rounds, base = results.rounds, results.baselines
    accuracy = measured(rounds, "eval_accuracy")
    if len(accuracy.values):
        best = int(accuracy.values.argmax())
        yield (
            "final accuracy",
            f"{accuracy.values[-1]:.3f}",
            f"best {accuracy.values[best]:.3f}, round {accuracy.round_nums[best]}",
        )
    up, down = (int(rounds[f"{way}_bytes"].sum()) for way in ("uplink", "downlink"))
    yield "bytes sent", human_bytes(up + down), f"{human_bytes(up)} up, {human_bytes(down)} down"
    if base is not None:
        for name, other, less in (
            ("full-model FedAvg", base.full_model_bytes, base.reduction_vs_full_model),
            ("fixed-rank LoRA", base.fixed_rank_bytes, base.reduction_vs_fixed_rank),
        ):
            yield f"vs {name}", less_or_more(less), f"which would send {human_bytes(other)}"
    finished = len(rounds["round_num"])
    spent = float(np.nansum(rounds["round_s"]))
    each = f"{human_time(spent / finished)} a round" if finished else ""
    yield "rounds", f"{finished} of {num_planned_rounds(results.info) or '?'}", each
    started = results.info.startup_s
    yield (
        "time in rounds",
        human_time(spent),
        "" if numbers.isnan(started) else f"and {human_time(started)} to start",
    )
    spent_epsilon = rounds["epsilon"][-1:]
    if finished and not np.isnan(spent_epsilon[0]):
        delta = config_tables(results.info).get("privacy", {}).get("delta", "?")
        words = (
            f"at delta {delta}" if results.info.is_private else "not private: the noise is seeded, or none"
        )
        yield "epsilon", f"{spent_epsilon[0]:.3g}", words
    yield "clients", str(results.info.num_clients), f"on {counted(results.info.num_workers, 'worker')}"


def less_or_more(share: float) -> str:
    """Write a reduction.

    >>> less_or_more(0.975), less_or_more(-0.5)
    ('97.50 % less', '50.00 % more')
    """
    return "-" if numbers.isnan(share) else f"{100 * abs(share):.2f} % {'more' if share < 0 else 'less'}"


def _figures(results: Results, drawn: Sequence[Drawn]) -> Html:
    if not drawn:
        return element("p", "No round was finished yet: there is nothing to draw.")
    cards = [
        element(
            "figure",
            element("h3", one.figure.title),
            inline_svg(one.svg, one.figure.name, one.figure.text),
            element("figcaption", one.figure.text),
        )
        for one in drawn
    ]
    return join([element("div", join(cards), class_="figures"), *_missing(results)])


def _missing(results: Results) -> Iterator[Html]:
    if not has_ranks(results):
        yield element("p", "The whole model is trained, so there are no LoRA ranks to show.", class_="quiet")
    if results.clients["participated"].all():
        yield element("p", "Every client's update was used in every round.", class_="quiet")
    if not len(measured(results.rounds, "eval_accuracy").values):
        yield element("p", "No accuracy was measured.", class_="quiet")
    if results.baselines is None:
        words = "The run has not come to compute what simpler runs would have sent."
        yield element("p", words, class_="quiet")


def inline_svg(svg: str, name: str, text: str) -> Html:
    """Return an SVG file's drawing for a page: its ids made its own, its colours those of the page's style.

    Args:
        svg: text of the file, as matplotlib writes it.
        name: unlike that of any other figure of the page.
        text: what it shows.
    """
    drawing = svg[svg.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    drawing = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", drawing)
    drawing = re.sub(r'(<path[^>]*style="fill: )#ffffff', r"\1none", drawing)
    for place, color in enumerate(COLORS[:-1]):
        drawing = drawing.replace(color.lower(), f"var(--c{place})")
    drawing = drawing.replace("#000000", "currentColor").replace("#7f7f7f", "var(--shade)")
    drawing = re.sub(r'\swidth="[\d.]+pt"', "", re.sub(r'\sheight="[\d.]+pt"', "", drawing, count=1), count=1)
    return Html(drawing.replace("<svg", f'<svg role="img" aria-label="{safe(text)}"', 1).strip())


def _clients(results: Results) -> Html:
    info, found = results.info, measured_clients(results.clients)
    rows, names = [], client_labels(info)
    for one in summarise_clients(results.clients, info.label_table):
        others = ", ".join(f"{name} {count}" for name, count in one.others.items()) or "-"
        rows.append((
            names[one.client_id],
            one.num_examples or "-",
            f"{one.num_used} of {len(results.rounds['round_num'])}",
            _number(one.last_loss),
            *([] if found is None else [_number(float(found[1][one.client_id]))]),
            _number(one.mean_s, 1),
            _number(one.total_s, 1),
            others,
        ))  # fmt: skip
    head = (
        "client",
        "examples",
        "rounds used",
        "last loss",
        *([] if found is None else [found[0] if found[0] == "accuracy" else "evaluation loss"]),
        "s a round",
        "s in all",
        "left out",
    )
    words = (
        "Examples are the client's training examples, the loss is that of its last update that was used. "
        "Left out: how often an update was not used, and why (an absence does not count)."
    )
    if found is not None:
        words += f" The {head[4]} is the last that was measured on the client's own examples."
    made = table(head, rows, numeric=range(1 if info.client_names else 0, len(head) - 1))
    if len(rows) > _LONG_TABLE:
        made = element("div", made, class_="tall")
    return join([made, element("p", words, class_="quiet")])


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if numbers.isfinite(value) else "-"


def _events(results: Results) -> Html:
    if not results.events:
        return element("p", "Nothing out of the ordinary: no warning, no resumption.")
    made = table(("time", "rounds finished", "what"), results.events, numeric=(1,))
    return element("div", made, class_="tall") if len(results.events) > _LONG_TABLE else made


def _environment(results: Results) -> Html:
    info = results.info
    facts: Mapping[str, object] = {
        "mpifedlora": info.package_version,
        "MPI library": info.mpi_library,
        "survives lost workers (ULFM)": _yes(info.survives_lost_workers),
        "server": info.devices[0] if info.devices else "-",
        "workers": _counted(info.devices[1:]) or "in the server's process",
        "updates": info.collect,
        "sent as": f"{info.uplink_dtype} up, {info.downlink_dtype} down",
        "GPU buffers": info.gpu_buffers,
        "start": "-"
        if numbers.isnan(info.startup_s)
        else f"{info.startup_s:.1f} s from the launch to round 1",
        "same bits for any number of workers": _yes(info.reproducible),
        "clients protected by noise": _yes(info.is_private),
        "measured": _measured(results),
        "results format": info.format_version,
    }
    return table((), list(facts.items()))


def _measured(results: Results) -> str:
    if results.info.eval_model == "personal":
        return "each client's own model"
    own = ", on what each client has held out" if results.clients["num_evaluated"].any() else ""
    return f"the global model{own}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _counted(names: Sequence[str]) -> str:
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
