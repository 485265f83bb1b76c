"""The figure of make bench: every ratio with its spread, and the targets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.bench import targets
from experiments.bench.summary import Comparison, Ratio

MARKERS = {"float32": "o", "bfloat16": "s"}
COLORS = {"float32": "C0", "bfloat16": "C1"}
GAP = 1  # between the groups of one number of devices

Panel = tuple[Axes, str, Callable[[Comparison], Ratio], Mapping[int, float]]


def plot_ratios(
    comparisons: Sequence[Comparison],
    verdicts: Sequence[targets.Verdict],
    machine: Mapping[str, Any],
) -> Figure:
    """Draw time over the best automatic partitioning, and over one device, and temporaries.

    Args:
        comparisons: of the default strategy.
        verdicts: on them; the caption tells them.
        machine: what it was measured on.
    """
    places = _places(comparisons)
    figure = Figure(figsize=(max(8.0, 0.55 * len(places) + 3), 10), layout="constrained")
    time, single, memory = figure.subplots(3, sharex=True)
    panels: tuple[Panel, ...] = (
        (time, "time / best automatic", lambda c: c.to_automatic, targets.TIME_TO_AUTOMATIC),
        (single, "time / one device", lambda c: c.to_unsharded, targets.TIME_TO_UNSHARDED),
        (memory, "temporaries / leanest automatic", _temporaries, targets.TEMPORARIES_TO_AUTOMATIC),
    )
    for axes, label, ratio, bounds in panels:
        for dtype in dict.fromkeys(c.dtype for c in comparisons):
            mine = [c for c in comparisons if c.dtype == dtype]
            _ratios(axes, places, mine, [ratio(c) for c in mine], dtype)
            _means(axes, places, mine, [ratio(c) for c in mine], dtype)
            if axes is time:
                _floor(axes, places, mine, dtype)
        _targets(axes, places, bounds)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel(label)
        # Room above for the name of a target.
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    memory.set_xticks(
        list(places.values()), [f"{size}, M={devices}" for devices, size in places], rotation=90
    )
    memory.set_xlabel("d x layers x samples, number of devices M")
    figure.suptitle(caption(verdicts, machine), fontsize="medium")
    return figure


def caption(verdicts: Sequence[targets.Verdict], machine: Mapping[str, Any]) -> str:
    """Return what the figure shows, in words that the data choose."""
    judged = [verdict for verdict in verdicts if verdict.judged]
    reached = sum(verdict.holds for verdict in judged)
    times = [v for v in judged if "best automatic" in v.what]
    return "\n".join(
        (
            f"One default Strategy() on simulated devices: {reached} of {len(judged)} targets "
            "reached",
            *(f"{v.what}: {v.value:.2f} in the mean (target {v.bound:.2f})" for v in times),
            f"{machine['cores']} cores of {machine['cpu']}, which all devices share; bars are "
            "quartiles of the rounds",
        )
    )


def _temporaries(comparison: Comparison) -> Ratio:
    return Ratio(rounds=(comparison.temporaries,))


def _places(comparisons: Sequence[Comparison]) -> dict[tuple[int, str], int]:
    """Return where each cell stands: by number of devices, with a gap between, then by size."""
    found: dict[tuple[int, str], int] = {}
    devices = sorted({c.devices for c in comparisons})
    for index, number in enumerate(devices):
        for size in dict.fromkeys(str(c.size) for c in comparisons if c.devices == number):
            found[number, size] = len(found) + GAP * index
    return found


def _ratios(
    axes: Axes,
    places: Mapping[tuple[int, str], int],
    comparisons: Sequence[Comparison],
    ratios: Sequence[Ratio],
    dtype: str,
) -> None:
    medians = [ratio.median for ratio in ratios]
    low = [ratio.median - ratio.quartiles[0] for ratio in ratios]
    high = [ratio.quartiles[1] - ratio.median for ratio in ratios]
    axes.errorbar(
        _positions(places, comparisons, dtype),
        medians,
        yerr=(low, high),
        fmt=MARKERS[dtype],
        color=COLORS[dtype],
        capsize=3,
        label=f"{dtype}, median and quartiles",
    )


def _means(
    axes: Axes,
    places: Mapping[tuple[int, str], int],
    comparisons: Sequence[Comparison],
    ratios: Sequence[Ratio],
    dtype: str,
) -> None:
    """Draw the geometric mean over the cells of each number of devices."""
    positions = _positions(places, comparisons, dtype)
    label = f"{dtype}, geometric mean"
    for devices in sorted({c.devices for c in comparisons}):
        chosen = [index for index, c in enumerate(comparisons) if c.devices == devices]
        mean = Ratio.geometric_mean(ratios[index] for index in chosen).median
        where = [positions[index] for index in chosen]
        ends = min(where) - 0.4, max(where) + 0.4
        axes.plot(ends, (mean, mean), color=COLORS[dtype], alpha=0.6, label=label)
        label = ""


def _floor(
    axes: Axes,
    places: Mapping[tuple[int, str], int],
    comparisons: Sequence[Comparison],
    dtype: str,
) -> None:
    floors = [c.floor.median if c.floor else float("nan") for c in comparisons]
    axes.plot(
        _positions(places, comparisons, dtype),
        floors,
        "_",
        color=COLORS[dtype],
        markersize=12,
        label=f"{dtype}, the products alone: the floor",
    )


def _targets(
    axes: Axes, places: Mapping[tuple[int, str], int], bounds: Mapping[int, float]
) -> None:
    for devices, bound in bounds.items():
        where = [place for (number, _), place in places.items() if number == devices]
        if where:
            axes.hlines(bound, min(where) - 0.5, max(where) + 0.5, color="C3", linestyle="--")
            axes.annotate(
                f"target of the mean {bound:.2f}",
                (min(where) - 0.5, bound),
                xytext=(0, 3),
                textcoords="offset points",
                color="C3",
                fontsize="small",
            )


def _positions(
    places: Mapping[tuple[int, str], int], comparisons: Sequence[Comparison], dtype: str
) -> list[float]:
    shift = -0.12 if dtype == "float32" else 0.12
    return [places[c.devices, str(c.size)] + shift for c in comparisons]
