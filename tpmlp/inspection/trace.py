"""Trace: every layer's arrays of one forward and backward pass, still split over the devices."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tpmlp.activations import Activation
from tpmlp.batch import Batch, place_batch
from tpmlp.graph.graph import Graph
from tpmlp.inspection.depth import Block, DepthSummary, plot_depth, summarize_depth
from tpmlp.inspection.graph_trace import GraphTrace, trace_graph
from tpmlp.kernels.network import Network
from tpmlp.model import MLP, Params
from tpmlp.models import Model
from tpmlp.objective import Objective, make_objective
from tpmlp.parameters import check_params
from tpmlp.pipeline.staged import Staged, to_layers
from tpmlp.placement import check_no_stages
from tpmlp.randomness import check_dropout_key, random_words
from tpmlp.strategy import Strategy

Name = Literal["h", "z", "sigma_prime", "g"]
NAMES: tuple[Name, ...] = get_args(Name)


@jax.tree_util.register_pytree_node_class
class ByLayer(dict[int, jax.Array]):
    """The arrays of one name by layer, 1-based; one that is not there is refused by name.

    Attributes:
        name: what the arrays are.
    """

    def __init__(self, name: Name, arrays: Iterable[jax.Array]) -> None:
        super().__init__(enumerate(arrays, 1))
        self.name: Name = name

    def __missing__(self, l: object) -> jax.Array:
        there = f"in 1 .. {len(self)}" if self else "of a hidden layer, of which the model has none"
        meant = "sigma'(z_l) is of hidden layers alone; " if self.name == "sigma_prime" else ""
        raise ValueError(
            f"l must be {there}: got name={self.name!r}, l={l!r}. Layers count from 1: {meant}h[1] "
            "is x, the last z the outputs."
        )

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], Name]:
        """Return the arrays, first layer first, and the name."""
        return tuple(self.values()), self.name

    @classmethod
    def tree_unflatten(cls, name: Name, arrays: Iterable[jax.Array]) -> "ByLayer":
        """Return what `tree_flatten` took apart."""
        return cls(name, arrays)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """The arrays of one step, by layer, 1-based as in the mathematics.

    Arrays are padded, samples as rows: [B, d], the rows split over data and the features over
    both tensor axes, so that a device holds d/M of each; on a mesh with stages of every layer, not
    of its own stage's alone.

    Attributes:
        h: input of layer l, [B, d_{l-1}], l = 1 .. L+1; h[1] is x.
        z: W_l h_l + b_l, [B, d_l], l = 1 .. L+1.
        sigma_prime: sigma'(z_l), [B, d_l], l = 1 .. L.
        g: derivative of the data loss by z_l, [B, d_l], l = 1 .. L+1.
        grads: in the structure of the parameters, R included where it is elementwise.
        loss: the data loss, a scalar.
        activation: sigma and sigma'.
        widths: logical widths.
        num_samples: logical number of samples.
    """

    h: ByLayer
    z: ByLayer
    sigma_prime: ByLayer
    g: ByLayer
    grads: Params | Staged
    loss: jax.Array
    activation: Activation
    widths: tuple[int, ...]
    num_samples: int

    def __repr__(self) -> str:
        return f"<trace of {self.num_samples} samples, widths {self.widths}, loss {self.loss:.4g}>"

    def summary(self) -> DepthSummary:
        """Return each layer's norms, |g_l| / |g_{l+1}|, dead units and saturation.

        Computed on the devices, where the arrays are; prints as a table.

        Examples:
            >>> import jax, numpy as np, tpmlp
            >>> mesh = tpmlp.make_mesh(x=8)
            >>> mlp = tpmlp.MLP((2, 3, 1), activation="relu")
            >>> W = np.array([[1.0, 0], [0, 1], [-1, -1]], np.float32)
            >>> params = tpmlp.from_numpy(mlp, [(W, W[:, 0]), (W.T[:1], W[:1, 0])], mesh)
            >>> print(trace(mlp, params, np.eye(2), loss="output", mesh=mesh).summary())
            layer   |h|   |z|   |g|  |dW|  |g_l|/|g_l+1|    dead  saturated
                1  1.41  3.74  1.41  1.41              1  1 of 3      50.0%
                2  2.45  3.61  1.41  3.16              -       -          -
        """
        return summarize_depth(
            self._blocks("h"),
            self._blocks("z"),
            self._blocks("sigma_prime"),
            self._blocks("g"),
            _norms_of_weights(self.grads),
            self.activation.largest_slope,
        )

    def plot(self) -> Any:
        """Return a matplotlib Figure: how large z_l, sigma'(z_l) and g_l are, over depth.

        Raises:
            ModuleNotFoundError: matplotlib is missing.
        """
        quantities = {"z_l": self._blocks("z"), "g_l": self._blocks("g")}
        if self.sigma_prime:
            quantities = {**quantities, "\\sigma'(z_l)": self._blocks("sigma_prime")}
        return plot_depth({f"${label}$": blocks for label, blocks in quantities.items()})

    def logical(self, name: Name, l: int) -> np.ndarray:
        """Return an array without its padding, on the host.

        Args:
            name: "h", "z", "sigma_prime" or "g".
            l: the layer, 1-based.

        Returns:
            [B, d_{l-1}] for h, [B, d_l] for the others.

        Raises:
            ValueError: no such array.
        """
        if name not in NAMES:
            raise ValueError(
                f"name must be one of {NAMES}: got name={name!r}, l={l!r}. Gradients by the "
                "parameters are in trace.grads."
            )
        array: jax.Array = getattr(self, name)[l]
        width = self.widths[l - 1 if name == "h" else l]
        return np.asarray(array)[: self.num_samples, :width]

    def _blocks(self, name: Name) -> list[Block]:
        widths = self.widths[:-1] if name == "h" else self.widths[1:]
        arrays = getattr(self, name).values()
        return [Block(a, self.num_samples, width) for a, width in zip(arrays, widths, strict=False)]


class _Rows(NamedTuple):
    """What leaves the kernel, samples as rows; or the PartitionSpecs of it."""

    h: list[Any]
    z: list[Any]
    sigma_prime: list[Any]
    g: list[Any]
    grads: Any
    loss: Any


@overload
def trace(
    model: MLP,
    params: Any,
    x: Any,
    y: Any = None,
    *,
    loss: Any,
    mesh: Mesh,
    weight: Any = None,
    regularizer: Any = None,
    strategy: Strategy | None = None,
    key: Any = None,
) -> Trace: ...


@overload
def trace(
    model: Graph,
    params: Any,
    x: Any,
    y: Any = None,
    *,
    loss: Any,
    mesh: Mesh,
    weight: Any = None,
    regularizer: Any = None,
    strategy: Strategy | None = None,
    key: Any = None,
) -> GraphTrace: ...


def trace(
    model: Model,
    params: Any,
    x: Any,
    y: Any = None,
    *,
    loss: Any,
    mesh: Mesh,
    weight: Any = None,
    regularizer: Any = None,
    strategy: Strategy | None = None,
    key: Any = None,
) -> Trace | GraphTrace:
    """Run one forward and backward pass and return what every layer held.

    The program is the training step's own, with more outputs; microbatches run as one. Each array
    is the one that the step went on with: h_l and z_l the forward pass's, sigma'(z_l) the factor of
    g_l. What the backward pass computes once more is not shown: h_l where keep is not "gathered",
    z_l of the layers that keep="recompute" leaves out. A fault there is one of dW_l or sigma'(z_l).

    On a mesh with stages the pass runs one stage after another, with the step's layers and messages
    but without its schedule (tpmlp.pipeline.one_pass). z_l is as its stage computes it, h_l as its
    stage reads it, and g_l as it comes to its stage.

    Args:
        model: the MLP, or the Graph: r_v and g_v of every vertex.
        params: placed for this mesh and strategy.
        x: samples, as value_and_grad takes them.
        y: targets, as the loss says.
        loss: as in value_and_grad.
        mesh: the mesh.
        weight: sample weights [B]; 1 by default.
        regularizer: as in value_and_grad; changes grads alone.
        strategy: Strategy() by default.
        key: from jax.random.key, for a Graph with Dropout.

    Returns:
        A Trace, of a Graph a GraphTrace.

    Raises:
        ValueError: as for a step of value_and_grad.

    Examples:
        >>> import jax, numpy as np, tpmlp
        >>> mesh = tpmlp.make_mesh(x=8)
        >>> mlp = tpmlp.MLP((4, 6, 2))
        >>> params = mlp.init(jax.random.key(0), mesh)
        >>> t = trace(mlp, params, np.ones((3, 4)), loss="output", mesh=mesh)
        >>> t.g[1].shape, t.logical("g", 1).shape
        ((3, 8), (3, 6))
    """
    objective = make_objective(
        model, loss=loss, mesh=mesh, regularizer=regularizer, strategy=strategy
    )
    if isinstance(model, Graph):
        check_no_stages(objective.placement, "a trace of a Graph, which verify compares too")
    params = check_params(model, params, objective.placement)
    batch = place_batch(objective.placement, objective.loss, Batch(x, y, weight))
    keys = check_dropout_key(model, key)
    num_samples = np.shape(jax.tree.leaves(x)[0])[0]
    if isinstance(model, Graph):
        words = random_words(keys[0]) if keys else None
        return trace_graph(objective, params, batch, words, num_samples)
    rows = _traced(objective)(params, batch)
    return Trace(
        h=ByLayer("h", [batch.x, *rows.h]),
        z=ByLayer("z", rows.z),
        sigma_prime=ByLayer("sigma_prime", rows.sigma_prime),
        g=ByLayer("g", rows.g),
        grads=rows.grads,
        loss=rows.loss,
        activation=model.sigma,
        widths=model.widths,
        num_samples=num_samples,
    )


@jax.jit
def _norms_of_weights(grads: Params | Staged) -> list[jax.Array]:
    """Return |dW_l| by layer; padding is 0. Each stage takes the norms of its own."""
    if not isinstance(grads, Staged):
        return [jnp.linalg.norm(dW) for dW, _ in grads]
    first, *slots, last = [dW for dW, _ in grads.layers]
    by_stage = [jnp.linalg.norm(dW, axis=(1, 2)) for dW in slots]
    norms = [jnp.linalg.norm(first), *by_stage, jnp.linalg.norm(last)]
    by_layer = to_layers(Staged(tuple((norm, None) for norm in norms), grads.stages))
    return [norm for norm, _ in by_layer]


@lru_cache(maxsize=16)
def _traced(objective: Objective) -> Any:
    def body(network: Network, params: Any, *samples: Any) -> _Rows:
        result = objective.run(network, params, *samples)
        seen = result.arrays
        return _Rows(
            h=[h.T for h in seen.h[1:]],
            z=[z.T for z in seen.z],
            sigma_prime=[slope.T for slope in seen.sigma_prime],
            g=[g.T for g in seen.g],
            grads=result.grads,
            loss=result.value.loss,
        )

    spec, layers = objective.placement.spec, range(1, objective.model.num_layers + 1)
    h, z = ([spec(layout, l) for l in layers] for layout in ("B/d I/s/g", "B/d O/g/s"))
    specs = _Rows(h[1:], z, z[:-1], z, objective.param_specs, PartitionSpec())
    return jax.jit(objective.map(body, specs))
