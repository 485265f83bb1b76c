"""The model: a multilayer perceptron, and its parameters as plain pytrees.

    h_1 = x,   z_l = W_l h_l + b_l,   h_{l+1} = sigma(z_l),   h(W, x) = z_{L+1}

Parameters are a tuple of layers (W_l, b_l), l at index l - 1: JAX arrays split over the mesh and
padded with zeros to widths that the mesh divides (tpmlp.parameters).
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tpmlp.activations import Activation, get_activation
from tpmlp.checks import check_count, check_dtype, check_key
from tpmlp.draw import draw_layers, draw_stages
from tpmlp.kernels.backprop import Chain
from tpmlp.layout import padded
from tpmlp.losses import get_loss
from tpmlp.pipeline.network import Pipeline
from tpmlp.pipeline.placement import PipelinePlacement, place_stages
from tpmlp.pipeline.staged import Staged, staged_specs, to_layers, to_stages
from tpmlp.pipeline.summary import summarize_pipeline
from tpmlp.placement import (
    ParameterSpec,
    check_strategy,
    place_chain,
)
from tpmlp.regularizers import ElementwisePenalty, get_regularizer
from tpmlp.strategy import Strategy
from tpmlp.summary import summarize

Params = tuple[tuple[jax.Array, jax.Array | None], ...]
Arrays = list[tuple[np.ndarray, np.ndarray | None]]

# Activations that vanish on half of the line lose half of the variance: He's factor 6 makes up
# for it, Glorot's is for the others.
# References: He et al. 2015, Delving Deep into Rectifiers, eq. 10; Glorot and Bengio 2010,
# Understanding the difficulty of training deep feedforward neural networks, eq. 16.
HE = frozenset({"relu", "gelu", "silu", "softplus"})


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
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias must be True or False: got bias={self.bias!r}.")
        object.__setattr__(self, "sigma", get_activation(self.activation))

    @property
    def num_layers(self) -> int:
        """The number of W_l."""
        return len(self.widths) - 1

    @property
    def num_parameters(self) -> int:
        """The number of weights and biases, padding not counted."""
        return sum(d_out * d_in + d_out * self.bias for d_out, d_in in self.layer_shapes)

    @property
    def layer_shapes(self) -> tuple[tuple[int, int], ...]:
        """Logical shape (d_l, d_{l-1}) of each W_l."""
        return tuple((d_out, d_in) for d_in, d_out in pairwise(self.widths))

    @property
    def largest_sample(self) -> int:
        """The most numbers that one sample has in any layer."""
        return max(self.widths)

    @property
    def parameters(self) -> tuple[tuple[ParameterSpec, ParameterSpec | None], ...]:
        """What each (W_l, b_l) is, in the structure of the parameters."""
        return tuple(
            (
                ParameterSpec(f"W_{l}", shape, (True, True)),
                ParameterSpec(f"b_{l}", shape[:1], (True,)) if self.bias else None,
            )
            for l, shape in enumerate(self.layer_shapes, 1)
        )

    def place(self, mesh: Mesh, strategy: Strategy | None = None) -> Any:
        """Return where the layers live on a mesh under a strategy."""
        strategy = check_strategy(strategy, mesh)
        if mesh.shape["stage"] > 1:
            return place_stages(self.widths, self.bias, mesh, strategy)
        return place_chain(self.widths, mesh, strategy)

    def network(self, placement: Any) -> Any:
        """Return what the kernel runs."""
        of_stages = isinstance(placement, PipelinePlacement)
        return Pipeline(placement, self.sigma) if of_stages else Chain(placement, self.sigma)

    def shardings(self, placement: Any) -> Any:
        """Return the sharding of every parameter, in their structure."""
        if isinstance(placement, PipelinePlacement):
            return placement.shardings
        W, b = placement.param_layouts
        return tuple(
            (placement.sharding(W, l), placement.sharding(b, l) if self.bias else None)
            for l in range(1, self.num_layers + 1)
        )

    def specs(self, of: Any) -> Any:
        """Return what each array is, in the structure that parameters have on their mesh.

        Args:
            of: parameters, or where they are.
        """
        if isinstance(of, Staged | PipelinePlacement):
            return staged_specs(self.parameters, of.stages)
        return self.parameters

    def staged(self, arrays: Any, placement: Any) -> Any:
        """Return one (W, b) a layer in the structure that parameters have on their mesh."""
        is_staged = isinstance(placement, PipelinePlacement)
        return to_stages(arrays, placement.stages) if is_staged else arrays

    def unstaged(self, params: Any) -> Any:
        """Return parameters in any such structure as one (W, b) a layer."""
        return tuple(to_layers(params)) if isinstance(params, Staged) else params

    def structured(self, params: Any) -> Any:
        """Return parameters as tuples, or refuse what is not one (W, b) a layer.

        Raises:
            ValueError: another number of layers; biases where there are none, or none where there
                are.
        """
        if isinstance(params, Staged):
            return self._check_staged(params)
        pairs = isinstance(params, tuple | list) and all(
            isinstance(layer, tuple | list) and len(layer) == 2 for layer in params
        )
        if not pairs or len(params) != self.num_layers:
            got = f"{len(params)} layers" if pairs else type(params).__name__
            raise ValueError(
                f"params must be one (W, b) for each of num_layers={self.num_layers}: got {got}. "
                "They belong to another model; make them with model.init or tpmlp.from_numpy."
            )
        for l, (_, b) in enumerate(params, 1):
            if (b is None) == self.bias:
                raise ValueError(
                    f"params of layer {l} must have b {'an array' if self.bias else 'None'} for "
                    f"bias={self.bias}: got b={'None' if b is None else 'an array'}. They belong "
                    "to another model."
                )
        return tuple(map(tuple, params))

    def _check_staged(self, params: Staged) -> Staged:
        """Return parameters of a pipeline, or refuse those of another model."""
        stages = params.stages
        got = stages.num_layers, params.first[1] is not None
        if got != (self.num_layers, self.bias):
            raise ValueError(
                f"params must be of num_layers={self.num_layers}, bias={self.bias}: got "
                f"num_layers={got[0]}, bias={got[1]}, on {stages.route.num_stages} stages. They "
                "belong to another model."
            )
        return params

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

        Raises:
            ValueError: key is no key, or the mesh cannot have the layout.
        """
        check_key(key)
        placement = self.place(mesh, strategy)
        dtype = jnp.dtype(check_dtype("dtype", jnp.float32 if dtype is None else dtype))
        return _drawing(self, placement, dtype)(key)

    def summary(
        self,
        mesh: Mesh,
        *,
        batch_size: int,
        strategy: Strategy | None = None,
        loss: Any = None,
        regularizer: Any = None,
        dtype: Any = None,
    ) -> Any:
        """Return what one device holds of every array, and what it receives in a step.

        Args:
            mesh: the mesh.
            batch_size: samples of one step.
            strategy: Strategy() by default.
            loss: the loss, whose own collectives are listed when it is given.
            regularizer: R, whose own collective is listed when it is given.
            dtype: float32 by default.

        Returns:
            A Summary, on a mesh with stages a PipelineSummary; print it.

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
        placement = self.place(mesh, strategy)
        batch_size = check_count("batch_size", batch_size, "Give the samples of one step.")
        dtype = check_dtype("dtype", jnp.float32 if dtype is None else dtype)
        if isinstance(placement, PipelinePlacement):
            specs = self.specs(placement)
            meant = None if loss is None else get_loss(loss)
            return summarize_pipeline(
                placement, specs, batch_size=batch_size, dtype=dtype, loss=meant
            )
        return summarize(
            placement,
            bias=self.bias,
            batch_size=batch_size,
            dtype=dtype,
            loss=None if loss is None else get_loss(loss),
            penalty=isinstance(get_regularizer(regularizer), ElementwisePenalty),
        )

    def plot(self, mesh: Mesh, *, strategy: Strategy | None = None) -> Any:
        """Return a matplotlib Figure of which device holds which block of every layer.

        On a mesh with stages a row of panels is a stage.

        Args:
            mesh: the mesh.
            strategy: Strategy() by default.

        Raises:
            ValueError: the mesh cannot have the layout.
            ModuleNotFoundError: matplotlib is not installed.
        """
        placement = self.place(mesh, strategy)
        of_stages = isinstance(placement, PipelinePlacement)
        return draw_stages(placement) if of_stages else draw_layers(placement)


@lru_cache(maxsize=16)
def _drawing(model: MLP, placement: Any, dtype: Any) -> Callable[[jax.Array], Any]:
    widths = tuple(padded(width, placement.num_blocks) for width in model.widths)

    def draw(key: jax.Array) -> Any:
        return model.staged(_draw(model, widths, dtype, key), placement)

    return jax.jit(draw, out_shardings=model.shardings(placement))


def _draw(model: MLP, padded_widths: tuple[int, ...], dtype: Any, key: jax.Array) -> Params:
    layers = []
    for l, (d_out, d_in) in enumerate(model.layer_shapes, 1):
        he = model.sigma.name in HE and l < model.num_layers
        limit = (6 / d_in if he else 6 / (d_in + d_out)) ** 0.5
        # Multiples of 2^-23 (or 2^-52) in [0, 1); 2u - 1 is exact too.
        u = jax.random.uniform(jax.random.fold_in(key, l), (d_out, d_in), dtype)
        whole_in, whole_out = padded_widths[l - 1 : l + 1]
        W = jnp.pad((2 * u - 1) * limit, ((0, whole_out - d_out), (0, whole_in - d_in)))
        layers.append((W, jnp.zeros(whole_out, dtype) if model.bias else None))
    return tuple(layers)


def _check_widths(widths: Any) -> tuple[int, ...]:
    try:
        checked = tuple(operator.index(width) for width in widths)
        if any(isinstance(width, bool) for width in widths):
            raise TypeError("True is no width")
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
