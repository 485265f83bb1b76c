"""The ways to spread one model over M devices: tensor parallel, pipelines, and both at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

import tpmlp

Row = dict[str, Any]

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v")
CHUNKS: Mapping[str, int] = {"interleaved": 2, "zb-v": 2}
# Those of the mixtures: the usual one, and the shortest with one chunk a stage.
MIXED = ("1f1b", "zb-h1")
LOSS = "mse"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to use stage * x devices.

    Attributes:
        stage: pipeline stages.
        x: devices that share the features of a stage.
        schedule: what the stages do; None without stages.
    """

    stage: int
    x: int
    schedule: str | None = None

    @property
    def name(self) -> str:
        """What tables and figures call it."""
        if self.schedule is None:
            return "tensor parallel"
        return f"{self.schedule} {self.stage} x {self.x}" if self.x > 1 else self.schedule

    @property
    def num_devices(self) -> int:
        """M."""
        return self.stage * self.x

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh."""
        return tpmlp.make_mesh(stage=self.stage, x=self.x)

    def takes(self, microbatches: int) -> bool:
        """Return whether the schedule runs with as many microbatches."""
        if self.schedule == "interleaved":
            return microbatches % self.stage == 0
        return self.schedule in (None, "gpipe", "1f1b") or microbatches >= self.stage

    def strategy(self, microbatches: int) -> tpmlp.Strategy:
        """Return the strategy; tensor parallel alone runs the batch at once."""
        if self.schedule is None:
            return tpmlp.Strategy()
        chunks = CHUNKS.get(self.schedule, 1)
        return tpmlp.Strategy(schedule=self.schedule, microbatches=microbatches, chunks=chunks)


def ways(num_devices: int) -> list[Way]:
    """Return tensor parallel, a pipeline of each schedule, and every mixture of both.

    Examples:
        >>> [way.name for way in ways(4)[-3:]]
        ['zb-v', '1f1b 2 x 2', 'zb-h1 2 x 2']
    """
    found = [Way(1, num_devices), *(Way(num_devices, 1, name) for name in SCHEDULES)]
    for stage in range(2, num_devices):
        if num_devices % stage == 0:
            found += [Way(stage, num_devices // stage, name) for name in MIXED]
    return found
