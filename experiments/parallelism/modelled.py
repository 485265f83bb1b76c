"""Seconds of a step on real links: products at one rate, bytes at another, nothing overlapped.

    a task         FLOPs / flops_per_s + bytes / bytes_per_s + collectives * latency_s
    asynchronous   makespan of tpmlp.simulate, a message after each task that sends one
    lockstep       the slowest task of each tick, and the messages that the step moves after it
    tensor         one task after another, no bubble

Theory, for width d, M devices, m microbatches, s bytes a number, R FLOPs a second, in shares of
the products' own time: tensor parallel sends two arrays a layer, s R (M - 1) / (3 d bytes_per_s),
and a pipeline waits k (M - 1) / m, with k = 1 for 1F1B and GPipe, 1/2 with two chunks a stage, 1/3
for ZB-H1, 1/6 for ZB-V. Both grow as M - 1: they are equal, whatever M, batch and depth are, at

    bytes_per_s = s m R / (3 d k)

The model adds what pipelines send and, in lockstep, that stages are not quite alike. Both move the
turning point down: tensor parallel is faster on slower links than theory says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.optimize import root_scalar

import tpmlp
from experiments.parallelism.ways import Row, Way, ways
from experiments.parallelism.work import Amount, Work, flops, work

# The k above.
BUBBLES: Mapping[str, float] = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 1 / 2,
    "zb-h1": 1 / 3,
    "zb-h2": 1 / 3,
    "zb-v": 1 / 6,
}
RUNTIMES = ("asynchronous_s", "lockstep_s")
# Links between which tensor parallel turns from slower to faster, if it does.
SLOWEST, FASTEST = 1e6, 1e17


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A device and the link between devices.

    Attributes:
        flops_per_s: of products.
        bytes_per_s: that a device receives.
        latency_s: of each collective or message.
    """

    flops_per_s: float
    bytes_per_s: float
    latency_s: float = 0.0

    def seconds(self, amount: Amount) -> float:
        """Return how long something takes."""
        return (
            amount.flops / self.flops_per_s
            + amount.bytes / self.bytes_per_s
            + amount.collectives * self.latency_s
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is spread over devices.

    Attributes:
        width: of every layer.
        layers: L + 1.
        batch_size: samples of a step.
        item_bytes: of every number that moves.
    """

    width: int
    layers: int
    batch_size: int
    item_bytes: int

    @property
    def model(self) -> tpmlp.MLP:
        """The model."""
        return tpmlp.MLP((self.width,) * (self.layers + 1))

    def work(self, way: Way, microbatches: int) -> Work:
        """Return what a step of a way takes."""
        given = {"batch_size": self.batch_size, "item_bytes": self.item_bytes}
        return work(way, self.model, microbatches=microbatches, **given)

    def ideal_s(self, num_devices: int, link: Link) -> float:
        """Return the seconds of the products alone, shared by all devices without a wait."""
        return flops(self.model, self.batch_size) / num_devices / link.flops_per_s


def step_s(taken: Work, link: Link) -> dict[str, float]:
    """Return the seconds of a step: of an asynchronous runtime, and in lockstep."""
    once = link.seconds(taken.once)
    if taken.schedule is None or taken.tasks is None:
        return dict.fromkeys(RUNTIMES, once)
    times = {f"{kind}_s": list(map(link.seconds, tasks)) for kind, tasks in taken.tasks.items()}
    alone, in_step = (
        tpmlp.simulate(taken.schedule, **times, transfer_s=link.seconds(moved))
        for moved in (taken.message, taken.tick)
    )
    return {
        "asynchronous_s": once + alone.makespan_s,
        "lockstep_s": once + in_step.lockstep_s,
    }


def sweep(
    problem: Problem,
    link: Link,
    *,
    devices: Sequence[int],
    microbatches: int,
    bandwidths: Sequence[float],
) -> list[Row]:
    """Return the seconds of a step of every way on every link."""
    rows = []
    for num_devices in devices:
        for way in ways(num_devices):
            taken = problem.work(way, microbatches)
            for bytes_per_s in bandwidths:
                there = replace(link, bytes_per_s=bytes_per_s)
                rows.append(
                    {
                        "devices": num_devices,
                        "way": way.name,
                        "bytes_per_s": bytes_per_s,
                        "ideal_s": problem.ideal_s(num_devices, there),
                        **step_s(taken, there),
                    }
                )
    return rows


def turning_points(
    problem: Problem, link: Link, *, devices: Sequence[int], microbatches: Sequence[int]
) -> list[Row]:
    """Return the link above which tensor parallel is faster than each pipeline."""
    rows = []
    for num_devices in devices:
        tensor, *others = ways(num_devices)
        for m in microbatches:
            for way in (other for other in others if other.x == 1 and other.takes(m)):
                given = (problem.work(tensor, m), problem.work(way, m), link)
                found = {runtime: turning_bytes_per_s(*given, runtime) for runtime in RUNTIMES}
                rows.append(
                    {
                        "devices": num_devices,
                        "microbatches": m,
                        "schedule": way.schedule,
                        "theory_bytes_per_s": theory_bytes_per_s(problem, link, way, m),
                        "bytes_per_s": found["asynchronous_s"],
                        "lockstep_bytes_per_s": found["lockstep_s"],
                    }
                )
    return rows


def turning_bytes_per_s(tensor: Work, pipeline: Work, link: Link, runtime: str) -> float | None:
    """Return the bytes_per_s above which tensor parallel is faster; None if it never is.

    Args:
        tensor: of tensor parallel.
        pipeline: of another way.
        link: the device and the latency; its bytes_per_s does not matter.
        runtime: one of RUNTIMES.
    """

    def behind(seconds_per_terabyte: float) -> float:
        """Return how much longer tensor parallel takes."""
        there = replace(link, bytes_per_s=1e12 / seconds_per_terabyte)
        return step_s(tensor, there)[runtime] - step_s(pipeline, there)[runtime]

    if behind(1e12 / FASTEST) >= 0:
        return None
    if behind(1e12 / SLOWEST) <= 0:
        return 0.0
    return 1e12 / root_scalar(behind, bracket=(1e12 / FASTEST, 1e12 / SLOWEST), xtol=1e-9).root


def theory_bytes_per_s(problem: Problem, link: Link, way: Way, microbatches: int) -> float:
    """Return the turning point of the equation above."""
    bubble = BUBBLES[str(way.schedule)]
    one = problem.item_bytes * microbatches * link.flops_per_s
    return one / (3 * problem.width * bubble)
