"""What a trace says of every layer: its norms, its dead units, how much of it is saturated.

Everything is summed where it lies: arrays stay split over the devices, padding is left out, and
only scalars leave the program.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpmlp.extras import require
from tpmlp.table import text_table

# A slope of this share of the activation's largest, or less, passes almost nothing back.
SATURATED = 0.01

# A picture reaches two powers of ten below the layer with the smallest entries, but no more than
# float32 does; bins are a quarter of one.
DECADES_BELOW, MOST_DECADES, BINS_PER_DECADE = 2, 40, 4
MOST_TICKS = 6
MOST_NAMES = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """Numbers of one layer; norms are Frobenius norms over samples and features.

    Attributes:
        layer: l, 1-based.
        h_norm: |h_l|, of its input.
        z_norm: |z_l|.
        g_norm: |g_l|.
        dW_norm: |dW_l|, R included where it is elementwise.
        g_ratio: |g_l| / |g_{l+1}|; None in the last layer. Far below 1 in every layer: gradients
            vanish; far above: they explode.
        dead_units: units whose sigma'(z_l) is 0 for every sample, which learn nothing from this
            batch; None in the last layer, which has no sigma.
        saturated: the share of entries with |sigma'(z_l)| at most SATURATED of the largest that
            sigma' has anywhere (of an activation of yours: in any layer); None in the last layer.
        num_units: d_l.
    """

    layer: int
    h_norm: float
    z_norm: float
    g_norm: float
    dW_norm: float
    g_ratio: float | None
    dead_units: int | None
    saturated: float | None
    num_units: int


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class DepthSummary:
    """Statistics of all layers; prints as a table.

    Attributes:
        layers: of layer 1 .. L+1.
    """

    layers: tuple[LayerStatistics, ...]

    def __str__(self) -> str:
        headers = ["layer", "|h|", "|z|", "|g|", "|dW|", "|g_l|/|g_l+1|", "dead", "saturated"]
        return text_table(headers, map(_cells, self.layers))

    __repr__ = __str__


@partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["num_samples", "width"]
)
@dataclass(frozen=True, slots=True)
class Block:
    """An array of a trace, padded, and the part of it that is none.

    Attributes:
        array: [B, d] or [B, T, d], split over the devices.
        num_samples: logical B.
        width: logical d.
    """

    array: jax.Array
    num_samples: int
    width: int

    def filled(self, padding: Any) -> jax.Array:
        """Return the array with another value where it is padded; bfloat16 as float32."""
        return self.where_inside(self.array, padding)

    def where_inside(self, array: jax.Array, padding: Any) -> jax.Array:
        """Return an array of this shape with another value where this one is padded."""
        samples = jax.lax.broadcasted_iota(jnp.int32, array.shape, 0)
        features = jax.lax.broadcasted_iota(jnp.int32, array.shape, array.ndim - 1)
        array = array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array
        inside = (samples < self.num_samples) & (features < self.width)
        return jnp.where(inside, array, jnp.asarray(padding, array.dtype))

    @property
    def size(self) -> int:
        """Logical number of entries."""
        return self.num_samples * math.prod(self.array.shape[1:-1]) * self.width


def summarize_depth(
    h: Sequence[Block],
    z: Sequence[Block],
    slope: Sequence[Block],
    g: Sequence[Block],
    dW_norms: Sequence[Any],
    largest_slope: float | None,
) -> DepthSummary:
    """Return the statistics of a trace.

    Args:
        h: inputs of the layers.
        z: z_1 .. z_{L+1}.
        slope: sigma'(z_1) .. sigma'(z_L).
        g: g_1 .. g_{L+1}.
        dW_norms: |dW_1| .. |dW_{L+1}|.
        largest_slope: of the activation; None for the largest that is in `slope`.
    """
    if largest_slope is None:
        largest_slope = max((float(_largest(block)) for block in slope), default=0.0)
    seen = {"h": list(h), "z": list(z), "g": list(g)}
    norms, of_weights, slopes = jax.device_get(
        (norms_of(seen), list(dW_norms), _slopes(list(slope), largest_slope))
    )
    g_norms = [float(norm) for norm in norms["g"]]
    return DepthSummary(
        layers=tuple(
            LayerStatistics(
                layer=l,
                h_norm=float(norms["h"][l - 1]),
                z_norm=float(norms["z"][l - 1]),
                g_norm=g_norms[l - 1],
                dW_norm=float(of_weights[l - 1]),
                g_ratio=_ratio(*g_norms[l - 1 : l + 1]) if l < len(z) else None,
                dead_units=int(slopes[l - 1][0]) if l < len(z) else None,
                saturated=float(slopes[l - 1][1]) if l < len(z) else None,
                num_units=z[l - 1].width,
            )
            for l in range(1, len(z) + 1)
        )
    )


def plot_depth(
    quantities: dict[str, Sequence[Block]], *, columns: Sequence[str] | None = None
) -> Any:
    """Return a matplotlib Figure: for each quantity, how large its entries are in each layer.

    A column is one layer, a row one size, the colour the share of the layer's entries that are
    that large. The lowest row has everything smaller, zeros included, and its tick says so.

    Args:
        quantities: what to draw, by label; the blocks of layer 1, 2, ...
        columns: what the columns are called, where they are not layers.
    """
    make = require("matplotlib.figure", extra="plot", user="Trace.plot").Figure
    depth = max(map(len, quantities.values()))
    size = (3 + 0.12 * min(depth, 60), 2.6 * len(quantities) + (0.8 if columns else 0))
    figure = make(figsize=size, layout="constrained")
    panels = figure.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
    drawn = None
    for panel, (label, blocks) in zip(panels, quantities.items(), strict=True):
        edges, shares = size_shares(blocks)
        layers = np.arange(len(blocks) + 1) + 0.5
        drawn = panel.pcolormesh(layers, edges, shares.T, vmin=0, cmap="magma")
        figure.colorbar(drawn, ax=panel, label="share of entries")
        panel.set_ylabel(f"$\\log_{{10}}$ |{label}|")
        panel.set_yticks(*_size_ticks(edges))
    if columns is None:
        panels[-1].set_xlabel("layer $l$")
        panels[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    else:
        named = range(0, depth, math.ceil(depth / MOST_NAMES))
        panels[-1].set_xticks([i + 1 for i in named], [columns[i] for i in named], rotation=90)
        panels[-1].tick_params("x", labelsize=6)
    panels[0].set_title("How large entries are, over depth")
    return figure


def _size_ticks(edges: np.ndarray) -> tuple[list[float], list[str]]:
    r"""Return ticks at whole powers of ten, few, and one in the lowest row: its upper edge or less.

    Examples:
        >>> _size_ticks(np.linspace(-3, 0, 13))
        ([-2.875, 0.0, -1.0, -2.0], ['$\\leq -2.75$', '$0$', '$-1$', '$-2$'])
    """
    bottom, top = edges[0], edges[-1]
    step = math.ceil((top - bottom) / MOST_TICKS)
    powers = [float(power) for power in np.arange(top, bottom + step / 2, -step)]
    labels = [f"$\\leq {edges[1]:g}$", *(f"${power:g}$" for power in powers)]
    return [float(edges[:2].mean()), *powers], labels


def size_shares(blocks: Sequence[Block]) -> tuple[np.ndarray, np.ndarray]:
    """Return bins of log10 |a| and the share of each block's entries in each bin.

    Returns:
        edges [K + 1], and shares [len(blocks), K], rows of which add up to 1 (to less where
        entries are NaN or infinite); everything smaller than the lowest edge is in the first bin.
    """
    largest = [float(_largest(block)) for block in blocks]
    decades = [math.log10(a) for a in largest if 0 < a < math.inf] or [0.0]
    top = math.ceil(max(decades))
    bottom = max(math.floor(min(decades)) - DECADES_BELOW, top - MOST_DECADES)
    edges = np.linspace(bottom, top, (top - bottom) * BINS_PER_DECADE + 1)
    upper = jnp.asarray(edges[1:], jnp.float32)
    below = np.stack([np.asarray(_below(block, upper)) for block in blocks])
    return edges, np.diff(below, axis=1, prepend=0)


@jax.jit
def norms_of(blocks: Any) -> Any:
    """Return the Frobenius norm of every Block of a tree, all by one program.

    Programs that sum over devices must not be many at a time: on CPUs they wait for one another.
    """
    return jax.tree.map(_norm, blocks, is_leaf=lambda leaf: isinstance(leaf, Block))


def _norm(block: Block) -> jax.Array:
    a = block.filled(0)
    # Scaled, or squares below 1e-38 would be lost: that is what one looks for.
    scale = jnp.max(jnp.abs(a))
    safe = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    return safe * jnp.sqrt(jnp.sum(jnp.square(a / safe)))


@jax.jit
def _slopes(slopes: list[Block], largest: float) -> list[tuple[jax.Array, jax.Array]]:
    """Return of each layer how many units are dead, and the share of entries that are saturated."""

    def of(block: Block) -> tuple[jax.Array, jax.Array]:
        a = jnp.abs(block.filled(0))
        padding = a.shape[-1] - block.width
        dead = jnp.sum(jnp.max(a, axis=0) == 0) - padding
        small = block.where_inside(a <= SATURATED * largest, False)
        return dead, jnp.sum(small, dtype=jnp.int32) / block.size

    return [of(block) for block in slopes]


@jax.jit
def _largest(block: Block) -> jax.Array:
    return jnp.max(jnp.abs(block.filled(0)))


@jax.jit
def _below(block: Block, edges: jax.Array) -> jax.Array:
    """Return the share of entries with log10 |a| at most each edge."""
    size = jnp.log10(jnp.abs(block.filled(jnp.inf))).astype(edges.dtype)
    counts = jax.lax.map(lambda edge: jnp.sum(size <= edge, dtype=jnp.int32), edges)
    return counts / block.size


def _ratio(this: float, following: float) -> float:
    return this / following if following else math.nan


def _cells(layer: LayerStatistics) -> list[str]:
    norms = (layer.h_norm, layer.z_norm, layer.g_norm, layer.dW_norm)
    last = layer.g_ratio is None or layer.dead_units is None or layer.saturated is None
    return [
        str(layer.layer),
        *(f"{norm:.3g}" for norm in norms),
        *(
            ["-", "-", "-"]
            if last
            else [
                f"{layer.g_ratio:.3g}",
                f"{layer.dead_units} of {layer.num_units}",
                f"{layer.saturated:.1%}",
            ]
        ),
    ]
