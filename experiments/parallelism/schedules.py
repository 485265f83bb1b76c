"""What every schedule costs, in three columns: ticks, in lockstep, and of stages on their own.

    ticks          of the table, of which each is one F, B or W of a chunk
    lockstep       the slowest task of each tick; or, if that is less, of longer ticks of at most
                   one F, one B and one W
    asynchronous   makespan of a runtime with a process a stage

Times are in units of a mean task of a whole stage: a chunk of v takes 1/v, and so does its tick.
Theory, in ticks of m microbatches on p stages: 3 (m + p - 1) for GPipe and 1F1B, 3 m v + 3 (p - 1)
interleaved, 3 m + p - 1 for ZB-H1 and ZB-H2, 6 m + p - 1 for ZB-V.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import tpmlp
from experiments.parallelism.published import PROFILES
from experiments.parallelism.ways import CHUNKS, SCHEDULES, Row

# p, m: as many microbatches as interleaved and ZB-V need, and three times that.
TABLES = ((4, 4), (4, 8), (8, 8), (8, 24))
SHOWN = (4, 8)

TICKS: Mapping[str, Callable[[int, int], int]] = {
    "gpipe": lambda p, m: 3 * (m + p - 1),
    "1f1b": lambda p, m: 3 * (m + p - 1),
    "interleaved": lambda p, m: 3 * m * CHUNKS["interleaved"] + 3 * (p - 1),
    "zb-h1": lambda p, m: 3 * m + p - 1,
    "zb-h2": lambda p, m: 3 * m + p - 1,
    "zb-v": lambda p, m: 6 * m + p - 1,
}


@dataclass(frozen=True, slots=True)
class Costs:
    """What tasks take, relative to one another.

    Attributes:
        name: what the table says.
        F: of a stage, in any unit.
        B: likewise.
        W: likewise.
        last: of the last stage, relative to the others: it has the loss, or a layer more.
    """

    name: str
    F: float
    B: float
    W: float
    last: float = 1.0

    def tasks(self, num_stages: int, num_chunks: int) -> list[list[float]]:
        """Return F, B and W of a chunk of each stage; a mean task of a whole stage is 1."""
        stages = [1.0] * (num_stages - 1) + [self.last]
        mean = (self.F + self.B + self.W) / 3 * sum(stages) / num_stages * num_chunks
        return [[task * stage / mean for stage in stages] for task in (self.F, self.B, self.W)]


def all_costs() -> tuple[Costs, ...]:
    """Return equal costs, unequal tasks, the measured ones, and an unequal stage."""
    profile = PROFILES[0]
    return (
        Costs("F = B = W", 1, 1, 1),
        Costs("F:B:W = 1:1.2:0.8", 1, 1.2, 0.8),
        Costs(f"{profile.model}, as profiled", profile.F_s, profile.B_s, profile.W_s),
        Costs("last stage 1.25 times the others", 1, 1, 1, last=1.25),
    )


def measure() -> list[Row]:
    """Return a row for every schedule, size and costs."""
    rows = []
    for num_stages, microbatches in TABLES:
        for name in SCHEDULES:
            chunks = CHUNKS.get(name, 1)
            schedule = tpmlp.make_schedule(name, num_stages, microbatches, chunks)
            for costs in all_costs():
                F, B, W = costs.tasks(num_stages, chunks)
                found = tpmlp.simulate(schedule, F, B, W)
                rows.append(
                    {
                        "schedule": name,
                        "stages": num_stages,
                        "microbatches": microbatches,
                        "chunks": chunks,
                        "costs": costs.name,
                        "ticks": schedule.num_ticks,
                        "theory_ticks": TICKS[name](num_stages, microbatches),
                        "one_task": found.lockstep_s,
                        "paired": found.paired_s,
                        "lockstep": min(found.lockstep_s, found.paired_s),
                        "asynchronous": found.makespan_s,
                        "peak": max(found.peaks) / chunks,
                    }
                )
    return rows
