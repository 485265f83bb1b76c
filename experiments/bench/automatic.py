"""The baselines: plain JAX under jit, on one device, or partitioned by XLA from annotations.

Written as a JAX user would write them, and given what helps them: each with samples as columns
and as rows, placed inputs, gradients placed as the weights. The annotations, for devices x (and
y), samples never split:

    output-sharded      W_l split by outputs; nothing said about activations
    constrained         the same, and every activation constrained to split features
    alternating         W_l split by outputs, by inputs, in turn (Megatron): activations
                        are split between the two and whole after them
    2D, over both       W_l split over x and y; every activation over both
    2D, over one        the same; every activation over the axis of its layer's outputs

In bfloat16 the weights stay float32, are cast in the step, and products take bfloat16 and add in
float32, forward and backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

import tpmlp
from experiments.bench.problem import FORMS, DType, Form, Problem
from experiments.bench.timing import Label, Program, make_program

# Mesh axes over which a dim is split; None is whole.
Axes = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """How the arrays of one layer are split.

    Attributes:
        outputs: axes of the output dim of W_l.
        inputs: axes of its input dim.
        bias: axes of b_l.
        activations: axes of the features of z_l and h_{l+1}; "free" leaves them to XLA.
    """

    outputs: Axes
    inputs: Axes
    bias: Axes
    activations: Axes | Literal["free"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Partitioning:
    """One way to annotate a network.

    Attributes:
        layers: the annotations of layers 1, 2, 3, ..., in turn.
        x: axes of the features of the samples.
        y: axes of the features of the targets, by the annotations of the last layer.
    """

    layers: tuple[Annotations, ...]
    x: Axes = None
    y: Callable[[Annotations], Axes] = lambda last: last.outputs

    def layer(self, index: int) -> Annotations:
        """Return the annotations of a layer, counted from 0."""
        return self.layers[index % len(self.layers)]


X_Y, Y_X = ("x", "y"), ("y", "x")

BY_OUTPUTS = Annotations(outputs="x", inputs=None, bias="x", activations="free")
BY_INPUTS = Annotations(outputs=None, inputs="x", bias=None, activations="free")

ONE_AXIS = {
    "output-sharded": Partitioning(layers=(BY_OUTPUTS,)),
    "constrained": Partitioning(
        layers=(Annotations(outputs="x", inputs=None, bias="x", activations="x"),), x="x"
    ),
    "alternating": Partitioning(layers=(BY_OUTPUTS, BY_INPUTS)),
}
TWO_AXES = {
    "2D, over both": Partitioning(
        layers=(
            Annotations(outputs="x", inputs="y", bias=X_Y, activations=X_Y),
            Annotations(outputs="y", inputs="x", bias=Y_X, activations=Y_X),
        ),
        x=Y_X,
        y=lambda last: last.activations,
    ),
    "2D, over one": Partitioning(
        layers=(
            Annotations(outputs="x", inputs="y", bias="x", activations="x"),
            Annotations(outputs="y", inputs="x", bias="y", activations="y"),
        ),
        x="y",
    ),
}


def automatic_labels(num_devices: int, dtype: DType) -> list[Label]:
    """Return the label of every automatic partitioning over a number of devices.

    With 8 devices the 2D ones run on 4 x 2 and on 2 x 4; two devices have no 2D.
    """
    meshes = [(name, num_devices, 1) for name in ONE_AXIS]
    meshes += [
        (name, num_devices // y, y)
        for name in TWO_AXES
        for y in range(2, num_devices // 2 + 1)
        if num_devices % y == 0
    ]
    return [
        Label(
            group="automatic",
            variant=name,
            form=form,
            mesh=f"{x}x{y}",
            devices=num_devices,
            dtype=dtype,
        )
        for name, x, y in meshes
        for form in FORMS
    ]


def unsharded_labels(dtype: DType) -> list[Label]:
    """Return the labels of the network on one device."""
    return [
        Label(group="unsharded", variant="one device", form=form, dtype=dtype) for form in FORMS
    ]


def unsharded(problem: Problem, label: Label) -> Program:
    """Return the network on one device, which has all the cores, compiled."""
    assert label.form is not None
    step = jax.jit(jax.value_and_grad(partial(loss, form=label.form, dtype=label.dtype)))
    one = SingleDeviceSharding(jax.devices()[0])
    return make_program(label, step, *jax.device_put(problem.arranged(label.form), one))


def automatic(problem: Problem, label: Label) -> Program:
    """Return the automatic partitioning that a label names, compiled."""
    assert label.form is not None
    x, y = map(int, label.mesh.split("x"))
    placed = Placed(
        mesh=tpmlp.make_mesh(x=x, y=y),
        plan=(ONE_AXIS | TWO_AXES)[label.variant],
        form=label.form,
    )
    num_layers = problem.size.layers
    params = [placed.layer(index) for index in range(num_layers)]
    last = placed.plan.layer(num_layers - 1)
    samples, targets = placed.features(placed.plan.x), placed.features(placed.plan.y(last))
    step = jax.jit(
        jax.value_and_grad(
            partial(loss, form=label.form, dtype=label.dtype, constrain=placed.constrain)
        ),
        out_shardings=(placed.sharding(), params),
    )
    args = jax.device_put(problem.arranged(label.form), (params, samples, targets))
    return make_program(label, step, *args)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A partitioning on a mesh, in a form.

    Attributes:
        mesh: the mesh.
        plan: the partitioning.
        form: whether samples are columns or rows.
    """

    mesh: Mesh
    plan: Partitioning
    form: Form

    def sharding(self, *dims: Axes) -> NamedSharding:
        """Return the sharding of an array with these axes for its dims."""
        return NamedSharding(self.mesh, PartitionSpec(*dims))

    def features(self, axes: Axes) -> NamedSharding:
        """Return the sharding of activations whose features are split over these axes."""
        return self.sharding(*((axes, None) if self.form == "features first" else (None, axes)))

    def layer(self, index: int) -> tuple[NamedSharding, NamedSharding]:
        """Return the shardings of (W_l, b_l), l counted from 0."""
        layer = self.plan.layer(index)
        dims = (layer.outputs, layer.inputs)
        weights = self.sharding(*(dims if self.form == "features first" else dims[::-1]))
        return weights, self.sharding(layer.bias)

    def constrain(self, z: jax.Array, index: int) -> jax.Array:
        """Return activations of a layer, constrained as the partitioning says."""
        axes = self.plan.layer(index).activations
        return z if axes == "free" else lax.with_sharding_constraint(z, self.features(axes))


# The network


def loss(
    params: Any,
    x: jax.Array,
    y: jax.Array,
    *,
    form: Form,
    dtype: DType,
    constrain: Callable[[jax.Array, int], jax.Array] = lambda z, index: z,
) -> jax.Array:
    """Compute the mean squared error of the network.

    Args:
        params: (W_l, b_l) for each layer.
        x: samples.
        y: targets.
        form: how all of them are laid out.
        dtype: of the operands of products.
        constrain: applied to z_l and h_{l+1}, with the layer counted from 0.
    """
    z = x
    for index, (W, b) in enumerate(params):
        h = constrain(jax.nn.relu(z).astype(dtype), index - 1) if index else x.astype(dtype)
        if form == "features first":
            z = product(W, h, dtype) + b[:, None]
        else:
            z = product(h, W, dtype) + b[None, :]
        z = constrain(z, index)
    return jnp.mean((z - y) ** 2)


def _product(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Compute a @ b from operands cast to dtype, added in float32."""
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _forward(
    a: jax.Array, b: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(a, b, dtype), (a, b)


def _backward(
    dtype: DTypeLike, operands: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cast g too: autodiff would multiply float32 by bfloat16, which no processor does fast."""
    a, b = operands
    return _product(g, b.T, dtype).astype(a.dtype), _product(a.T, g, dtype).astype(b.dtype)


product = jax.custom_vjp(_product, nondiff_argnums=(2,))
product.defvjp(_forward, _backward)
