"""What a training step will move and hold on one device, before anything is compiled.

Both predictions walk the program of tpmlp.kernels.backprop in its order. The suite compares them
with what XLA's CPU compiler made of it. Bytes moved are equal, always. Bytes held are equal in the
programs of `make bench` in float32, and within 15 % with every choice of a strategy alone, for
layers of similar widths. They are an estimate elsewhere: choices of types together with others are
0.85 to 1.5 times the predicted, a loss on outputs several times wider than the layers up to twice,
and other compilers order and keep as they like (`make absent`: the column "temp / predicted").
"""

from collections.abc import Iterator

import jax.numpy as jnp

from tpmlp.kernels.backprop import is_kept
from tpmlp.kernels.cost import (
    Collective,
    LayerShape,
    Types,
    backward_collectives,
    forward_collectives,
    gradient_collectives,
    loss_collectives,
)
from tpmlp.kernels.execution import execution
from tpmlp.kernels.step_memory import StepTape
from tpmlp.layout import padded
from tpmlp.losses import Loss
from tpmlp.placement import OnMesh, Placement


def step_collectives(
    placement: Placement,
    *,
    bias: bool,
    batch_size: int,
    dtype: str = "float32",
    loss: Loss | None = None,
    penalty: bool = False,
) -> list[Collective]:
    """Return the collectives of one training step, in order.

    Args:
        placement: the layers on their mesh, with their strategy.
        bias: whether the layers have biases.
        batch_size: samples of one step.
        dtype: of the parameters.
        loss: the loss; None leaves its collectives out.
        penalty: whether there is an elementwise R(W).
    """
    types = step_types(placement, dtype)
    shapes = layer_shapes(placement, bias=bias, batch_size=batch_size)
    forward = [row for shape in shapes for row in forward_collectives(shape, types)]
    objective = objective_collectives(placement, shapes, types, loss=loss, penalty=penalty)
    return [*forward, *objective, *_backward(placement, shapes, types)]


def objective_collectives(
    placement: Placement,
    shapes: list[LayerShape],
    types: Types,
    *,
    loss: Loss | None,
    penalty: bool = False,
) -> list[Collective]:
    """Return the collectives of the loss and of R(W); none of a loss of None.

    Args:
        placement: the layers on their mesh.
        shapes: of every layer.
        types: bytes of an element.
        loss: the loss, or None.
        penalty: whether there is an elementwise R(W).
    """
    if loss is None:
        return []
    return loss_collectives(
        num_outputs=placement.padded_widths[-1],
        gathers_outputs=types.invariant or loss.targets == "any",
        gathers_targets=types.invariant and loss.targets == "values",
        num_reduced=loss.num_reduced,
        num_sums=2,
        mean=loss.reduction == "mean",
        batch=shapes[0].batch,
        penalty=penalty,
        num_arrays=len(shapes) * (1 + shapes[0].bias),
        types=types,
        sizes=placement.sizes,
    )


def step_temp_bytes(
    placement: Placement, *, bias: bool, batch_size: int, dtype: str = "float32"
) -> int | None:
    """Return the bytes of temporaries that one training step needs on a device.

    None where it is not predicted: rings, whose blocks the compiler schedules as it likes, and
    invariant reductions, whose loops hold copies of their own.

    Args:
        placement: the layers on their mesh, with their strategy.
        bias: whether the layers have biases.
        batch_size: samples of one step.
        dtype: of the parameters.
    """
    if (step_types(placement, dtype).ring and placement.num_blocks > 1) or placement.is_invariant:
        return None
    on_cpu, types = placement.platform == "cpu", step_types(placement, dtype)
    step = StepTape(
        shapes=layer_shapes(placement, bias=bias, batch_size=batch_size),
        types=types,
        strategy=placement.strategy,
        writes_transpose=on_cpu,
        moves_bits=on_cpu and types.compute == 2,
    )
    return step.run().temp_bytes()


def _backward(placement: Placement, shapes: list[LayerShape], types: Types) -> Iterator[Collective]:
    num_layers, strategy = len(shapes), placement.strategy
    there = [is_kept(l, num_layers, strategy) for l in range(1, num_layers)]
    for shape in reversed(shapes):
        l = shape.layer
        first = l - 1  # the first layer whose output has to be computed again for this one
        while first > 0 and not there[first - 1]:
            there[first - 1] = True
            first -= 1
        for again in shapes[first : l - 1]:
            yield from forward_collectives(again, types, phase="backward")
        yield from backward_collectives(
            shape, types, input_gradient=l > 1, gathers_input=strategy.keep != "gathered"
        )
        yield from gradient_collectives(shape, types)


def step_types(placement: OnMesh, dtype: str) -> Types:
    """Return the bytes of elements that a strategy means for parameters of a dtype."""
    run = execution(placement, jnp.dtype(dtype))
    # XLA's CPU compiler sums bfloat16 over devices in float32; a ring's hops are the kernel's own.
    widened = placement.platform == "cpu" and run.reduce == jnp.bfloat16
    return Types(
        param=jnp.dtype(dtype).itemsize,
        compute=run.compute.itemsize,
        total=run.total.itemsize,
        reduce=4 if widened else run.reduce.itemsize,
        hop=run.reduce.itemsize,
        ring=placement.strategy.overlap != "none",
        invariant=run.invariant,
        splits_data=placement.splits_data,
        microbatches=placement.strategy.microbatches,
    )


def layer_shapes(placement: Placement, *, bias: bool, batch_size: int) -> list[LayerShape]:
    """Return what each layer is on one device."""
    num_parts = placement.sizes["data"] * placement.strategy.microbatches
    batch = padded(batch_size, placement.row_blocks) // num_parts
    widths = placement.padded_widths
    return [
        LayerShape(
            layer=l,
            d_in=widths[l - 1],
            d_out=widths[l],
            batch=batch,
            bias=bias,
            axes=axes,
            sizes=placement.sizes,
        )
        for l, axes in enumerate(placement.axes, 1)
    ]
