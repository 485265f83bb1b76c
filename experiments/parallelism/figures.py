"""The pictures of make parallelism, from the record alone."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tpmlp
from experiments.parallelism.finding import (
    GIGABYTE,
    MEBIBYTE,
    TENSOR,
    caption_of_modelled,
    each_devices,
    of_bytes,
    of_measured,
)
from experiments.parallelism.schedules import SHOWN
from experiments.parallelism.ways import CHUNKS, SCHEDULES, Row

Record = Mapping[str, Any]

# The ways of the curves; of the others only the best mixture is drawn.
COLORS = {
    TENSOR: "black",
    "gpipe": "C7",
    "1f1b": "C0",
    "interleaved": "C4",
    "zb-h1": "C1",
    "zb-h2": "C3",
    "zb-v": "C2",
}
DRAWN = (TENSOR, "1f1b", "zb-h1", "zb-v")
MIXTURE = "C9"
WRAP = 118


def figures(record: Record) -> dict[str, Figure]:
    """Return the figures of the parts that a record has, by name."""
    found = {}
    if record.get("counted"):
        found["counted"] = plot_counted(record)
    if record.get("modelled"):
        found["modelled"] = plot_modelled(record)
    if record.get("measured"):
        found["measured"] = plot_measured(record)
    if record.get("schedules"):
        p, m = SHOWN
        found["schedules"] = tpmlp.plot_schedules(
            [tpmlp.make_schedule(name, p, m, CHUNKS.get(name, 1)) for name in SCHEDULES]
        )
    return found


def plot_counted(record: Record) -> Figure:
    """Draw bytes and memory of every way, counted, with what is predicted."""
    rows = record["counted"]
    devices = each_devices(rows)
    figure = Figure(figsize=(12, 7), layout="constrained")
    grid = figure.subplots(2, len(devices), squeeze=False)
    for moved, held, number in zip(*grid, devices, strict=True):
        mine = [row for row in rows if row["devices"] == number][::-1]
        _bars(moved, mine, "bytes", "in the program, counted", "C0")
        _marks(moved, mine, "received_bytes", "received, busiest stage", "|", "C3")
        _marks(moved, mine, "needed", "of that needed", "x", "C3")
        _bars(held, mine, "held_bytes", "held, counted", "C2")
        moved.set_title(f"M = {number}")
        moved.set_xlabel("MiB received in a step")
        held.set_xlabel("MiB held on a device in a step")
    names: dict[str, Any] = {}
    for axes in grid[:, 0]:
        handles, labels = axes.get_legend_handles_labels()
        names |= dict(zip(labels, handles, strict=True))
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=5)
    figure.suptitle(textwrap.fill(of_bytes(record), WRAP + 20), fontsize="medium")
    return figure


def _bars(axes: Axes, rows: Sequence[Row], name: str, label: str, color: str) -> None:
    places = range(len(rows))
    axes.barh(places, [_mebibytes(r, name) for r in rows], color=color, alpha=0.5, label=label)
    _marks(axes, rows, f"predicted_{name}", "predicted", "d", "black")
    axes.set_yticks(places, [row["way"] for row in rows])
    axes.grid(axis="x", alpha=0.3)


def _marks(axes: Axes, rows: Sequence[Row], name: str, label: str, marker: str, color: str) -> None:
    values = [_mebibytes(row, name) for row in rows]
    size = 9 if marker == "|" else 4
    axes.plot(values, range(len(rows)), marker, color=color, markersize=size, label=label)


def _mebibytes(row: Row, name: str) -> float:
    if name == "needed":
        received = row["received_bytes"] - row["message_bytes"] + row["needed_message_bytes"]
        return received / MEBIBYTE
    return row[name] / MEBIBYTE


def plot_modelled(record: Record) -> Figure:
    """Draw time against the link for every M, and where it turns against microbatches."""
    rows = record["modelled"]
    devices = each_devices(rows)
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    grid = list(figure.subplots(2, (len(devices) + 2) // 2, squeeze=False).flat)
    times, turning, unused = grid[: len(devices)], grid[len(devices)], grid[len(devices) + 1 :]
    for axes in unused:
        axes.remove()
    for axes, number in zip(times, devices, strict=True):
        _times(axes, record, [row for row in rows if row["devices"] == number], number)
    _turning(turning, record)
    figure.legend(*times[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(textwrap.fill(caption_of_modelled(record), WRAP), fontsize="medium")
    return figure


def _times(axes: Axes, record: Record, rows: Sequence[Row], devices: int) -> None:
    """Draw what a step takes beyond its products, for each way."""
    bandwidths = sorted({row["bytes_per_s"] for row in rows})
    by_way: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["bytes_per_s"]):
        by_way.setdefault(row["way"], []).append(row)
    gigabytes = [b / GIGABYTE for b in bandwidths]
    for way in DRAWN:
        mine = by_way[way]
        in_step = [row["lockstep_s"] / row["ideal_s"] for row in mine]
        label = way if way == TENSOR else f"{way}, a process a stage"
        alone = [row["asynchronous_s"] / row["ideal_s"] for row in mine]
        axes.plot(gigabytes, alone, color=COLORS[way], label=label)
        if way != TENSOR:
            axes.plot(gigabytes, in_step, ":", color=COLORS[way], label=f"{way}, in step")
    if mixtures := [mine for way, mine in by_way.items() if " x " in way]:
        best = [
            min(r["asynchronous_s"] / r["ideal_s"] for r in at)
            for at in zip(*mixtures, strict=True)
        ]
        axes.plot(gigabytes, best, "--", color=MIXTURE, label="best mixture")
    m = record["config"]["microbatches"]
    for row in record["turning"]:
        if (row["devices"], row["microbatches"]) != (devices, m) or row["schedule"] not in DRAWN:
            continue
        if row["bytes_per_s"] is not None and bandwidths[0] < row["bytes_per_s"] < bandwidths[-1]:
            tensor = _interpolate(by_way[TENSOR], row["bytes_per_s"])
            axes.plot(
                row["bytes_per_s"] / GIGABYTE, tensor, "o", color=COLORS[row["schedule"]], zorder=3
            )
    _links(axes, record, vertical=True)
    axes.set_xscale("log")
    axes.set_ylim(0.98, max(2.0, 1.3 + devices / 8))
    axes.set_xlim(gigabytes[0], gigabytes[-1])
    axes.set_xlabel("link, GB/s that a device receives")
    axes.set_ylabel("time of a step / time of its products")
    axes.set_title(f"M = {devices}, m = {m}: dots, where tensor parallel turns faster", fontsize=10)
    axes.grid(alpha=0.3)


def _interpolate(rows: Sequence[Row], bytes_per_s: float) -> float:
    """Return tensor parallel's time at a link; it is linear in seconds a byte."""
    first, last = rows[0], rows[-1]
    x0, x1, x = (1 / b for b in (first["bytes_per_s"], last["bytes_per_s"], bytes_per_s))
    y0, y1 = (row["asynchronous_s"] / row["ideal_s"] for row in (first, last))
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _turning(axes: Axes, record: Record) -> None:
    """Draw the turning point against the number of microbatches."""
    rows = [row for row in record["turning"] if row["schedule"] in DRAWN]
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        mine = [row for row in rows if row["schedule"] == schedule]
        for devices, marker in zip(each_devices(mine), "osD^v", strict=False):
            points = [r for r in mine if r["devices"] == devices and r["bytes_per_s"]]
            axes.plot(
                [row["microbatches"] for row in points],
                [row["bytes_per_s"] / GIGABYTE for row in points],
                marker,
                color=COLORS[schedule],
                alpha=0.6,
                markersize=5,
                label=f"{schedule}, M = {devices}",
            )
        line = sorted({(r["microbatches"], r["theory_bytes_per_s"] / GIGABYTE) for r in mine})
        axes.plot(
            *zip(*line, strict=True),
            color=COLORS[schedule],
            linewidth=1,
            label=f"{schedule}, theory",
        )
    _links(axes, record, vertical=False)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row["microbatches"] for row in rows})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_xlabel("microbatches m")
    axes.set_ylabel("turning point, GB/s")
    axes.set_title("Tensor parallel is faster above; a process a stage", fontsize=10)
    axes.legend(fontsize=7, ncols=2, loc="upper left")
    axes.grid(alpha=0.3)


def _links(axes: Axes, record: Record, *, vertical: bool) -> None:
    """Mark the links of the chip."""
    for name, bytes_per_s in record["links"].items():
        place = bytes_per_s / GIGABYTE
        if vertical:
            axes.axvline(place, color="grey", linewidth=0.8)
            where, turn, align = (place, 0.98), 90, "top"
            transform = axes.get_xaxis_transform()
        else:
            axes.axhline(place, color="grey", linewidth=0.8)
            where, turn, align = (0.99, place), 0, "bottom"
            transform = axes.get_yaxis_transform()
        axes.text(
            *where,
            name,
            rotation=turn,
            fontsize=8,
            color="grey",
            ha="right",
            va=align,
            transform=transform,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )


def plot_measured(record: Record) -> Figure:
    """Draw every round of every way, with what the model says of these two processes."""
    runs = record["measured"]
    figure = Figure(figsize=(9, 1.4 + 3.2 * len(runs)), layout="constrained")
    panels = list(figure.subplots(len(runs), squeeze=False).flat)
    for axes, run in zip(panels, runs, strict=True):
        _rounds(axes, run["rows"])
        axes.set_title(f"m = {run['microbatches']}", fontsize=10)
    panels[-1].set_xlabel("way to use two processes, each with a core and a thread")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(textwrap.fill(of_measured(record), 105), fontsize="medium")
    return figure


def _rounds(axes: Axes, rows: Sequence[Row]) -> None:
    places = range(len(rows))
    axes.bar(places, [r["median_s"] for r in rows], alpha=0.5, label="median, measured")
    for place, row in zip(places, rows, strict=True):
        label = "a round" if place == 0 else ""
        seconds = row["seconds"]
        axes.plot([place] * len(seconds), seconds, ".", color="C0", markersize=4, label=label)
    for name, marker, label in (
        ("predicted_s", "d", "modelled, in step"),
        ("predicted_asynchronous_s", "_", "modelled, a process a stage"),
    ):
        values = [row[name] for row in rows]
        axes.plot(places, values, marker, color="black", markersize=8, label=label)
    axes.set_xticks(places, [row["way"] for row in rows])
    axes.set_ylabel("seconds of a step")
    axes.set_ylim(0, None)
