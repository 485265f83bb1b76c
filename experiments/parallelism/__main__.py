"""Does tensor parallel communicate more than pipeline parallel, and compute faster?

Question: the same model, batch and devices, M = 2, 4, 8, as tensor parallel (TP), as a pipeline of
    every schedule, and as mixtures: who receives, holds and takes less, and where does it turn?
Method: bytes, collectives and memory from the compiled programs of a small model on simulated
    devices, predicted beside them. Time measured for M = 2 alone, in two processes with a core and
    a thread each (experiments.parallelism.measured), as simulated devices share cores and an idle
    stage costs nothing there; else modelled (.modelled), for a process a stage and for stages in
    step, on links from slow to fast at the rate of a chip (.chips), nothing overlapped. What every
    schedule costs (.schedules), and published throughputs (.published), from tpmlp.simulate.
Command: make parallelism, or make parallelism PARALLELISM_ARGS="--parts measured", which keeps the
    other parts of an earlier run; `--help` explains.
Prediction: TP receives more and waits for nothing. It is faster where a link carries more than
    s m R / (3 d k) bytes a second (.modelled), whatever M is; for 1F1B, m = 16, d = 8192 and
    bfloat16 on an A100, 406 GB/s.
Finding: (experiments/results/parallelism.json) bytes and collectives are those predicted in all 27
    programs, what is held within 1.05. TP receives 3.3 to 5.3 times the bytes that 1F1B's busiest
    stage does and 5.3 to 7.5 times those it needs. Modelled, m = 16, it overtakes 1F1B above 386
    GB/s, ZB-H1 above 1057 to 1108, hardly depending on M: NVLink's 300 are enough against 1F1B for
    m up to 8. Measured, M = 2 over gloo, medians, it beats every pipeline with m = 2 and is slower
    than the best with m = 8. Simulated throughputs are 0 to 17 % above the published, 7 % in the
    mean, in their order for one model of two.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

import tpmlp
from experiments.bench.machine import describe_machine
from experiments.bench.settings import make_folder
from experiments.command import INTERRUPTED, SettingError, parse, refuse
from experiments.parallelism import measured, modelled, published, schedules
from experiments.parallelism.chips import CHIPS
from experiments.parallelism.counted import count
from experiments.parallelism.figures import figures
from experiments.parallelism.finding import finding
from experiments.parallelism.modelled import Link, Problem
from experiments.parallelism.report import tables
from experiments.parallelism.settings import Config, Part
from experiments.parallelism.ways import ways
from experiments.record import save_json

Record = dict[str, Any]


def measure(config: Config, record: Record) -> None:
    """Do the parts, and write the record after each."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:4.0f} s] {text}", flush=True)

    for part in config.parts:
        say(part)
        record |= PARTS[part](config, say)
        seconds = time.perf_counter() - began
        save(config.path, partial(save_json, result=record, seconds=seconds))


def measure_counted(config: Config, say: Callable[[str], None]) -> Record:
    """Compile every way."""
    model = tpmlp.MLP((config.width,) * (config.layers + 1))
    given = {"batch_size": config.batch_size, "microbatches": config.microbatches}
    rows = []
    for devices in config.devices:
        say(f"compiling {len(ways(devices))} programs for M = {devices}")
        rows += [count(way, model, **given) for way in ways(devices)]
    return {"counted": rows}


def measure_modelled(config: Config, say: Callable[[str], None]) -> Record:
    """Model every way on every link, and find the turning points."""
    chip = CHIPS[config.chip]
    problem = Problem(
        width=config.model_width,
        layers=config.model_layers,
        batch_size=config.model_batch_size,
        item_bytes=2,
    )
    name, bytes_per_s = max(chip.links.items(), key=lambda link: link[1])
    link = Link(flops_per_s=chip.flops_per_s, bytes_per_s=bytes_per_s, latency_s=config.latency_s)
    bandwidths = sorted({*np.geomspace(1e9, 1e13, config.bandwidths).tolist(), bytes_per_s})
    rows = modelled.sweep(
        problem,
        link,
        devices=config.devices,
        microbatches=config.microbatches,
        bandwidths=bandwidths,
    )
    say("turning points")
    tried = sorted(
        {2**i for i in range(int(math.log2(config.most_microbatches)) + 1)} | {config.microbatches}
    )
    turning = modelled.turning_points(problem, link, devices=config.devices, microbatches=tried)
    return {
        "link": {"name": name, **asdict(link)},
        "links": dict(chip.links),
        "modelled": rows,
        "turning": turning,
    }


def measure_measured(config: Config, say: Callable[[str], None]) -> Record:
    """Time two processes, if there are two cores."""
    if (why := measured.obstacle()) is not None:
        say(f"not measured: {why}")
        return {"measured": None}
    problem = Problem(
        width=config.measured_width,
        layers=config.measured_layers,
        batch_size=config.measured_batch_size,
        item_bytes=4,
    )
    runs = []
    for m in config.measured_microbatches:
        say(f"two processes, m = {m}")
        both = ways(measured.NUM_PROCESSES)
        runs.append(measured.measure(problem, both, microbatches=m, rounds=config.rounds))
        if runs[-1]["load_1min_before"] > 1:
            say(f"others were busy before, load {runs[-1]['load_1min_before']}: see the rounds")
    return {"measured": runs}


PARTS: dict[Part, Callable[[Config, Callable[[str], None]], Record]] = {
    "counted": measure_counted,
    "modelled": measure_modelled,
    "measured": measure_measured,
    "schedules": lambda config, say: {"schedules": schedules.measure()},
    "published": lambda config, say: {"published": published.measure()},
}


def prepare(config: Config) -> Record:
    """Start the devices, make the folder, and return the record to go on with.

    Raises:
        SettingError: the folder cannot be made, or has no record of the parts that are kept.
        RuntimeError: JAX has started with other devices.
    """
    tpmlp.simulate_devices(max(8, *config.devices))
    make_folder(config.out)
    record = config.earlier()
    return {**record, "config": asdict(config), "machine": describe_machine()}


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all, so that Ctrl-C leaves no half of one."""
    beside = path.with_stem(f".{path.stem}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def report(config: Config) -> None:
    """Print the tables and what was found, and draw the figures, from the record alone."""
    record = json.loads(config.path.read_text(encoding="utf-8"))
    for title, text in tables(record):
        print(f"\n{title}\n\n{text}")
    with mpl.rc_context({"svg.hashsalt": "tpmlp"}):
        for name, figure in figures(record).items():
            save(config.out / f"{name}.png", partial(figure.savefig, dpi=120))
            save(config.out / f"{name}.svg", figure.savefig)
    print("\nFound\n")
    for sentence in finding(record):
        print(f"- {sentence}")
    print(f"\nrecord and figures are in {config.out}/")


def main(args: Sequence[str] | None = None) -> int:
    """Run the program; return 0, 2 if refused, 130 after Ctrl-C."""
    try:
        config = parse(Config, "experiments.parallelism", args)
        record = prepare(config)
    except (SettingError, RuntimeError) as error:
        return refuse(error)
    try:
        measure(config, record)
        report(config)
    except KeyboardInterrupt:
        print("interrupted: no file is left half written.", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
