"""The published schedules: one rule (fill.py) under different limits.

What makes one schedule differ from another is how far a stage may run ahead: two limits for each
stage s of p, in activations of one chunk of a microbatch, and whether B and W are one task.

    schedule     F that may wait for their B         activations that may live   B and W
    gpipe        m                                   m                           one
    1f1b         p - s                               p                           one
    interleaved  2 (p - s - 1) + (v - 1) p + 1       v p + p - 1                 one
    zb-h1        p - s                               p                           two
    zb-h2        2 (p - s) - 1                       2 p - 1                     two
    zb-v         2 p                                 2 p                         two

Ticks and activations that docstrings give are checked in the suite, for p of 2, 4 and 8.

References:
    Huang et al., GPipe, 2019. Narayanan et al., Efficient Large-Scale Language Model Training on
    GPU Clusters Using Megatron-LM, SC 2021: 1F1B, interleaved. Qi et al., Zero Bubble Pipeline
    Parallelism, ICLR 2024: ZB-H1, ZB-H2, ZB-V.
"""

from collections.abc import Callable

from tpmlp.pipeline.fill import PerStage, fill
from tpmlp.pipeline.route import Route, check_at_least, check_choice
from tpmlp.pipeline.schedule import Schedule


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """Return all F, then all B and W: 3(m + p - 1) ticks, m activations."""
    m = num_microbatches
    route = Route(num_stages=num_stages, splits_backward=False)
    return _schedule("gpipe", route, m, lambda s: m, m)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """Return 1F1B, one B and W for each F: 3(m + p - 1) ticks like GPipe, but p activations."""
    p, m = num_stages, num_microbatches
    route = Route(num_stages=p, splits_backward=False)
    return _schedule("1f1b", route, m, lambda s: p - s, p)


def interleaved(num_stages: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """Return Megatron's interleaved 1F1B: 3mv + 3(p - 1) ticks, pv + p - 1 activations, of a chunk.

    A stage has v chunks of 1/v of its layers, so that the first microbatch is at the last stage
    after p - 1 ticks of a chunk, not of all layers: the bubble is that of 1F1B divided by v, and
    there are v times as many messages. Microbatches go in groups of p, so that each chunk of a
    group ends on the last stage just when the first stage is free to go on with it.

    Raises:
        ValueError: m is no multiple of p, or there is one chunk only.
    """
    p, m, v = num_stages, num_microbatches, num_chunks
    check_at_least(1, num_stages=p, num_microbatches=m, num_chunks=v)
    if v < 2:
        raise ValueError(
            f"num_chunks must be at least 2 for interleaved: got num_chunks={v}. Use num_chunks=2, "
            "or the schedule 1f1b."
        )
    if m % p:
        raise ValueError(
            f"num_microbatches must be a multiple of num_stages={p} for interleaved: got "
            f"num_microbatches={m}. Use {m + -m % p}, or the schedule 1f1b."
        )
    route = Route(num_stages=p, num_chunks=v, splits_backward=False)
    return _schedule(
        "interleaved", route, m, lambda s: 2 * (p - s - 1) + (v - 1) * p + 1, v * p + p - 1
    )


def zb_h1(num_stages: int, num_microbatches: int) -> Schedule:
    """Return ZB-H1: 3m + p - 1 ticks with the p activations of 1F1B.

    A gradient moves on after B, and W fills the slots in which 1F1B waits. The last stage cannot
    start before tick p - 1 and has 3m tasks, so no schedule of a single step is shorter.

    Raises:
        ValueError: m < p, where the way of one microbatch there and back is what takes longest.
    """
    p, m = num_stages, num_microbatches
    _check_enough("zb-h1", p, m)
    return _schedule("zb-h1", Route(num_stages=p), m, lambda s: p - s, p)


def zb_h2(num_stages: int, num_microbatches: int) -> Schedule:
    """Return ZB-H2: 3m + p - 1 ticks, and no stage idle between its first task and its last.

    The latter from m = 2p - 1 on. It takes 2p - 1 activations, and gains where a stage may begin
    its next step as soon as it has ended this one; where all stages end a step together, it is no
    faster than ZB-H1.

    Raises:
        ValueError: m < p.
    """
    p, m = num_stages, num_microbatches
    _check_enough("zb-h2", p, m)
    return _schedule("zb-h2", Route(num_stages=p), m, lambda s: 2 * (p - s) - 1, 2 * p - 1)


def zb_v(num_stages: int, num_microbatches: int) -> Schedule:
    """Return ZB-V, two chunks that go down the stages and come back: 6m + p - 1 ticks of a chunk.

    For m = p, and from m = 2p - 1 on. It takes 2p activations of half a stage, the memory of 1F1B,
    on every stage alike. The published table ends each stage 6m ticks after its start; here the
    first stages wait up to p - 1 ticks for the last gradients, which ends no step later.

    Raises:
        ValueError: m < p.
    """
    p, m = num_stages, num_microbatches
    _check_enough("zb-v", p, m)
    route = Route(num_stages=p, num_chunks=2, order="v")
    return _schedule("zb-v", route, m, lambda s: 2 * p, 2 * p)


MAKERS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
}
SCHEDULES = (*MAKERS, "interleaved")


def make_schedule(
    name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> Schedule:
    """Return a published schedule by its name.

    Args:
        name: one of SCHEDULES.
        num_stages: p.
        num_microbatches: m; at least p for zb-h1, zb-h2 and zb-v, a multiple of p for interleaved.
        num_chunks: v, at least 2 for interleaved; zb-v always has its two, the others one.

    Raises:
        ValueError: an unknown name, too few microbatches, or chunks for a schedule without.

    Examples:
        >>> print(make_schedule("zb-h1", num_stages=2, num_microbatches=3))
        name=zb-h1 order=loop splits_backward=True peak=2
        stage 0 | F0 F1 .  B0 W0 F2 B1 W1 B2 W2
        stage 1 | .  F0 B0 F1 B1 W0 F2 B2 W1 W2
    """
    check_choice("name", name, SCHEDULES)
    p, m = num_stages, num_microbatches
    check_at_least(1, num_stages=p, num_microbatches=m, num_chunks=num_chunks)
    if name == "interleaved":
        return interleaved(p, m, num_chunks)
    schedule = MAKERS[name](p, m)
    if num_chunks not in (1, schedule.num_chunks):
        raise ValueError(
            f"num_chunks must be {schedule.num_chunks} for {name}: got num_chunks={num_chunks}. "
            "Leave it out, or use the schedule interleaved."
        )
    return schedule


def _check_enough(name: str, num_stages: int, num_microbatches: int) -> None:
    if num_microbatches < num_stages:
        raise ValueError(
            f"num_microbatches must be at least num_stages={num_stages} for {name}: got "
            f"num_microbatches={num_microbatches}. Use {num_stages} or more, or the schedule 1f1b."
        )


def _schedule(name: str, route: Route, m: int, ahead: PerStage, live: int) -> Schedule:
    """Return the table that the rule fills under these limits; the peak is what it promises."""
    check_at_least(1, num_stages=route.num_stages, num_microbatches=m)
    return Schedule(
        name=name,
        num_stages=route.num_stages,
        num_microbatches=m,
        num_chunks=route.num_chunks,
        ticks=fill(route, m, ahead, live),
        splits_backward=route.splits_backward,
        order=route.order,
        peak=min(live, m * route.num_chunks),
    )
