"""What a device receives and holds under each way: in the compiled program, and as predicted.

A pipeline's program has every stage's tasks as branches, once a tick. Two numbers of bytes follow:
those in the program, which an audit counts, and those that a device of the busiest stage receives,
which runs its own branches only. A program in step moves messages for all stages or for none: in
every tick, as it is compiled, and in those that bring any stage one, as it runs.

Held is what is there at once: arguments (parameters, samples), results (gradients) and temporaries.
Neither way's temporaries say enough alone: kept activations, and sums of gradients, lie in the
memory of results to come.
"""

from typing import Any

import tpmlp
from experiments.parallelism.ways import LOSS, Row, Way
from experiments.parallelism.work import FLOAT_BYTES
from tpmlp.kernels.cost import total_bytes
from tpmlp.losses import get_loss
from tpmlp.pipeline.cost import program_collectives, stage_collectives


def count(way: Way, model: tpmlp.MLP, *, batch_size: int, microbatches: int) -> Row:
    """Compile a step of a way; return what a device receives and holds, counted and predicted."""
    strategy = way.strategy(microbatches)
    step = tpmlp.value_and_grad(model, loss=LOSS, mesh=way.mesh, strategy=strategy)
    audit = tpmlp.audit(step.compile(batch_size))
    return {
        "way": way.name,
        "devices": way.num_devices,
        "stage": way.stage,
        "x": way.x,
        "schedule": way.schedule,
        "bytes": audit.bytes_by(),
        "collectives": sum(audit.counts.values()),
        "argument_bytes": audit.argument_bytes,
        "output_bytes": audit.output_bytes,
        "temp_bytes": audit.temp_bytes,
        "held_bytes": audit.peak_bytes,
        **predict(way, model, batch_size=batch_size, microbatches=microbatches),
    }


def predict(way: Way, model: tpmlp.MLP, *, batch_size: int, microbatches: int) -> Row:
    """Return the same without compiling; received_bytes are of the busiest stage."""
    strategy = way.strategy(microbatches)
    summary = model.summary(way.mesh, batch_size=batch_size, strategy=strategy, loss=LOSS)
    samples = batch_size * (model.widths[0] + model.widths[-1]) // way.x * FLOAT_BYTES
    if way.schedule is None:
        return {
            "predicted_bytes": summary.bytes_moved,
            "predicted_collectives": sum(row.times for row in summary.collectives),
            "run_collectives": sum(row.times for row in summary.collectives),
            "received_bytes": summary.bytes_moved,
            "message_bytes": 0,
            "needed_message_bytes": 0,
            "predicted_temp_bytes": summary.temp_bytes,
            "predicted_held_bytes": 2 * summary.param_bytes + samples + summary.temp_bytes,
        }
    placement: Any = model.place(way.mesh, strategy)
    given: Any = {"batch_size": batch_size, "loss": get_loss(LOSS)}
    program = program_collectives(placement, **given)
    message = batch_size // microbatches * model.widths[1] // way.x * FLOAT_BYTES
    stages = (stage_collectives(placement, stage, **given) for stage in range(way.stage))
    busiest = max(stages, key=total_bytes)
    temporaries = summary.step.total
    return {
        "predicted_bytes": total_bytes(program) + summary.messages.in_program,
        "predicted_collectives": sum(r.times for r in program)
        + summary.messages.in_program // message,
        "run_collectives": sum(r.times for r in busiest) + summary.messages.moved // message,
        "received_bytes": total_bytes(busiest) + summary.messages.moved,
        "message_bytes": summary.messages.moved,
        "needed_message_bytes": summary.messages.needed,
        "predicted_temp_bytes": temporaries,
        "predicted_held_bytes": 2 * summary.param_bytes + samples + temporaries,
    }
