"""The table and the picture, from the record alone."""

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

from tpmlp.table import text_table

Row = dict[str, Any]
MEBIBYTE, GIBIBYTE = 2**20, 2**30
COLORS = {"shard": "C0", "gathered": "C1", "recompute": "C2", "update": "C3"}


def table(rows: Iterable[Row]) -> str:
    """Return what every program holds and moves, for one device."""
    headers = (
        "hardware",
        "layers",
        "parameters",
        "keep",
        "result",
        "compile s",
        "CPU s",
        "temp MiB",
        "temp / predicted",
        "peak MiB",
        "gathers",
        "written",
        "moved MiB",
        "predicted",
        "scatters turned",
        "hops overlapped",
    )
    return text_table(headers, map(_cells, rows))


def _cells(row: Row) -> tuple[object, ...]:
    mebibytes = {name: f"{row[name] / MEBIBYTE:.1f}" for name in row if name.endswith("bytes")} | {
        "predicted": f"{row['bytes_predicted'] / MEBIBYTE:.1f}"
    }
    target = f" (<= {row['target_s']:.0f})" if row["target_s"] else ""
    overlap = "" if row["overlap"] == "none" else f", {row['overlap']}"
    turned = f"{row['turned']} of {row['counts_predicted'].get('reduce_scatter', 0)}"
    hops = f"{row['permutes_overlapping']} of {row['permutes']}" if overlap else "-"
    return (
        row["hardware"],
        row["layers"],
        row["dtype"],
        row["keep"] + overlap,
        row["result"],
        f"{row['compile_s']:.1f}{target}",
        f"{row['compile_cpu_s']:.1f}",
        mebibytes["temp_bytes"],
        _temp_ratio(row),
        mebibytes["peak_bytes"],
        row["counts"].get("all_gather", 0),
        row["counts_predicted"].get("all_gather", 0),
        mebibytes["bytes"],
        mebibytes["predicted"],
        turned if row["counts_predicted"].get("reduce_scatter") else "-",
        hops,
    )


def _temp_ratio(row: Row) -> str:
    """Return compiled over predicted; an update and a ring have no prediction."""
    predicted = row["temp_bytes_predicted"]
    return f"{row['temp_bytes'] / predicted:.2f}" if predicted else "-"


def plot(rows: Sequence[Row]) -> Figure:
    """Draw temporaries by what is kept, beside one array a layer, for each network and hardware."""
    shown = [r for r in rows if r["overlap"] == "none" and r["dtype"] == r["compute_dtype"]]
    shown = [r for r in shown if r["hardware"] not in {ring["hardware"] for ring in _rings(rows)}]
    groups = list(dict.fromkeys((r["layers"], r["hardware"]) for r in shown))
    figure = Figure(figsize=(max(7, 1.8 * len(groups)), 5), layout="constrained")
    axes = figure.add_subplot()
    for index, group in enumerate(groups):
        _bars(axes, index, [r for r in shown if (r["layers"], r["hardware"]) == group])
    names = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(names.values(), names.keys())
    labels = [f"{layers} layers,\n{hardware}" for layers, hardware in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.set_yscale("log")
    axes.set_ylabel("temporaries on one device, GiB")
    axes.set_xlabel("network and hardware it is compiled for")
    axes.set_title(caption(shown))
    return figure


def caption(rows: Iterable[Row]) -> str:
    """Return what the figure shows, in words that the data choose."""
    temps: dict[tuple[int, str], dict[str, int]] = {}
    for r in rows:
        if r["result"] == "gradients":
            temps.setdefault((r["layers"], r["hardware"]), {})[r["keep"]] = r["temp_bytes"]
    shares = [t["gathered"] / t["shard"] for t in temps.values() if {"gathered", "shard"} <= {*t}]
    if not shares:
        return "Temporaries of a training step"
    return f"Keeping what is gathered takes {min(shares):.1f} to {max(shares):.1f} times as much"


def _rings(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["overlap"] != "none"]


def _bars(axes: Any, place: float, rows: Sequence[Row]) -> None:
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        name = row["keep"] if row["result"] == "gradients" else "update"
        label = name if name != "update" else "shard, updating in place"
        left = place + (i - (len(rows) - 1) / 2) * width
        axes.bar(left, row["temp_bytes"] / GIBIBYTE, width, color=COLORS[name], label=label)
    kept = rows[0]["kept_bytes"] / GIBIBYTE
    axes.hlines(
        kept, place - 0.45, place + 0.45, color="black", label="one array a layer, z_l, alone"
    )
