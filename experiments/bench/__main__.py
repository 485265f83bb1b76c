"""Is the kernel faster and leaner than what JAX does by itself with the same devices?

Question: time and temporaries of one value_and_grad with a default Strategy, against (a) the
    network on one device that has all the cores, and (b) the best automatic partitioning by jit;
    what the best layout, keep and mesh would give; and what reduction="invariant" costs.
Method: simulated devices in one process. All programs of a size are compiled, warmed and screened,
    those in contention run in turns; ratios are taken within a round (experiments.bench.timing,
    .automatic, .summary). Of the automatic partitionings the fastest counts for time, the leanest
    for memory. The products alone are run as well: time that no program on these devices can save.
Command: make bench, or make bench BENCH_ARGS="--sizes 1024x8x128 --devices 8"; `--help` explains.
Prediction: the targets in experiments/bench/targets.py, drawn in the figure.
Finding: see README.md, Against automatic partitioning.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl

import tpmlp
from experiments.bench.figures import plot_ratios
from experiments.bench.kernel import default_mesh
from experiments.bench.machine import describe_machine
from experiments.bench.measure import (
    Plan,
    measure_compilation,
    measure_default,
    measure_invariant,
    measure_search,
)
from experiments.bench.problem import DType, Size
from experiments.bench.report import default_table, invariant_table, search_table, verdict_table
from experiments.bench.settings import make_folder, parse_size, require_at_least_one
from experiments.bench.summary import Cell, compare
from experiments.bench.targets import Verdict, verdicts
from experiments.command import INTERRUPTED, SettingError, parse, refuse, require
from experiments.record import plain, save_json

Tables = Literal["all", "default", "search", "invariant"]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Time and weigh the kernel against plain JAX, on simulated devices.

    Attributes:
        sizes: d x layers x batch of each network.
        devices: numbers of devices, M.
        dtypes: float32, bfloat16: of the products.
        rounds: how often each program in contention runs; ratios are medians over them.
        screen: programs slower than this times the best of their group are not in contention.
        contenders: how many of a group are, at most.
        tables: default (one default Strategy), search (every layout, keep and mesh), invariant
            (reduction="invariant" against the default), or all. One but the first needs the
            others in OUT.
        search_rounds: as rounds, for the second table.
        search_dtypes: as dtypes, for the second table.
        deep: d x layers x batch of the network whose compilation is timed, on the most devices.
        seed: of weights and data.
        resume: keep the sizes that bench.json in OUT already has.
        out: folder for bench.json, bench.png and bench.svg.
    """

    sizes: tuple[str, ...] = (
        "512x8x512",
        "1024x8x1024",
        "2048x4x1024",
        "1024x8x128",
        "256x16x4096",
    )
    devices: tuple[int, ...] = (2, 4, 8)
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    rounds: int = 7
    screen: float = 1.1
    contenders: int = 3
    tables: Tables = "all"
    search_rounds: int = 5
    search_dtypes: tuple[DType, ...] = ("float32",)
    deep: str = "256x96x256"
    seed: int = 0
    resume: bool = False
    out: Path = Path("results/bench")

    def __post_init__(self) -> None:
        require_at_least_one(self, "rounds", "search_rounds", "contenders", "screen")
        require(
            all(devices >= 2 for devices in self.devices) and bool(self.devices),
            "devices must be one number or more, each at least 2",
            "Use for example 2 4 8.",
            devices=self.devices,
        )
        require(
            set(self.search_dtypes) <= set(self.dtypes),
            "search_dtypes must be among dtypes, whose table says which baselines are best",
            "Name the same.",
            search_dtypes=self.search_dtypes,
            dtypes=self.dtypes,
        )
        for size in (*map(parse_size, self.sizes), parse_size(self.deep)):
            require(
                all(size.d % devices == 0 for devices in self.devices),
                "d must be a multiple of devices, or automatic partitioning replicates",
                "Use another size.",
                size=size,
                devices=self.devices,
            )

    @property
    def path(self) -> Path:
        """The record."""
        return self.out / "bench.json"

    @property
    def plan(self) -> Plan:
        """What to run for each size of the first table."""
        return Plan(
            devices=self.devices,
            dtypes=self.dtypes,
            rounds=self.rounds,
            screen=self.screen,
            contenders=self.contenders,
            seed=self.seed,
        )

    def measures(self, table: str) -> bool:
        """Return whether a table is measured, rather than kept."""
        return self.tables in ("all", table)

    @property
    def search_plan(self) -> Plan:
        """The same for the second."""
        return replace(self.plan, dtypes=self.search_dtypes, rounds=self.search_rounds)


def prepare(config: Config) -> Record:
    """Start the devices, make the folder, and return the record to go on with.

    Raises:
        SettingError: the folder cannot be made, or the record there cannot be gone on with.
        RuntimeError: JAX has started with other devices.
    """
    tpmlp.simulate_devices(max(8, *config.devices))
    make_folder(config.out)
    record: Record = {"default": [], "compilation": None, "search": [], "invariant": []}
    if config.resume or not config.measures("default"):
        record |= earlier(config)
    return {**record, "config": asdict(config), "machine": describe_machine()}


def earlier(config: Config) -> Record:
    """Return what an earlier run measured, of the parts that are not measured again.

    Raises:
        SettingError: there is none, or it was measured otherwise.
    """
    require(
        config.path.exists(),
        "a record must be there to resume, or for another table than the first alone",
        "Run make bench without them first.",
        path=config.path,
    )
    record = json.loads(config.path.read_text(encoding="utf-8"))
    absent = missing(record["default"], list(map(parse_size, config.sizes)))
    require(
        not absent or config.measures("default"),
        "other tables need the first, which lacks sizes",
        "Measure all, with --resume.",
        lacking=", ".join(map(str, absent)),
    )
    plans = {"default": config.plan, "search": config.search_plan, "invariant": config.plan}
    tables = [table for table in plans if config.resume or not config.measures(table)]
    kept = {table: record.get(table, []) for table in tables}
    for table, cells in kept.items():
        for cell in cells:
            require(
                cell["plan"] == plain(asdict(plans[table])),
                "what is kept of a record must have been measured with the same settings",
                "Use those, or measure anew.",
                table=table,
                plan=cell["plan"],
            )
    return {**kept, "compilation": record["compilation"]}


def run(config: Config, record: Record) -> None:
    """Measure what the record lacks, writing it after every size."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    def add(table: str, cell: Cell) -> None:
        record[table].append(cell)
        save_json(config.path, record, time.perf_counter() - began)

    sizes = [parse_size(text) for text in config.sizes]
    if config.measures("default"):
        for size in missing(record["default"], sizes):
            add("default", measure_default(size, config.plan, say))
            print(default_table(compare(record["default"][-1])), end="\n\n", flush=True)
        say(f"compiling {config.deep}")
        deep = parse_size(config.deep)
        record["compilation"] = measure_compilation(deep, max(config.devices), config.seed)
    if config.measures("search"):
        cells = {Size(**cell["size"]): cell for cell in record["default"]}
        for size in missing(record["search"], sizes):
            add("search", measure_search(size, cells[size], config.search_plan, say))
    if config.measures("invariant"):
        for size in missing(record["invariant"], sizes):
            add("invariant", measure_invariant(size, config.plan, say))
    record["verdicts"] = [asdict(verdict) for verdict in judge(record)]
    save_json(config.path, record, time.perf_counter() - began)


def missing(cells: Sequence[Cell], sizes: Sequence[Size]) -> list[Size]:
    """Return the sizes that have no cell."""
    there = {Size(**cell["size"]) for cell in cells}
    return [size for size in sizes if size not in there]


def judge(record: Record) -> list[Verdict]:
    """Return the verdicts on a record."""
    comparisons = [c for cell in record["default"] for c in compare(cell)]
    compilation = record["compilation"]
    return verdicts(
        comparisons,
        compile_s=compilation and compilation["median_s"],
        matrix_units=record["machine"]["matrix_units"],
    )


def report(config: Config) -> None:
    """Print the tables and draw the figure, from the record alone."""
    record = json.loads(config.path.read_text(encoding="utf-8"))
    comparisons = [c for cell in record["default"] for c in compare(cell)]
    meshes = "; ".join("x={}, y={}".format(*default_mesh(devices)) for devices in config.devices)
    print(f"\none default Strategy() on {meshes}\n")
    print(default_table(comparisons))
    if record["search"]:
        print("\nthe best layout, keep and mesh\n")
        print(search_table(record["search"], record["default"]))
    if record["invariant"]:
        print('\nreduction="invariant" over the default\n')
        print(invariant_table(record["invariant"]))
    print("\ntargets\n")
    print(verdict_table(judge(record)))
    figure = plot_ratios(comparisons, judge(record), record["machine"])
    with mpl.rc_context({"svg.hashsalt": "tpmlp"}):
        figure.savefig(config.out / "bench.png", dpi=150)
        figure.savefig(config.out / "bench.svg")
    print(f"\nrecord and figure are in {config.out}/")


def main(args: Sequence[str] | None = None) -> int:
    """Run the program; return 0, 2 if refused, 130 after Ctrl-C."""
    try:
        config = parse(Config, "experiments.bench", args)
        record = prepare(config)
    except (SettingError, RuntimeError) as error:
        return refuse(error)
    try:
        run(config, record)
    except KeyboardInterrupt:
        print("interrupted: --resume goes on with the next size.", file=sys.stderr)
        return INTERRUPTED
    report(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
