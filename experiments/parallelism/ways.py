"""The ways to spread one model over M devices, and what each moves and holds, by the compiler."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import tpmlp
from tpmlp.kernels.cost import total_bytes
from tpmlp.losses import get_loss
from tpmlp.pipeline.cost import program_collectives, stage_collectives

Row = dict[str, Any]

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v")
LOSS = "mse"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to use M devices.

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
            return f"TP {self.x}"
        return f"{self.schedule} {self.stage}" + (f" x TP {self.x}" if self.x > 1 else "")

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh."""
        return tpmlp.make_mesh(stage=self.stage, x=self.x)

    def strategy(self, microbatches: int) -> tpmlp.Strategy:
        """Return the strategy; tensor parallel alone runs the batch at once."""
        if self.schedule is None:
            return tpmlp.Strategy()
        chunks = 2 if self.schedule == "interleaved" else 1
        return tpmlp.Strategy(schedule=self.schedule, microbatches=microbatches, chunks=chunks)


def ways(num_devices: int) -> list[Way]:
    """Return tensor parallel, each schedule, and mixtures of tensor parallel and 1F1B or ZB-H1."""
    found = [Way(1, num_devices), *(Way(num_devices, 1, name) for name in SCHEDULES)]
    for stage in (2, 4):
        if 1 < num_devices // stage:
            found += [Way(stage, num_devices // stage, name) for name in ("1f1b", "zb-h1")]
    return found


def weigh(way: Way, model: tpmlp.MLP, *, batch_size: int, microbatches: int) -> Row:
    """Compile a step and return what a device receives and holds, counted and predicted."""
    strategy = way.strategy(microbatches)
    step = tpmlp.value_and_grad(model, loss=LOSS, mesh=way.mesh, strategy=strategy)
    audit = tpmlp.audit(step.compile(batch_size))
    summary = model.summary(way.mesh, batch_size=batch_size, strategy=strategy, loss=LOSS)
    row: Row = {
        "way": way.name,
        "devices": way.stage * way.x,
        "stage": way.stage,
        "x": way.x,
        "schedule": way.schedule,
        "in_program_bytes": sum(r.total_bytes or 0 for r in audit.collectives),
        "collectives": sum(r.count or 0 for r in audit.collectives),
        "temp_bytes": audit.temp_bytes,
        "argument_bytes": audit.argument_bytes,
    }
    if way.schedule is None:
        return row | {
            "predicted_program_bytes": summary.bytes_moved,
            "received_bytes": summary.bytes_moved,
            "message_bytes": 0,
            "needed_message_bytes": 0,
            "predicted_temp_bytes": summary.temp_bytes,
        }
    placement = model.place(way.mesh, strategy)
    given: Any = {"batch_size": batch_size, "loss": get_loss(LOSS)}
    program = total_bytes(program_collectives(placement, **given)) + summary.message_bytes
    stages = [total_bytes(stage_collectives(placement, s, **given)) for s in range(way.stage)]
    return row | {
        "predicted_program_bytes": program,
        "received_bytes": max(stages) + summary.message_bytes,
        "message_bytes": summary.message_bytes,
        "needed_message_bytes": summary.needed_bytes,
        "predicted_temp_bytes": summary.step.total,
    }


def samples(model: tpmlp.MLP, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return made-up samples and targets."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(batch_size, w)) for w in (model.widths[0], model.widths[-1]))
    return x.astype(np.float32), y.astype(np.float32)
