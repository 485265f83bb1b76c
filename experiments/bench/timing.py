"""Programs, and how they are timed: compiled first, warmed, then in turns.

A machine's speed drifts over seconds, so that two programs timed one after the other differ even
when they are the same. Here every round runs each program once, and ratios are taken within a
round (experiments.bench.summary), where drift falls out of them.
"""

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import jax

import tpmlp
from experiments.bench.problem import DType, Form

Group = Literal["kernel", "unsharded", "automatic", "products"]

# One run may be this much slower than another by bad luck alone.
FIRST_SCREEN = 1.3
# A run that takes longer hides what a cold start costs.
LONG_S = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What a program is, in words that go into the record.

    Attributes:
        group: whom it belongs to; the fastest of a group stands for it.
        variant: how it is partitioned.
        form: how it lays samples out; None where it is not free to choose.
        mesh: devices as X x Y, or data x X x Y.
        devices: their number.
        dtype: of the products.
    """

    group: Group
    variant: str
    form: Form | None = None
    mesh: str = ""
    devices: int = 1
    dtype: DType


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measurement:
    """What is known of one program: a row of the record.

    Attributes:
        label: what it is.
        compile_s: seconds that tracing, lowering and compiling took.
        temp_bytes: buffers that live within a call, on one device.
        peak_bytes: most memory in use at once, on one device.
        received_bytes: by collectives, on one device.
        product_flops: of matrix products, on one device.
        predicted_temp_bytes: temporaries as tpmlp predicts them; None where it does not.
        predicted_received_bytes: likewise.
        screen_s: seconds of each screening run.
        seconds: of each round; empty if the program was screened out.
    """

    label: Label
    compile_s: float
    temp_bytes: int
    peak_bytes: int
    received_bytes: float
    product_flops: int
    predicted_temp_bytes: int | None = None
    predicted_received_bytes: float | None = None
    screen_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        """Return it as plain data, the label's fields among the others."""
        row = asdict(self)
        return {**row.pop("label"), **row}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Program:
    """A compiled program, its arguments bound.

    Attributes:
        run: runs it once; results may still be on their way when it returns.
        measurement: what is known of it; outlives the program and its arrays.
    """

    run: Callable[[], Any]
    measurement: Measurement

    @property
    def least_s(self) -> float:
        """The least time of a screening run."""
        return min(self.measurement.screen_s)


def make_program(label: Label, function: Any, *args: Any, **predicted: Any) -> Program:
    """Compile a jitted function, or a tpmlp step, for its arguments; add what was predicted."""
    # The function itself is called, not what is compiled here: it finds the same executable, and
    # jit's own way of calling it is the quick one.
    measurement = replace(measurement_of(label, function, *args), **predicted)
    return Program(run=lambda: function(*args), measurement=measurement)


def measurement_of(label: Label, function: Any, *args: Any) -> Measurement:
    """Compile a jitted function, or a tpmlp step, and return what the compiled program tells."""
    began = time.perf_counter()
    compiled = function.lower(*args).compile()
    compile_s = time.perf_counter() - began
    audit = tpmlp.audit(compiled)
    return Measurement(
        label=label,
        compile_s=compile_s,
        temp_bytes=audit.temp_bytes,
        peak_bytes=audit.peak_bytes,
        received_bytes=audit.bytes_by(),
        product_flops=audit.product_flops,
    )


def finalists(
    programs: Iterable[Program], *, screen: float, at_most: int | None = None
) -> list[Program]:
    """Return the programs that may turn out the fastest of their group.

    Rounds need not repeat what is clearly slower: all are run once, those within FIRST_SCREEN
    of the fastest of their group so far are kept and run once more, and what then never came
    within `screen` is dropped.

    Args:
        programs: any number of each group; if an iterator makes them, those that are dropped
            free their arrays before the next is made.
        screen: at least 1; infinity keeps all.
        at_most: how many of a group to keep, the fastest; None keeps all.
    """
    slack = max(FIRST_SCREEN, screen)
    groups: dict[Group, list[Program]] = {}
    for program in programs:
        program.measurement.screen_s.append(_least_s(program.run))
        group = program.measurement.label.group
        groups[group] = _within([*groups.get(group, []), program], slack)
        del program
    for rivals in groups.values():
        for program in rivals if len(rivals) > 1 else ():
            program.measurement.screen_s.append(_least_s(program.run))
    return [p for rivals in groups.values() for p in _within(rivals, screen)[:at_most]]


def interleave(programs: Sequence[Program], rounds: int) -> None:
    """Run each program once a round, and append its seconds.

    The order is turned round every other round: what runs before a program (and leaves it the
    caches, and the memory allocator, in some state) is not always the same.
    """
    for turn in range(rounds):
        for program in programs[:: -1 if turn % 2 else 1]:
            program.measurement.seconds.append(timed(program.run))


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds until the results of one run are there."""
    gc.collect(0)
    began = time.perf_counter()
    results = jax.block_until_ready(run())
    elapsed_s = time.perf_counter() - began
    # Freeing the results is not part of the time of whoever runs next.
    del results
    return elapsed_s


def _least_s(run: Callable[[], Any]) -> float:
    """Return the time of one run; of a short one, which a cold start spoils, the least of three."""
    first_s = timed(run)
    return first_s if first_s > LONG_S else min(first_s, timed(run), timed(run))


def _within(rivals: Sequence[Program], slack: float) -> list[Program]:
    """Return the rivals within `slack` of the fastest, fastest first."""
    ordered = sorted(rivals, key=lambda program: program.least_s)
    return [p for p in ordered if p.least_s <= slack * ordered[0].least_s]
