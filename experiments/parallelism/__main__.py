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
Finding: printed at the end, and in README.md, Tensor or pipeline parallel.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib as mpl
import numpy as np

import tpmlp
from experiments.bench.machine import describe_machine
from experiments.bench.settings import make_folder
from experiments.command import INTERRUPTED, SettingError, parse, refuse, require
from experiments.parallelism import measured, modelled, published, schedules
from experiments.parallelism.chips import CHIPS, ChipName
from experiments.parallelism.counted import count
from experiments.parallelism.figures import figures
from experiments.parallelism.finding import finding
from experiments.parallelism.modelled import Link, Problem
from experiments.parallelism.report import tables
from experiments.parallelism.ways import CHUNKS, ways
from experiments.record import save_json

Part = Literal["counted", "modelled", "measured", "schedules", "published"]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Compare tensor parallel, pipeline parallel and mixtures.

    Attributes:
        parts: what to do; the others are kept from an earlier run in OUT.
        devices: numbers of devices, M, each a power of two.
        microbatches: m of what is counted and modelled, a multiple of every M.
        width: d of the model that is compiled.
        layers: its layers, at least two for each device.
        batch_size: its samples.
        chip: A100 or H100, whose rate and links are modelled.
        model_width: d of the model whose time is modelled.
        model_layers: its layers.
        model_batch_size: its samples, of a token each.
        bandwidths: number of links that are modelled, from 1 GB/s to 10 TB/s.
        most_microbatches: the turning point is modelled for m = 1, 2, 4 ... up to this.
        latency_s: of a collective or a message, modelled.
        measured_width: d of the model whose time is measured.
        measured_layers: its layers.
        measured_batch_size: its samples.
        measured_microbatches: its m.
        rounds: how often each way is timed.
        out: folder for parallelism.json and the figures.
    """

    parts: tuple[Part, ...] = get_args(Part)
    devices: tuple[int, ...] = (2, 4, 8)
    microbatches: int = 16
    width: int = 512
    layers: int = 16
    batch_size: int = 1024
    chip: ChipName = "A100"
    model_width: int = 8192
    model_layers: int = 64
    model_batch_size: int = 8192
    bandwidths: int = 41
    most_microbatches: int = 32
    latency_s: float = 1e-5
    measured_width: int = 1024
    measured_layers: int = 16
    measured_batch_size: int = 512
    measured_microbatches: int = 8
    rounds: int = 7
    out: Path = Path("results/parallelism")

    def __post_init__(self) -> None:
        for name in ("bandwidths", "most_microbatches", "rounds", *self._sizes):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1", "Use 1 or more.", **{name: value})
        require(
            bool(self.devices) and all(m in (2, 4, 8) for m in self.devices),
            "devices must be one number or more of 2, 4 and 8",
            "Use for example 2 4 8.",
            devices=self.devices,
        )
        require(
            0 <= self.latency_s < math.inf,
            "latency_s must be a finite number, at least 0",
            "Use 0 for none.",
            latency_s=self.latency_s,
        )
        most = max(self.devices)
        self._check_divides(most, "microbatches", "width", "model_width")
        self._check_divides(self.microbatches, "batch_size", "model_batch_size")
        self._check_divides(2, "measured_width", "measured_microbatches")
        self._check_divides(self.measured_microbatches, "measured_batch_size")
        self._check_divides(self.most_microbatches, "model_batch_size")
        for name, chunks in (("layers", most), ("model_layers", most), ("measured_layers", 2)):
            layers, least = getattr(self, name), chunks * CHUNKS["interleaved"]
            require(
                layers >= least,
                f"{name} must be at least {least}, one for each chunk of a stage",
                f"Use {least} or more.",
                **{name: layers},
            )

    @property
    def _sizes(self) -> tuple[str, ...]:
        names = ("microbatches", "width", "layers", "batch_size")
        others = [f"{kind}_{name}" for kind in ("model", "measured") for name in names[1:]]
        return (*names, *others, "measured_microbatches")

    def _check_divides(self, divisor: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(
                value % divisor == 0,
                f"{name} must be a multiple of {divisor}, for equal parts",
                f"Use {max(divisor, value // divisor * divisor)}.",
                **{name: value},
            )

    @property
    def path(self) -> Path:
        """The record."""
        return self.out / "parallelism.json"


def measure(config: Config, record: Record) -> None:
    """Do the parts, and write the record after each."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:4.0f} s] {text}", flush=True)

    for part in config.parts:
        say(part)
        record |= PARTS[part](config, say)
        # Written whole or not at all, so that Ctrl-C leaves no half of a file.
        beside = config.path.with_suffix(".new")
        save_json(beside, record, time.perf_counter() - began)
        os.replace(beside, config.path)


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
    found = measured.measure(
        problem, microbatches=config.measured_microbatches, rounds=config.rounds
    )
    if found["load_1min_before"] > 1:
        say(f"others were busy: load {found['load_1min_before']}; rounds spread, see the figure")
    return {"measured": found}


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
    record: Record = {}
    if set(config.parts) != {*get_args(Part)}:
        require(
            config.path.exists(),
            "a record must be there to keep the other parts of",
            "Run make parallelism without --parts first.",
            path=config.path,
        )
        record = json.loads(config.path.read_text(encoding="utf-8"))
    return {**record, "config": asdict(config), "machine": describe_machine()}


def report(config: Config) -> None:
    """Print the tables and what was found, and draw the figures, from the record alone."""
    record = json.loads(config.path.read_text(encoding="utf-8"))
    for title, text in tables(record):
        print(f"\n{title}\n\n{text}")
    with mpl.rc_context({"svg.hashsalt": "tpmlp"}):
        for name, figure in figures(record).items():
            figure.savefig(config.out / f"{name}.png", dpi=120)
            figure.savefig(config.out / f"{name}.svg")
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
    except KeyboardInterrupt:
        print("interrupted: --parts goes on with the parts that are missing.", file=sys.stderr)
        return INTERRUPTED
    report(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
