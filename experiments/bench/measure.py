"""Runs of one size: what is compiled, what is screened, and what then runs in turns.

A cell of the record is the outcome for one size: every program's row.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from typing import Any

from experiments.bench import automatic, kernel
from experiments.bench.problem import DType, Size, make_problem
from experiments.bench.products import products_alone
from experiments.bench.summary import Cell, compare
from experiments.bench.timing import Label, Measurement, Program, finalists, interleave
from experiments.record import plain

Say = Callable[[str], None]
COMPILATIONS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to run for each size.

    Attributes:
        devices: numbers of devices.
        dtypes: of the products.
        rounds: runs of each program in contention.
        screen: how much slower than the best of its group a program in contention may be.
        contenders: of each group, at most.
        seed: of weights and data.
    """

    devices: tuple[int, ...]
    dtypes: tuple[DType, ...]
    rounds: int
    screen: float
    contenders: int
    seed: int


def measure_default(size: Size, plan: Plan, say: Say) -> Cell:
    """Measure the default strategy against every baseline; `say` is told of the progress."""
    problem = make_problem(size, plan.seed)

    def programs(dtype: DType, num_devices: int) -> Iterator[Program]:
        yield kernel.by_default(problem, num_devices, dtype)
        for label in automatic.automatic_labels(num_devices, dtype):
            yield automatic.automatic(problem, label)
        yield products_alone(problem, kernel.default_mesh(num_devices), dtype)
        # Once for all numbers of devices, beside the largest, whose ratio to it is judged.
        if num_devices == max(plan.devices):
            for label in automatic.unsharded_labels(dtype):
                yield automatic.unsharded(problem, label)

    groups = (programs(*key) for key in product(plan.dtypes, plan.devices))
    return _cell(size, groups, plan, say)


def measure_search(size: Size, default: Cell, plan: Plan, say: Say) -> Cell:
    """Measure every layout, keep and mesh against the best baselines of the first table.

    Args:
        size: of the network.
        default: the first table's cell of this size; it says which baselines are best.
        plan: what to run.
        say: told of the progress.
    """
    problem = make_problem(size, plan.seed)
    best = {(c.devices, c.dtype): c for c in compare(default)}

    def programs(dtype: DType, num_devices: int) -> Iterator[Program]:
        baselines = best[num_devices, dtype]
        yield from kernel.everywhere(problem, num_devices, dtype)
        yield automatic.automatic(problem, _label(baselines.automatic))
        if num_devices == max(plan.devices):
            yield automatic.unsharded(problem, _label(baselines.unsharded))

    groups = (programs(*key) for key in product(plan.dtypes, plan.devices))
    return _cell(size, groups, plan, say)


def measure_invariant(size: Size, plan: Plan, say: Say) -> Cell:
    """Measure the default strategy with reduction="invariant" against the same without."""
    problem = make_problem(size, plan.seed)

    def programs(dtype: DType, num_devices: int) -> Iterator[Program]:
        yield kernel.by_default(problem, num_devices, dtype)
        yield kernel.invariant(problem, num_devices, dtype)

    # Both run in every round, however slow.
    both = replace(plan, screen=math.inf, contenders=2)
    groups = (programs(*key) for key in product(plan.dtypes, plan.devices))
    return {**_cell(size, groups, both, say), "plan": plain(asdict(plan))}


def measure_compilation(size: Size, num_devices: int, seed: int) -> dict[str, Any]:
    """Return the seconds that tracing, lowering and compiling a deep step takes, each time anew."""
    problem = make_problem(size, seed)
    seconds = [
        kernel.by_default(problem, num_devices, "float32").measurement.compile_s
        for _ in range(COMPILATIONS)
    ]
    return {
        "size": str(size),
        "devices": num_devices,
        "seconds": seconds,
        "median_s": statistics.median(seconds),
    }


def _cell(size: Size, groups: Iterable[Iterable[Program]], plan: Plan, say: Say) -> Cell:
    measured: list[Measurement] = []

    def noted(programs: Iterable[Program]) -> Iterator[Program]:
        for program in programs:
            measured.append(program.measurement)
            yield program

    running: list[Program] = []
    began = time.perf_counter()
    for group in groups:
        running += finalists(noted(group), screen=plan.screen, at_most=plan.contenders)
        say(f"{size}: {len(measured)} programs compiled, {len(running)} in contention")
    say(f"{size}: {plan.rounds} rounds of {sum(p.least_s for p in running):.1f} s")
    interleave(running, plan.rounds)
    return {
        "size": asdict(size),
        "plan": plain(asdict(plan)),
        "seconds": round(time.perf_counter() - began, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [measurement.as_row() for measurement in measured],
    }


def _label(row: dict[str, Any]) -> Label:
    return Label(**{name: row[name] for name in Label.__dataclass_fields__})
