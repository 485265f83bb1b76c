"""What a record says, in words that its numbers choose; each function is of one part of it."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.parallelism.ways import Row

Record = Mapping[str, Any]

TENSOR = "tensor parallel"
GIGABYTE, MEBIBYTE = 1e9, 2**20


def finding(record: Record) -> list[str]:
    """Return a sentence or more of every part that a record has."""
    parts = {
        "counted": (of_bytes, of_memory),
        "modelled": (of_turning, of_reason, of_mixtures),
        "measured": (of_measured,),
        "published": (of_published,),
    }
    return [tell(record) for part in parts if record.get(part) for tell in parts[part]]


def of_bytes(record: Record) -> str:
    """Say who communicates more."""
    rows = record["counted"]
    devices = each_devices(rows)
    more = [times(rows, m, "received_bytes") for m in devices]
    needed = [one(rows, m, TENSOR)["bytes"] / needed_bytes(one(rows, m, "1f1b")) for m in devices]
    least, most = zip(*(extremes(rows, m) for m in devices), strict=True)
    return (
        f"Tensor parallel communicates more: on M = {listed(devices)} devices it receives "
        f"{listed(more, '.1f')} times the bytes that 1F1B's busiest stage receives, "
        f"{listed(needed, '.1f')} times those that it needs, in "
        f"{one(rows, devices[0], TENSOR)['collectives']} collectives. Pipelines receive from "
        f"{min(least):.2f} to {max(most):.2f} of its bytes, the most zb-v, whose chunks go down "
        f"the stages and come back: stages in step move messages that some do not need."
    )


def of_memory(record: Record) -> str:
    """Say who holds more."""
    rows = record["counted"]
    devices = each_devices(rows)
    held = {
        name: listed([one(rows, m, name)["held_bytes"] / MEBIBYTE for m in devices], ".0f")
        for name in (TENSOR, "1f1b", "gpipe")
    }
    worst = max(row["held_bytes"] / row["predicted_held_bytes"] for row in rows)
    temporaries = max(row["temp_bytes"] / row["predicted_temp_bytes"] for row in rows)
    return (
        f"A device holds {held[TENSOR]} MiB tensor parallel, {held['1f1b']} with 1F1B and "
        f"{held['gpipe']} with GPipe, at most {worst:.2f} times what is predicted, its temporaries "
        f"{temporaries:.2f} times; bytes and collectives are as predicted in "
        f"{sum(map(is_predicted, rows))} of {len(rows)} programs."
    )


def of_turning(record: Record) -> str:
    """Say when tensor parallel is faster."""
    chosen, link, m = record["turning"], record["link"], record["config"]["microbatches"]
    devices = each_devices(chosen)
    points = {
        name: listed([gigabytes(turning(chosen, n, m, name)) for n in devices])
        for name in ("1f1b", "zb-h1")
    }
    best = [gigabytes(turning(chosen, n, m, None)) for n in devices]
    step = [gigabytes(turning(chosen, n, m, "1f1b", "lockstep_bytes_per_s")) for n in devices]
    reached = [(name, reaches(chosen, max(devices), name, link)) for name in ("1f1b", "zb-h1")]
    return (
        f"It computes faster where the link is fast: modelled at {link['flops_per_s'] / 1e12:.0f} "
        f"TFLOP/s and m = {m}, with a process a stage, it overtakes 1F1B above {points['1f1b']} "
        f"GB/s on M = {listed(devices)}, ZB-H1 above {points['zb-h1']}, and every schedule above "
        f"{listed(best)}; against stages in step, 1F1B above {listed(step)}. On M = "
        f"{max(devices)}, {link['name']} ({link['bytes_per_s'] / GIGABYTE:.0f} GB/s) is enough "
        f"against {' and '.join(f'{name} for {when}' for name, when in reached)}."
    )


def of_reason(record: Record) -> str:
    """Say why it turns there."""
    config, link = record["config"], record["link"]
    devices, m = each_devices(record["turning"]), record["config"]["microbatches"]
    ratios = [
        row["bytes_per_s"] / row["theory_bytes_per_s"]
        for row in record["turning"]
        if row["schedule"] == "1f1b" and row["bytes_per_s"]
    ]
    bubbles = listed([f"{(n - 1) / m:.0%}" for n in devices])
    found = f"{min(ratios):.2f} to {max(ratios):.2f} of it" if ratios else "it never turns"
    theory = 2 * m * link["flops_per_s"] / (3 * config["model_width"]) / GIGABYTE
    return (
        f"Why: 1F1B waits (M - 1) / m of its products, {bubbles}; tensor parallel's bytes, too, "
        f"grow as M - 1 of them. So the turning point is 2 m R / (3 d) = {theory:.0f} GB/s for "
        f"1F1B whatever M is (modelled, {found}), and 3 "
        f"times that for ZB-H1, which waits a third. Fewer microbatches, wider layers and slower "
        f"devices help tensor parallel; with one microbatch only one stage works at a time."
    )


def caption_of_modelled(record: Record) -> str:
    """Say in short what of_turning and of_reason do."""
    chosen, m = record["turning"], record["config"]["microbatches"]
    devices = each_devices(chosen)
    above = [
        f"{name} above {listed([gigabytes(turning(chosen, n, m, name)) for n in devices])} GB/s"
        for name in ("1f1b", "zb-h1", "zb-v")
    ]
    return (
        f"Modelled, not measured: at {record['link']['flops_per_s'] / 1e12:.0f} TFLOP/s, d = "
        f"{record['config']['model_width']} and m = {m}, on M = {listed(devices)}, tensor parallel "
        f"overtakes {', '.join(above)}. Pipelines wait as M - 1 grows, and tensor parallel sends "
        f"as it does: what decides is m / d, hardly M."
    )


def of_mixtures(record: Record) -> str:
    """Say whether a mixture is faster than both on the chip's own link."""
    rows = [
        row for row in record["modelled"] if row["bytes_per_s"] == record["link"]["bytes_per_s"]
    ]
    most = max(each_devices(rows))
    mine = sorted(
        (row for row in rows if row["devices"] == most), key=lambda r: r["asynchronous_s"]
    )
    mixture = next((row for row in mine if " x " in row["way"]), None)
    if mixture is None:
        return f"On M = {most} no mixture was modelled."
    share = {row["way"]: row["asynchronous_s"] / row["ideal_s"] for row in mine}
    return (
        f"On {record['link']['name']} and M = {most} a step takes {share[TENSOR]:.2f} times its "
        f"products tensor parallel, {share['1f1b']:.2f} with 1F1B, {share[mixture['way']]:.2f} in "
        f"the best mixture ({mixture['way']}), {share[mine[0]['way']]:.2f} at best "
        f"({mine[0]['way']})."
    )


def of_measured(record: Record) -> str:
    """Say what two processes took."""
    runs = record["measured"]
    wrong = [row["median_s"] / row["predicted_s"] for run in runs for row in run["rows"]]
    busy = max(run["load_1min_before"] for run in runs)
    return (
        f"Measured, M = 2 and a core each: {'; '.join(map(of_run, runs))}. What is measured is "
        f"{min(wrong):.2f} to {max(wrong):.2f} times what the model says of these processes "
        f"(load before: {busy})."
    )


def of_run(run: Record) -> str:
    """Say what two processes took with one number of microbatches."""
    tensor = next(row for row in run["rows"] if row["way"] == TENSOR)
    pipelines = [row for row in run["rows"] if row["way"] != TENSOR]
    best = min(pipelines, key=lambda row: row["median_s"])
    ratios = [a / b for a, b in zip(best["seconds"], tensor["seconds"], strict=True)]
    return (
        f"with m = {run['microbatches']} tensor parallel takes {tensor['median_s']:.2f} s "
        f"(modelled {tensor['predicted_s']:.2f}) and the best pipeline, {best['way']} in step, "
        f"{best['median_s']:.2f} ({best['predicted_s']:.2f}): {statistics.median(ratios):.2f} "
        f"times as long in the median of {len(ratios)} rounds ({min(ratios):.2f} to "
        f"{max(ratios):.2f}), over a link of {run['bytes_per_s'] / GIGABYTE:.2f} GB/s"
    )


def of_published(record: Record) -> str:
    """Say how simulated throughputs compare with published ones."""
    rows = record["published"]
    errors = {
        name: [row["simulated"] / row["published"] - 1 for row in rows if row["name"] == name]
        for name in dict.fromkeys(row["name"] for row in rows)
    }
    off = [error for mine in errors.values() for error in mine]
    by_schedule = "; ".join(f"{name} {listed(mine, '+.1%')}" for name, mine in errors.items())
    models = list(dict.fromkeys(row["model"] for row in rows))
    ordered = sum(is_ordered([row for row in rows if row["model"] == name]) for name in models)
    zero = [row for row in rows if row["name"] == "ZB-2p"]
    return (
        f"Against {len(rows)} published throughputs simulate is off by "
        f"{statistics.mean(map(abs, off)):.1%} in the mean, {statistics.mean(off):+.1%} with the "
        f"sign, and orders the schedules as published for {ordered} of {len(models)} models. By "
        f"schedule: {by_schedule}. It knows no update of parameters, before which 1F1B and "
        f"interleaved there wait for one another, and no stage slower than the mean; and it lets "
        f"messages overlap, of which interleaved, a chunk for each layer, has three times as many. "
        f"ZB-2p's "
        f"table was searched for and has less of a bubble than the zb-h2 in its place, which "
        f"makes up for that. ZB-2p gains "
        f"{listed([row['published_ratio'] for row in zero], '.2f')} published, "
        f"{listed([row['together_ratio'] for row in zero], '.2f')} where stages end a step "
        f"together, {listed([row['on_ratio'] for row in zero], '.2f')} where each goes on, and "
        f"{listed([row['no_bubble_ratio'] for row in zero], '.2f')} without any bubble."
    )


# Choosing rows


def each_devices(rows: Iterable[Row]) -> list[int]:
    """Return the numbers of devices, ascending."""
    return sorted({row["devices"] for row in rows})


def one(rows: Sequence[Row], devices: int, way: str) -> Row:
    """Return the row of a way."""
    return next(row for row in rows if (row["devices"], row["way"]) == (devices, way))


def is_predicted(row: Row) -> bool:
    """Return whether bytes and collectives are as predicted."""
    return all(row[name] == row[f"predicted_{name}"] for name in ("bytes", "collectives"))


def is_ordered(rows: Iterable[Row]) -> bool:
    """Return whether simulated throughputs are in the order of the published ones."""
    simulated = [row["simulated"] for row in sorted(rows, key=lambda row: row["published"])]
    return simulated == sorted(simulated)


def needed_bytes(row: Row) -> float:
    """Return what a device of the busiest stage receives, less the messages nobody reads."""
    return row["received_bytes"] - row["message_bytes"] + row["needed_message_bytes"]


def times(rows: Sequence[Row], devices: int, name: str) -> float:
    """Return tensor parallel over 1F1B."""
    return one(rows, devices, TENSOR)[name] / one(rows, devices, "1f1b")[name]


def extremes(rows: Sequence[Row], devices: int) -> tuple[float, float]:
    """Return the least and the most bytes of a pipeline, relative to tensor parallel."""
    mine = [r["received_bytes"] for r in rows if r["devices"] == devices and r["x"] == 1]
    tensor = one(rows, devices, TENSOR)["received_bytes"]
    return min(mine) / tensor, max(mine) / tensor


def turning(
    rows: Iterable[Row],
    devices: int,
    microbatches: int,
    schedule: str | None,
    name: str = "bytes_per_s",
) -> float | None:
    """Return the link above which tensor parallel beats a schedule; None is any of them."""
    mine = [
        row[name]
        for row in rows
        if (row["devices"], row["microbatches"]) == (devices, microbatches)
        and schedule in (None, row["schedule"])
    ]
    return None if not mine or None in mine else max(mine)


def reaches(rows: Sequence[Row], devices: int, schedule: str, link: Row) -> str:
    """Return with how many microbatches a link is fast enough for tensor parallel."""
    mine = [row for row in rows if (row["devices"], row["schedule"]) == (devices, schedule)]
    needs = {row["microbatches"]: row["bytes_per_s"] or math.inf for row in mine}
    if enough := [m for m, needed in needs.items() if needed <= link["bytes_per_s"]]:
        return f"m up to {max(enough)}"
    return f"no m (its fewest, {min(needs)}, needs {gigabytes(needs[min(needs)])})"


# Words


def gigabytes(bytes_per_s: float | None) -> str:
    """Return a bandwidth in GB/s."""
    return "any" if bytes_per_s is None else f"{bytes_per_s / GIGABYTE:.0f}"


def listed(values: Iterable[Any], form: str = "") -> str:
    """Return values as a text has them."""
    return ", ".join(f"{value:{form}}" for value in values)
