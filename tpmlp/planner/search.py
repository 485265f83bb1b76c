"""Which meshes and strategies there are for a number of devices, and which are worth keeping.

Every mesh data * stage * x * y is one, but for x = 1 with y > 1, which is another name for y = 1.
Of strategies those that may win: a schedule that takes as long as another and holds more is left
out (gpipe beside 1f1b, zb-h2 beside zb-h1 in lockstep), as is what changes numbers (types, rings
and invariant sums are the user's to choose).

All are timed; memory, which takes longer to predict, only as far as it can matter. In the order of
time, a candidate is kept if it fits and is among the first, or holds less than all before it: these
are the Pareto front of time and memory. What every step holds at least decides for most of the
others.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

from tpmlp.pipeline.placement import PipelinePlacement
from tpmlp.planner.bound import least_temp_bytes
from tpmlp.planner.cost import Problem, StepMemory
from tpmlp.planner.timing import StepTime
from tpmlp.predict import layer_shapes, step_types
from tpmlp.strategy import Keep, Strategy

# Of a batch without stages; and for each stage, where the bubble is 1/2 and 1/4 of the products.
MICROBATCHES = (1, 4, 16)
MICROBATCHES_A_STAGE = (2, 4)
SCHEDULES = ("1f1b", "zb-h1", "zb-v")
# A table of more takes seconds to fill, and its bubble ever more microbatches to hide.
MOST_STAGES = 16

TOO_FEW_SAMPLES = "fewer samples than data * microbatches"
NO_PIPELINE = "stages that the layers cannot be cut into"
TOO_LARGE = "more memory than the limit"
NO_BETTER = "slower than those listed and hardly smaller, or the same"
# A slower candidate is worth a look if it holds so much of what the smallest before it does.
SMALLER = 0.95

Sizes = dict[str, int]


class Candidate(NamedTuple):
    """A mesh and a strategy.

    Attributes:
        mesh: devices on each axis.
        strategy: the strategy.
    """

    mesh: Sizes
    strategy: Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A candidate that the model can have.

    Attributes:
        candidate: it.
        placement: where the layers are.
        time: of a step.
    """

    candidate: Candidate
    placement: Any
    time: StepTime


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        kept: the candidates worth keeping with their memory, fastest first.
        left_out: how many others, by reason.
        least: the candidate that holds least of those that do not fit; None if all do.
    """

    kept: list[tuple[Timed, StepMemory]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    least: list[tuple[Timed, StepMemory]] = field(default_factory=list)


def meshes(devices: int) -> Iterator[Sizes]:
    """Yield every mesh of so many devices.

    Examples:
        >>> [tuple(mesh.values()) for mesh in meshes(2)]
        [(1, 1, 2, 1), (1, 2, 1, 1), (2, 1, 1, 1)]
        >>> len(list(meshes(4096)))
        377
    """
    for data in divisors(devices):
        for stage in divisors(devices // data):
            for x in divisors(devices // data // stage):
                y = devices // data // stage // x
                if x > 1 or y == 1:
                    yield {"data": data, "stage": stage, "x": x, "y": y}


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """Return what divides a number, smallest first.

    Examples:
        >>> divisors(12), divisors(7)
        ((1, 2, 3, 4, 6, 12), (1, 7))
    """
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def strategies(mesh: Sizes, compute_dtype: str | None) -> Iterator[Strategy]:
    """Yield the strategies of a mesh that may be the best, simple ones first."""
    # Without a tensor axis nothing is gathered; with stages little is gained by keeping it.
    keeps: tuple[Keep, ...] = ("shard", "recompute")
    if mesh["x"] > 1 and mesh["stage"] == 1:
        keeps = ("shard", "gathered", "recompute")
    for shard_weights in (False, True) if mesh["data"] > 1 else (False,):
        for keep in keeps:
            base = Strategy(keep=keep, shard_weights=shard_weights, compute_dtype=compute_dtype)
            yield from _in_time(base, mesh["stage"])


def _in_time(base: Strategy, num_stages: int) -> Iterator[Strategy]:
    """Yield a strategy with each number of microbatches, and each schedule."""
    if num_stages == 1:
        yield from (replace(base, microbatches=m) for m in MICROBATCHES)
        return
    for each in MICROBATCHES_A_STAGE:
        for schedule in SCHEDULES:
            yield replace(base, microbatches=each * num_stages, schedule=schedule)


def search(
    problem: Problem,
    candidates: Iterable[Candidate],
    *,
    memory_limit: float,
    most: int,
) -> Found:
    """Return the fastest candidates that fit, and the smaller ones, ever slower, after them.

    Args:
        problem: what is trained.
        candidates: meshes and strategies.
        memory_limit: bytes of a device.
        most: how many of the fastest to keep.
    """
    found = Found()
    timed = _timed(problem, candidates, found.left_out)
    smallest = float("inf")
    for one in sorted(timed, key=lambda one: one.time.step_s):
        held = problem.held(one.placement)
        bound = held.peak_bytes + _least_temp_bytes(problem, one.placement)
        if bound > memory_limit:
            found.left_out[TOO_LARGE] += 1
            _note(found, one, replace(held, temp_bytes=bound - held.peak_bytes))
        elif len(found.kept) >= most and bound >= SMALLER * smallest:
            found.left_out[NO_BETTER] += 1
        else:
            memory = problem.memory(one.placement)
            smallest = _judge(found, one, memory, memory_limit, most, smallest)
    return found


def _judge(
    found: Found,
    one: Timed,
    memory: StepMemory,
    memory_limit: float,
    most: int,
    smallest: float,
) -> float:
    """Keep a candidate or say why not; return what the smallest of those kept holds."""
    if memory.peak_bytes > memory_limit:
        found.left_out[TOO_LARGE] += 1
        _note(found, one, memory)
        return smallest
    beaten = len(found.kept) >= most and memory.peak_bytes >= SMALLER * smallest
    if beaten or _is_known(found, one, memory):
        found.left_out[NO_BETTER] += 1
        return smallest
    found.kept.append((one, memory))
    return min(smallest, memory.peak_bytes)


def _is_known(found: Found, one: Timed, memory: StepMemory) -> bool:
    """Return whether another that takes and holds the same is kept: one of x and y turned, say."""
    return any(one.time == other.time and memory == held for other, held in found.kept)


def _note(found: Found, one: Timed, memory: StepMemory) -> None:
    """Remember the candidate that misses the limit by least."""
    if not found.least or memory.peak_bytes < found.least[0][1].peak_bytes:
        found.least[:] = [(one, memory)]


def _timed(
    problem: Problem, candidates: Iterable[Candidate], left_out: Counter[str]
) -> Iterator[Timed]:
    """Yield candidates with their time; count those that the model cannot have."""
    for candidate in candidates:
        reason = _reason(problem, candidate)
        if reason is not None:
            left_out[reason] += 1
            continue
        placement = problem.place(candidate.mesh, candidate.strategy)
        yield Timed(candidate=candidate, placement=placement, time=problem.time(placement))


def _reason(problem: Problem, candidate: Candidate) -> str | None:
    """Return why the model cannot have a candidate; None if it can."""
    mesh, strategy = candidate
    if problem.batch_size < mesh["data"] * strategy.microbatches:
        return TOO_FEW_SAMPLES
    stages, widths = mesh["stage"], problem.model.widths
    chunks = 2 if strategy.schedule == "zb-v" else strategy.chunks
    few = stages * chunks > problem.model.num_layers
    if stages > 1 and (few or stages > MOST_STAGES or len(set(widths[1:-1])) > 1):
        return NO_PIPELINE
    return None


def _least_temp_bytes(problem: Problem, placement: Any) -> int:
    """Return what temporaries are at least; of a pipeline, whose are soon predicted, what they are.

    Of a chain see tpmlp.planner.bound.
    """
    if isinstance(placement, PipelinePlacement):
        return problem.temp_bytes(placement)
    shapes = layer_shapes(placement, bias=problem.model.bias, batch_size=problem.batch_size)
    return least_temp_bytes(shapes, step_types(placement, problem.dtype), placement.strategy)


def all_candidates(devices: int, compute_dtype: str | None) -> Iterator[Candidate]:
    """Yield every mesh with every strategy that may be the best on it."""
    for mesh in meshes(devices):
        for strategy in strategies(mesh, compute_dtype):
            yield Candidate(mesh, strategy)


def describe(mesh: Mapping[str, int], strategy: Strategy) -> str:
    """Return a candidate as a person calls it.

    Examples:
        >>> describe({"data": 2, "stage": 1, "x": 4, "y": 1}, Strategy(shard_weights=True))
        "data=2 x=4, keep='shard', shard_weights=True, microbatches=1"
    """
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
    said = [f"keep={strategy.keep!r}"]
    said += ["shard_weights=True"] if strategy.shard_weights else []
    said += [f"microbatches={strategy.microbatches}"]
    said += [f"schedule={strategy.schedule!r}"] if mesh["stage"] > 1 else []
    return ", ".join([axes, *said])
