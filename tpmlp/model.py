"""The model: a multilayer perceptron, and its parameters as plain pytrees.

    h_1 = x,   z_l = W_l h_l + b_l,   h_{l+1} = sigma(z_l),   h(W, x) = z_{L+1}

Parameters are a tuple of layers (W_l, b_l), l at index l - 1: JAX arrays split over the mesh and
padded with zeros to widths that the mesh divides. What users see at logical widths comes from
`to_numpy`.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from tpmlp.activations import Activation, get_activation
from tpmlp.inspection.draw import draw_layers
from tpmlp.inspection.summary import Summary, summarize
from tpmlp.kernels.backprop import Chain
from tpmlp.layout import padded
from tpmlp.losses import UserLoss, get_loss
from tpmlp.placement import Placement, place
from tpmlp.strategy import Strategy

Params = tuple[tuple[jax.Array, jax.Array | None], ...]
Arrays = list[tuple[np.ndarray, np.ndarray | None]]

# Activations that vanish on half of the line lose half of the variance: He's factor 6 makes up
# for it, Glorot's is for the others.
# References: He et al. 2015, Delving Deep into Rectifiers, eq. 10; Glorot and Bengio 2010,
# Understanding the difficulty of training deep feedforward neural networks, eq. 16.
_HE = frozenset({"relu", "gelu", "silu", "softplus"})


@dataclass(frozen=True, slots=True)
class MLP:
    """A multilayer perceptron; it holds no arrays.

    Attributes:
        widths: d_0 .. d_{L+1}, inputs first, outputs last; two widths are a linear model.
        activation: a name (relu, gelu, silu, tanh, sigmoid, softplus, identity) or a pair of
            functions (sigma, sigma_prime).
        bias: whether the layers have biases.

    Raises:
        ValueError: fewer than two widths, a width that is not a positive integer, an unknown
            activation.

    Examples:
        >>> mlp = MLP((64, 256, 10), activation="tanh")
        >>> mlp.num_layers, mlp.num_parameters
        (2, 19210)
    """

    widths: tuple[int, ...]
    activation: Any = "relu"
    bias: bool = True
    sigma: Activation = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", _check_widths(self.widths))
        object.__setattr__(self, "sigma", get_activation(self.activation))

    @property
    def num_layers(self) -> int:
        """The number of W_l."""
        return len(self.widths) - 1

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases, padding not counted."""
        pairs = zip(self.widths, self.widths[1:], strict=False)
        return sum(d_in * d_out + d_out * self.bias for d_in, d_out in pairs)

    def init(
        self, key: jax.Array, mesh: Mesh, *, strategy: Strategy | None = None, dtype: Any = None
    ) -> Params:
        """Draw weights; the same numbers, bit for bit, on every mesh. Biases are 0.

        W_l is uniform on (-a, a): a = sqrt(6 / d_in) after He for relu, gelu, silu and softplus,
        sqrt(6 / (d_in + d_out)) after Glorot for the others and for the last layer. Logical
        shapes are drawn, then padded. Uniform rather than normal because a uniform number comes
        from its random bits by exact operations and one product, so no compiler can round it
        another way.

        Args:
            key: from jax.random.key.
            mesh: the mesh.
            strategy: Strategy() by default.
            dtype: float32 by default.

        Returns:
            ((W_1, b_1), ...), placed for this mesh and strategy.
        """
        placement = place(self.widths, mesh, strategy)
        dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        return _drawing(self, placement, dtype)(key)

    def summary(
        self,
        mesh: Mesh,
        *,
        batch_size: int,
        strategy: Strategy | None = None,
        loss: Any = None,
        dtype: Any = None,
    ) -> Summary:
        """Return what one device holds of every array, and what it receives in a step.

        Args:
            mesh: the mesh.
            batch_size: samples of one step.
            strategy: Strategy() by default.
            loss: the loss, whose own collectives are listed when it is given.
            dtype: float32 by default.

        Returns:
            A Summary; print it.

        Examples:
            >>> from tpmlp.mesh import make_mesh
            >>> print(MLP((64, 256, 10)).summary(make_mesh(x=8), batch_size=128).arrays_table())
            tensor  role    layout     whole       on one device  size there
            W_1     column  O/g I/s    [256, 64]   [32, 64]         8.00 KiB
            b_1     column  O/g/s      [256]       [32]                128 B
            h_1     column  I/s/g B/d  [128, 64]   [128, 8]         4.00 KiB
            z_1     column  O/g/s B/d  [128, 256]  [128, 32]       16.00 KiB
            g_1     column  O/g/s B/d  [128, 256]  [128, 32]       16.00 KiB
            W_2     row     O/g I/s    [10, 256]   [16, 32]         2.00 KiB
            b_2     row     O/g/s      [10]        [2]                   8 B
            h_2     row     I/s/g B/d  [128, 256]  [128, 32]       16.00 KiB
            z_2     row     O/g/s B/d  [128, 10]   [128, 2]         1.00 KiB
            g_2     row     O/g/s B/d  [128, 10]   [128, 2]         1.00 KiB
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1: got batch_size={batch_size}.")
        head = None if loss is None else get_loss(loss)
        return summarize(
            place(self.widths, mesh, strategy),
            bias=self.bias,
            batch_size=batch_size,
            item_bytes=jnp.dtype(jnp.float32 if dtype is None else dtype).itemsize,
            num_reduced=0 if head is None else head.num_reduced,
            outputs_gathered=isinstance(head, UserLoss),
            with_loss=head is not None,
        )

    def plot(self, mesh: Mesh, *, strategy: Strategy | None = None) -> Any:
        """Return a matplotlib Figure of which device holds which block of every layer.

        Args:
            mesh: the mesh.
            strategy: Strategy() by default.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return draw_layers(place(self.widths, mesh, strategy))


def to_numpy(model: MLP, params: Params) -> Arrays:
    """Return parameters, or gradients, at logical widths.

    Args:
        model: the model.
        params: padded arrays in the structure of the parameters, on any mesh.

    Returns:
        A list of (W_l [d_l, d_{l-1}], b_l [d_l] or None).

    Raises:
        ValueError: parameters of another model, or arrays that no mesh has.
    """
    _check_padded(model, params)
    return [
        (np.asarray(W)[:d_out, :d_in], None if b is None else np.asarray(b)[:d_out])
        for (W, b), (d_out, d_in) in zip(params, _logical_shapes(model), strict=True)
    ]


def from_numpy(
    model: MLP, arrays: Sequence[Any], mesh: Mesh, *, strategy: Strategy | None = None
) -> Params:
    """Pad arrays of logical widths and place them.

    Args:
        model: the model.
        arrays: a list of (W_l [d_l, d_{l-1}], b_l [d_l] or None), as `to_numpy` gives.
        mesh: the mesh.
        strategy: Strategy() by default.

    Raises:
        ValueError: another number of layers, another shape, a dtype that is not floating.
    """
    check_structure(model, arrays)
    placement = place(model.widths, mesh, strategy)

    def put(name: str, array: Any, shape: tuple[int, ...], whole: Any, sharding: Any) -> Any:
        array = np.asarray(array)
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating point of shape {shape}: got shape {array.shape}, dtype "
                f"{array.dtype}. W_l is [d_l, d_l-1], b_l is [d_l]."
            )
        fill = [(0, n - m) for m, n in zip(shape, whole, strict=True)]
        return jax.device_put(np.pad(array, fill), sharding)

    layers = []
    for l, ((W, b), logical) in enumerate(zip(arrays, _logical_shapes(model), strict=True), 1):
        W_whole, b_whole = placement.layer_shapes(l)
        W = put(f"W_{l}", W, logical, W_whole, placement.sharding("O/g I/s", l))
        if b is not None:
            b = put(f"b_{l}", b, logical[:1], b_whole, placement.sharding("O/g/s", l))
        layers.append((W, b))
    return tuple(layers)


def reshard(model: MLP, params: Params, mesh: Mesh, *, strategy: Strategy | None = None) -> Params:
    """Move parameters, or gradients, to another mesh or layout.

    Blocks go from device to device; where the padding differs they pass through a width that
    both meshes divide, so that no device and no host ever holds the whole.

    Args:
        model: the model.
        params: placed on any mesh, for any layout.
        mesh: the mesh to go to.
        strategy: the strategy to go to; Strategy() by default.

    Raises:
        ValueError: parameters of another model, or arrays that no mesh has.
    """
    _check_padded(model, params)
    placement = place(model.widths, mesh, strategy)
    target = param_shardings(model, placement)
    moved = []
    for l, (layer, shardings) in enumerate(zip(params, target, strict=True), 1):
        logical = _logical_shapes(model)[l - 1]
        shapes = placement.layer_shapes(l)
        moved.append(
            tuple(
                None if array is None else _move(array, logical[: array.ndim], shape, sharding)
                for array, shape, sharding in zip(layer, shapes, shardings, strict=True)
            )
        )
    return tuple(moved)


def param_shardings(model: MLP, placement: Placement) -> Any:
    """Return the sharding of every parameter, in their structure."""
    return tuple(
        (
            placement.sharding("O/g I/s", l),
            placement.sharding("O/g/s", l) if model.bias else None,
        )
        for l in range(1, model.num_layers + 1)
    )


def logical_layers(model: MLP, params: Params) -> Params:
    """Return traced or placed parameters without their padding."""
    return tuple(
        (W[:d_out, :d_in], None if b is None else b[:d_out])
        for (W, b), (d_out, d_in) in zip(params, _logical_shapes(model), strict=True)
    )


def chain_of(model: MLP, mesh: Mesh, strategy: Strategy | None) -> Chain:
    """Return the kernel's description of a model on a mesh."""
    return Chain(place(model.widths, mesh, strategy), model.sigma)


def check_structure(model: MLP, params: Any) -> None:
    """Refuse what is not one (W, b) a layer, with biases where the model has them."""
    pairs = isinstance(params, tuple | list) and all(
        isinstance(layer, tuple | list) and len(layer) == 2 for layer in params
    )
    if not pairs or len(params) != model.num_layers:
        got = f"{len(params)} layers" if pairs else type(params).__name__
        raise ValueError(
            f"params must be one (W, b) for each of num_layers={model.num_layers}: got {got}. "
            "They belong to another model; make them with model.init or tpmlp.from_numpy."
        )
    for l, (_, b) in enumerate(params, 1):
        if (b is None) == model.bias:
            raise ValueError(
                f"params of layer {l} must have b {'an array' if model.bias else 'None'} for "
                f"bias={model.bias}: got b={'None' if b is None else 'an array'}. They belong to "
                "another model."
            )


def _check_padded(model: MLP, params: Any) -> None:
    """Refuse what is not a model's parameters, padded for the mesh that they are on."""
    check_structure(model, params)
    for l, (layer, logical) in enumerate(zip(params, _logical_shapes(model), strict=True), 1):
        for name, array in zip((f"W_{l}", f"b_{l}"), layer, strict=True):
            if array is None:
                continue
            if not isinstance(array, jax.Array) or not isinstance(array.sharding, NamedSharding):
                raise ValueError(
                    f"{name} must be a JAX array placed on a mesh: got {type(array).__name__}. "
                    "Place NumPy arrays with tpmlp.from_numpy."
                )
            sizes = array.sharding.mesh.shape
            num_blocks = sizes.get("x", 1) * sizes.get("y", 1)
            shape = tuple(padded(n, num_blocks) for n in logical[: array.ndim])
            if array.shape != shape:
                raise ValueError(
                    f"{name} must have the padded shape {shape} on its mesh: got {array.shape}, "
                    f"widths={model.widths}. These are the parameters of another model."
                )


def check_params(model: MLP, params: Any, placement: Placement) -> None:
    """Refuse parameters of another model, mesh or layout; of traced ones, only the shapes.

    Raises:
        ValueError: names the layer, what it is and what it must be.
    """
    check_structure(model, params)
    shardings = param_shardings(model, placement)
    for l, (layer, wanted) in enumerate(zip(params, shardings, strict=True), 1):
        for name, array, shape, sharding in zip(
            (f"W_{l}", f"b_{l}"), layer, placement.layer_shapes(l), wanted, strict=True
        ):
            if array is not None:
                _check_param(name, array, shape, sharding)


def _check_param(name: str, array: Any, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    way_out = (
        "Parameters for another mesh or layout are moved by tpmlp.reshard(model, params, mesh, "
        "strategy=...); NumPy arrays are placed by tpmlp.from_numpy."
    )
    if not isinstance(array, jax.Array):
        raise ValueError(f"{name} must be a JAX array: got {type(array).__name__}. {way_out}")
    if array.shape != shape:
        raise ValueError(
            f"{name} must have the padded shape {shape} on this mesh: got {array.shape}. {way_out}"
        )
    traced = isinstance(array, Tracer)
    if not traced and not array.sharding.is_equivalent_to(sharding, array.ndim):
        raise ValueError(
            f"{name} must be placed as {sharding.spec} on {dict(sharding.mesh.shape)}: got "
            f"{array.sharding}. {way_out}"
        )


@cache
def _drawing(model: MLP, placement: Placement, dtype: Any) -> Callable[[jax.Array], Params]:
    draw = partial(_draw, model, placement.padded_widths, dtype)
    return jax.jit(draw, out_shardings=param_shardings(model, placement))


def _draw(model: MLP, padded_widths: tuple[int, ...], dtype: Any, key: jax.Array) -> Params:
    layers = []
    for l, (d_out, d_in) in enumerate(_logical_shapes(model), 1):
        he = model.sigma.name in _HE and l < model.num_layers
        limit = (6 / d_in if he else 6 / (d_in + d_out)) ** 0.5
        # Multiples of 2^-23 (or 2^-52) in [0, 1); 2u - 1 is exact too.
        u = jax.random.uniform(jax.random.fold_in(key, l), (d_out, d_in), dtype)
        whole_in, whole_out = padded_widths[l - 1 : l + 1]
        W = jnp.pad((2 * u - 1) * limit, ((0, whole_out - d_out), (0, whole_in - d_in)))
        layers.append((W, jnp.zeros(whole_out, dtype) if model.bias else None))
    return tuple(layers)


def _move(
    array: jax.Array, logical: tuple[int, ...], shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
    if array.shape == shape:
        return jax.device_put(array, sharding)
    between = tuple(padded(n, np.lcm(_blocks(array.sharding), _blocks(sharding))) for n in logical)
    array = _resize(array, logical, between, array.sharding)
    return _resize(jax.device_put(array, sharding), logical, shape, sharding)


def _blocks(sharding: Any) -> int:
    return sharding.num_devices


@partial(jax.jit, static_argnums=(1, 2, 3))
def _resized(array: jax.Array, logical: Any, shape: Any, sharding: Any) -> jax.Array:
    cut = array[tuple(slice(n) for n in logical)]
    cut = jnp.pad(cut, [(0, n - m) for m, n in zip(logical, shape, strict=True)])
    return jax.lax.with_sharding_constraint(cut, sharding)


def _resize(array: jax.Array, logical: Any, shape: Any, sharding: Any) -> jax.Array:
    return _resized(array, tuple(logical), tuple(shape), sharding)


def _logical_shapes(model: MLP) -> list[tuple[int, int]]:
    return [(d_out, d_in) for d_in, d_out in zip(model.widths, model.widths[1:], strict=False)]


def _check_widths(widths: Any) -> tuple[int, ...]:
    try:
        checked = tuple(operator.index(width) for width in widths)
    except TypeError as error:
        raise ValueError(
            f"widths must be integers (d_0, ..., d_out): got widths={widths!r}. "
            "Use for example widths=(64, 256, 10)."
        ) from error
    if len(checked) < 2 or min(checked) < 1:
        raise ValueError(
            f"widths must be at least two positive integers, inputs first and outputs last: got "
            f"widths={widths!r}. Use for example widths=(64, 256, 10)."
        )
    return checked
