"""The tables of make parallelism, from the record alone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from experiments.parallelism.finding import gigabytes
from experiments.parallelism.schedules import SHOWN
from experiments.parallelism.ways import Row
from tpmlp.table import text_table

MEBIBYTE = 2**20


def tables(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a title and a table for every part that a record has."""
    if record.get("counted"):
        yield (
            "on one device, counted in the compiled program / predicted",
            counted(record["counted"]),
        )
    if record.get("modelled"):
        there = record["link"]["bytes_per_s"]
        rows = [row for row in record["modelled"] if row["bytes_per_s"] == there]
        yield (
            f"modelled on {record['link']['name']}: time over that of the products",
            modelled(rows),
        )
        m = record["config"]["microbatches"]
        points = [row for row in record["turning"] if row["microbatches"] == m]
        yield f"modelled: tensor parallel is faster above, m = {m}", turning(points)
    for run in record.get("measured") or []:
        yield f"measured: M = 2, a core each, m = {run['microbatches']}", measured(run["rows"])
    if record.get("schedules"):
        title = "schedules, in mean tasks of a whole stage: p = {}, m = {}".format(*SHOWN)
        yield title, schedules(record["schedules"])
    if record.get("published"):
        yield "throughput on A100, samples a GPU and second", published(record["published"])


def counted(rows: Iterable[Row]) -> str:
    """Return bytes, collectives and memory of each way."""
    headers = (
        "M",
        "way",
        "MiB in the program",
        "received, busiest stage",
        "messages",
        "needed",
        "collectives",
        "of that run",
        "arguments + results, MiB",
        "temporaries, MiB",
        "held, MiB",
        "/ predicted",
    )

    def pair(row: Row, name: str) -> str:
        return f"{row[name] / MEBIBYTE:.2f} / {row[f'predicted_{name}'] / MEBIBYTE:.2f}"

    return text_table(
        headers,
        (
            (
                row["devices"],
                row["way"],
                pair(row, "bytes"),
                mebibytes(row["received_bytes"]),
                mebibytes(row["message_bytes"]),
                mebibytes(row["needed_message_bytes"]),
                f"{row['collectives']} / {row['predicted_collectives']}",
                row["run_collectives"],
                mebibytes(row["argument_bytes"] + row["output_bytes"]),
                pair(row, "temp_bytes"),
                mebibytes(row["held_bytes"]),
                f"{row['held_bytes'] / row['predicted_held_bytes']:.2f}",
            )
            for row in rows
        ),
    )


def modelled(rows: Iterable[Row]) -> str:
    """Return the time of each way on one link."""
    cells = (
        (
            row["devices"],
            row["way"],
            f"{row['asynchronous_s'] / row['ideal_s']:.3f}",
            f"{row['lockstep_s'] / row['ideal_s']:.3f}",
        )
        for row in rows
    )
    return text_table(("M", "way", "a process a stage", "in step"), cells)


def turning(rows: Iterable[Row]) -> str:
    """Return the links at which tensor parallel and a schedule are equally fast."""
    cells = (
        (
            row["devices"],
            row["schedule"],
            gigabytes(row["bytes_per_s"]),
            gigabytes(row["lockstep_bytes_per_s"]),
            gigabytes(row["theory_bytes_per_s"]),
        )
        for row in rows
    )
    headers = ("M", "schedule", "GB/s, a process a stage", "GB/s, in step", "theory")
    return text_table(headers, cells)


def measured(rows: Iterable[Row]) -> str:
    """Return what two processes took, and what the model says of them."""
    cells = (
        (
            row["way"],
            f"{1e3 * row['median_s']:.0f}",
            f"{1e3 * min(row['seconds']):.0f}",
            f"{1e3 * max(row['seconds']):.0f}",
            f"{1e3 * row['predicted_s']:.0f}",
            f"{1e3 * row['sums_s']:.0f}",
            f"{1e3 * row['predicted_asynchronous_s']:.0f}",
            f"{row['flops_per_s'] / 1e9:.0f}",
        )
        for row in rows
    )
    headers = (
        "way",
        "median ms",
        "least",
        "most",
        "modelled, in step",
        "of that sums",
        "modelled, a process a stage",
        "GFLOP/s of a product",
    )
    return text_table(headers, cells)


def schedules(rows: Iterable[Row]) -> str:
    """Return the three columns, of the size that is shown."""
    headers = (
        "costs",
        "schedule",
        "ticks",
        "theory",
        "in stages",
        "in step",
        "one task a tick",
        "paired",
        "a process a stage",
        "peak, stages",
    )
    cells = (
        (
            row["costs"],
            row["schedule"],
            row["ticks"],
            row["theory_ticks"],
            f"{row['ticks'] / row['chunks']:.1f}",
            *(
                f"{row[name]:.1f}"
                for name in ("lockstep", "one_task", "paired", "asynchronous", "peak")
            ),
        )
        for row in sorted(rows, key=lambda row: row["costs"])
        if (row["stages"], row["microbatches"]) == SHOWN
    )
    return text_table(headers, cells)


def published(rows: Iterable[Row]) -> str:
    """Return throughputs, and ratios to 1F1B."""
    headers = (
        "model",
        "published as",
        "simulated as",
        "published",
        "simulated",
        "ratio published",
        "together",
        "going on",
        "no bubble",
    )
    cells = (
        (
            row["model"],
            row["name"],
            f"{row['schedule']}, v = {row['chunks']}",
            f"{row['published']:.2f}",
            f"{row['simulated']:.2f}",
            *(
                f"{row[f'{name}_ratio']:.3f}"
                for name in ("published", "together", "on", "no_bubble")
            ),
        )
        for row in rows
    )
    return text_table(headers, cells)


def mebibytes(number: float) -> str:
    """Return a number of bytes in MiB."""
    return f"{number / MEBIBYTE:.2f}"
