"""The figures of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpifedlora.core.curves import (
    Curve,
    Span,
    common_path,
    measured,
    sent_bytes,
    stage_spans,
    time_by_phase,
)
from mpifedlora.core.units import human_bytes
from mpifedlora.io.client_figures import client_figures
from mpifedlora.io.figures import COLORS
from mpifedlora.io.panels import (
    INK,
    MANY_POINTS,
    SHADE,
    RunFigure,
    byte_axis,
    byte_unit,
    draw_curve,
    draw_map,
    draw_stack,
    label_ends,
    legend_above,
    name_rows,
    rank_axis,
    round_axis,
    shade_stages,
    share_axis,
    shorten,
)
from mpifedlora.io.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def run_figures(results: Results) -> list[RunFigure]:
    """Return the figures that a run has something to say in, in the order of the page."""
    if not len(results.rounds["round_num"]):
        return []
    parts = (_learning, _metrics, _ranks, _traffic, _losses, client_figures, _time)
    return [figure for part in parts for figure in part(results)]


def _learning(results: Results) -> Iterator[RunFigure]:
    for key, name, draw in (("eval_accuracy", "accuracy", _accuracy), ("train_loss", "loss", _loss)):
        known = measured(results.rounds, key)
        if not len(known.values):
            continue
        what = name if name == "accuracy" else "training loss"
        for by, words in (("round", "by round"), ("bytes", "by bytes sent")):
            text = f"{what} {words}: {known.values[-1]:.3f} after round {known.round_nums[-1]}.".capitalize()
            yield RunFigure(
                f"{name}_by_{by}", f"{name} {words}".capitalize(), text, partial(draw, results, by)
            )


def _metrics(results: Results) -> Iterator[RunFigure]:
    for place, name in enumerate(results.info.metric_names):
        curve = _metric(results, place)
        if len(curve.values):
            text = f"{name} by round: {curve.values[-1]:.4g} after round {curve.round_nums[-1]}."
            yield RunFigure(
                f"metric_{place}", f"{name} by round", text, partial(_draw_metric, results, place)
            )


def _metric(results: Results, place: int) -> Curve:
    return measured({**results.rounds, "metric": results.rounds["eval_metrics"][:, place]}, "metric")


def _draw_metric(results: Results, place: int, figure: Figure) -> None:
    axes, curve = figure.subplots(), _metric(results, place)
    draw_curve(axes, curve.round_nums, curve.values, COLORS[place % len(COLORS)])
    round_axis(axes, results.rounds["round_num"])
    shade_stages(axes, _spans(results))
    if float(curve.values.min()) >= 0:
        axes.set_ylim(0, float(curve.values.max()) * 1.08 or 1)
    axes.set_ylabel(shorten(results.info.metric_names[place], 30))


def _accuracy(results: Results, by: str, figure: Figure) -> None:
    lines = [("accuracy", "eval_accuracy"), ("macro-F1", "eval_macro_f1")]
    axes = _curves(results, by, lines, figure)
    values = np.concatenate([measured(results.rounds, key).values for _, key in lines])
    share_axis(axes, values, f"of the {results.info.eval_model} model (0 to 1)")
    _label(axes, results, lines)


def _loss(results: Results, by: str, figure: Figure) -> None:
    lines = [("training", "train_loss"), ("evaluation", "eval_loss")]
    axes = _curves(results, by, lines, figure)
    axes.set_ylabel("loss (nats)")
    values = np.concatenate([measured(results.rounds, key).values for _, key in lines])
    if float(values.max()) > 0:
        axes.set_ylim(0, float(values.max()) * 1.08)
    _label(axes, results, lines)


def _curves(results: Results, by: str, lines: list[tuple[str, str]], figure: Figure) -> Axes:
    axes = figure.subplots()
    if by == "round":
        round_axis(axes, results.rounds["round_num"])
        shade_stages(axes, _spans(results))
        unit = 1.0
    else:
        unit = byte_axis(axes, float(sent_bytes(results.rounds)[-1]))
    for index, (_, key) in enumerate(lines):
        curve = measured(results.rounds, key)
        x = curve.round_nums if by == "round" else curve.sent_bytes / unit
        draw_curve(axes, x, curve.values, COLORS[index])
    return axes


def _label(axes: Axes, results: Results, lines: list[tuple[str, str]]) -> None:
    curves = [(name, measured(results.rounds, key).values, COLORS[i]) for i, (name, key) in enumerate(lines)]
    label_ends(axes, [(float(values[-1]), name, color) for name, values, color in curves if len(values)])


def _spans(results: Results) -> list[Span]:
    spans = stage_spans(results.rounds["round_num"].tolist(), results.rounds["stage"].tolist())
    # A run of one stage that anneals nothing has no stages to speak of.
    return spans if len(spans) > 1 or spans[0].stage == "initiating" else []


def has_ranks(results: Results) -> bool:
    """Say whether any round had LoRA ranks."""
    return bool((results.rounds["module_ranks"] > 0).any())


def _ranks(results: Results) -> Iterator[RunFigure]:
    if not has_ranks(results):
        return
    ranks = results.rounds["lora_rank_mean"]
    text = f"Temperature, and mean LoRA rank: {ranks[0]:.3g} in the first round, {ranks[-1]:.3g} in the last."
    yield RunFigure("rank_by_round", "Temperature and LoRA rank", text, partial(_rank, results), (5.4, 4.4))
    names = results.info.module_names
    text = f"LoRA rank of each of {len(names)} modules in each round."
    height = 1.4 + 0.11 * min(48, max(18, len(names)))
    yield RunFigure(
        "module_ranks", "LoRA rank by module", text, partial(_module_ranks, results), (5.4, height)
    )


def _rank(results: Results, figure: Figure) -> None:
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(1, 1.4))
    round_nums = results.rounds["round_num"]
    for axes, key, color in ((upper, "temperature", COLORS[1]), (lower, "lora_rank_mean", COLORS[0])):
        values = results.rounds[key]
        draw_curve(axes, round_nums, values, color)
        round_axis(axes, round_nums, is_named=axes is lower)
        shade_stages(axes, _spans(results), is_named=axes is upper)
    upper.set_ylim(0, 1.05)
    upper.set_ylabel("temperature")
    ranks = results.rounds["module_ranks"]
    if len(ranks) > 1 and (ranks != ranks[:, :1]).any():
        low, high = ranks.min(axis=1), ranks.max(axis=1)
        lower.fill_between(round_nums, low, high, color=COLORS[0], alpha=0.2, linewidth=0, label="min to max")
        lower.legend(loc="best", fontsize="small")
    rank_axis(lower, float(ranks.max()))


def _module_ranks(results: Results, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    axes, ranks = figure.subplots(), results.rounds["module_ranks"]
    image = draw_map(axes, ranks.T, results.rounds["round_num"], cmap="viridis", vmin=0, vmax=ranks.max())
    round_axis(axes, results.rounds["round_num"])
    name_rows(axes, common_path(results.info.module_names))
    bar = figure.colorbar(image, ax=axes, label="LoRA rank", fraction=0.05, pad=0.02)
    bar.locator = MaxNLocator(nbins=6, integer=True)
    bar.update_ticks()


def _traffic(results: Results) -> Iterator[RunFigure]:
    up, down = (float(results.rounds[f"{way}_bytes"].sum()) for way in ("uplink", "downlink"))
    text = f"Bytes by round: {human_bytes(int(up))} up and {human_bytes(int(down))} down in all."
    yield RunFigure("bytes_by_round", "Bytes by round", text, partial(_bytes, results))
    if results.baselines is not None:
        less = results.baselines.reduction_vs_full_model
        text = f"Bytes in all, against two simpler runs: {100 * less:.2f} % less than full-model FedAvg."
        yield RunFigure("bytes_total", "Bytes of the whole run", text, partial(_bytes_total, results))


def _bytes(results: Results, figure: Figure) -> None:
    axes, rounds, base = figure.subplots(), results.rounds, results.baselines
    parts = {name: rounds[f"{name}link_bytes"].astype(float) for name in ("up", "down")}
    highest = float((parts["up"] + parts["down"]).max())
    lines = (
        [] if base is None else [("fixed rank", base.fixed_rank_bytes), ("full model", base.full_model_bytes)]
    )
    shown = [(name, total / len(rounds["round_num"])) for name, total in lines]
    shown = [(name, mean) for name, mean in shown if 0 < mean <= 3 * highest]
    unit, unit_name = byte_unit(max([highest, *(mean for _, mean in shown)]))
    draw_stack(axes, rounds["round_num"], {name: part / unit for name, part in parts.items()})
    for (name, mean), dashes in zip(shown, ("--", ":"), strict=False):
        axes.axhline(mean / unit, color=INK, linestyle=dashes, linewidth=1.5, label=f"{name}, mean")
    axes.set_ylim(0, max([highest, *(mean for _, mean in shown)]) / unit * 1.08 or 1)
    axes.set_ylabel(f"a round, all clients ({unit_name})")
    round_axis(axes, rounds["round_num"])
    legend_above(axes, 4)


def _bytes_total(results: Results, figure: Figure) -> None:
    axes, base = figure.subplots(), results.baselines
    assert base is not None
    totals = [base.sent_bytes, base.fixed_rank_bytes, base.full_model_bytes]
    lost = [np.nan, base.reduction_vs_fixed_rank, base.reduction_vs_full_model]
    names = ["this run", "LoRA at a\nfixed rank", "FedAvg on the\nwhole model"]
    unit, unit_name = byte_unit(max(totals))
    axes.barh(names, [total / unit for total in totals], color=(COLORS[0], SHADE, SHADE), height=0.6)
    for place, (total, less) in enumerate(zip(totals, lost, strict=True)):
        words = human_bytes(total) + ("" if np.isnan(less) else f"\n{_less(less)}")
        is_long = total > 0.6 * max(totals)
        axes.annotate(words, (total / unit, place), (-6 if is_long else 6, 0), textcoords="offset points",
                      ha="right" if is_long else "left", va="center", fontsize="small",
                      color="#FFFFFF" if is_long else INK)  # fmt: skip
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"sent in all rounds, up and down ({unit_name})")


def _less(share: float) -> str:
    return f"this run: {100 * abs(share):.2f} % {'more' if share < 0 else 'less'}"


def _losses(results: Results) -> Iterator[RunFigure]:
    if has_ranks(results) and np.isfinite(results.rounds["dropped_energy"]).any():
        error, energy = (
            measured(results.rounds, key).values for key in ("aggregation_error", "dropped_energy")
        )
        words = [f"aggregation error at most {error.max():.2g}"] if len(error) else []
        text = ", ".join([*words, f"dropped energy at most {energy.max():.2g}"]).capitalize() + "."
        title = "What aggregating and cutting lose"
        yield RunFigure("aggregation", title, text, partial(_aggregation, results), (5.4, 4.4))


def _aggregation(results: Results, figure: Figure) -> None:
    upper, lower = figure.subplots(2, sharex=True)
    round_nums = results.rounds["round_num"]
    named = (
        (upper, "aggregation_error", "error of the sum\n(relative norm)"),
        (lower, "dropped_energy", "energy dropped\n(share of norm²)"),
    )
    for index, (axes, key, name) in enumerate(named):
        curve = measured(results.rounds, key)
        draw_curve(axes, curve.round_nums, curve.values, COLORS[index])
        highest = float(curve.values.max()) if len(curve.values) else 0.0
        axes.set_ylim(0, highest * 1.1 if highest > 1e-6 else 1)
        if highest <= 1e-6:
            said = "0 in every round (below 1e-6)" if len(curve.values) else "not known to the server"
            axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", color=SHADE)
        axes.set_ylabel(name)
        round_axis(axes, round_nums, is_named=axes is lower)
        shade_stages(axes, _spans(results), is_named=axes is upper)


def _time(results: Results) -> Iterator[RunFigure]:
    phases = time_by_phase(results.rounds)
    total = sum(float(part.sum()) for part in phases.seconds.values())
    share = 100 * float(phases.seconds["train"].sum()) / total if total else 0.0
    text = f"Seconds of each round by what they went to: {share:.0f} % to training."
    yield RunFigure("time_by_round", "Where the time goes", text, partial(_seconds, results))


def _seconds(results: Results, figure: Figure) -> None:
    axes, phases = figure.subplots(), time_by_phase(results.rounds)
    round_nums = results.rounds["round_num"]
    draw_stack(axes, round_nums, phases.seconds)
    shown = phases.evaluate_s > 0
    if shown.any():
        size = 36 if shown.sum() <= MANY_POINTS else 6
        name = "evaluate (alongside)"
        axes.scatter(round_nums[shown], phases.evaluate_s[shown], size, INK, marker="x", label=name, zorder=3)
        axes.set_ylim(0, max(axes.get_ylim()[1], float(phases.evaluate_s.max()) * 1.06))
    axes.set_ylabel("seconds a round")
    round_axis(axes, round_nums)
    legend_above(axes, 3)


OVERVIEW_SIZE = (10.0, 3.6)


def draw_overview(results: Results) -> Callable[[Figure], None]:
    """Return what draws accuracy by bytes, and beside it the rank (or the bytes) by round."""

    def draw(figure: Figure) -> None:
        halves: Any = figure.subfigures(1, 2)
        left, right = halves
        (_accuracy if len(measured(results.rounds, "eval_accuracy").values) else _loss)(
            results, "bytes", left
        )
        _rank_alone(results, right) if has_ranks(results) else _bytes(results, right)

    return draw


def _rank_alone(results: Results, figure: Any) -> None:
    axes, ranks = figure.subplots(), results.rounds["lora_rank_mean"]
    draw_curve(axes, results.rounds["round_num"], ranks, COLORS[0])
    round_axis(axes, results.rounds["round_num"])
    shade_stages(axes, _spans(results))
    rank_axis(axes, float(ranks.max()))
