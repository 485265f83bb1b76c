"""What moves between stages in a step: z forward and g back, as a schedule's buffers say when."""

from typing import NamedTuple

import numpy as np

from tpmlp.pipeline.buffers import NOTHING, Content
from tpmlp.pipeline.placement import StagePlacement


class Messages(NamedTuple):
    """Bytes that a device receives from other stages in a step.

    Attributes:
        in_program: of the compiled program, where every tick may bring a message.
        moved: in the ticks that bring any stage one.
        needed: of that what some task reads, on the stage that gets most.
    """

    in_program: int
    moved: int
    needed: int


def message_bytes(placement: StagePlacement, h: int, g: int) -> Messages:
    """Return what moves between stages.

    Args:
        placement: on the mesh.
        h: bytes of a message.
        g: bytes of a gradient of one.
    """
    plan, num_ticks = placement.buffers, placement.schedule.num_ticks
    in_program = moved = needed = 0
    sizes: list[tuple[Content, int]] = [("h", h), ("g", g)]
    for content, size in sizes:
        between = {by: ticks for by, ticks in plan.moves(content).items() if by}
        in_program += len(between) * num_ticks * size
        moved += sum(int(ticks.sum()) for ticks in between.values()) * size
        came = sum((getattr(of, content) != NOTHING).sum(axis=0) for by, of in plan.rings if by)
        needed += int(np.max(came)) * size
    return Messages(in_program, moved, needed)
