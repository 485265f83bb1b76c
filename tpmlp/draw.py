"""Pictures of a placement: which device holds which part of every layer.

Each layer is drawn as z = W h: h above W, along its columns; z beside it, along its rows. A block's
colour and label are those of the device that holds it, so that one sees the gather (the blocks of h
over one column of W belong to several devices) and the scatter (those of z beside one row). g of a
layer is where its z is. With stages a row of panels is a stage, and a label has the stage first;
the first and the last W belong to one stage, but every stage holds a part.
"""

from dataclasses import dataclass
from typing import Any

from tpmlp.extras import require
from tpmlp.pipeline.placement import PipelinePlacement
from tpmlp.placement import Placement

STRIP = 0.13  # thickness of h and z, in units of the side of W
GAP = 0.05
WIDTH, HEIGHT = 3.6, 4.2  # of a panel, in inches


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """A layer to be drawn.

    Attributes:
        number: l.
        shape: logical (d_l, d_{l-1}).
        word: its role.
        axes: mesh axes of the roles g and s.
        sizes: devices on each mesh axis.
        stage: the stage that has it; None on a mesh without stages.
        holders: the stages that hold W: its own, or all, each a part.
        more: what is said of it besides.
    """

    number: int
    shape: tuple[int, int]
    word: str
    axes: dict[str, str]
    sizes: dict[str, int]
    stage: int | None = None
    holders: tuple[int | None, ...] = (None,)
    more: str = ""


def draw_layers(placement: Placement) -> Any:
    """Return a matplotlib Figure with one panel a layer.

    Args:
        placement: the layers on their mesh; data is not drawn.
    """
    layers = [
        _Layer(
            number=l,
            shape=(placement.widths[l], placement.widths[l - 1]),
            word=word,
            axes=placement.axes[l - 1],
            sizes=placement.sizes,
        )
        for l, word in enumerate(placement.words, 1)
    ]
    picture = _figure(figsize=(WIDTH * len(layers) + 0.4, HEIGHT))
    _draw_row(picture, layers, len(layers))
    x, y = (placement.sizes[axis] for axis in ("x", "y"))
    picture.suptitle(f"Which device (x, y) holds which block, x={x}, y={y}", fontsize=11)
    return picture


def draw_stages(placement: PipelinePlacement) -> Any:
    """Return a matplotlib Figure with one row of panels a stage, one panel a layer.

    Args:
        placement: the layers on their mesh; data is not drawn.
    """
    stages, num_stages = placement.stages, placement.sizes["stage"]
    rows: list[list[_Layer]] = [[] for _ in range(num_stages)]
    for l in range(1, stages.num_layers + 1):
        stage, is_end = stages.stage_of(l), l in (1, stages.num_layers)
        rows[stage].append(
            _Layer(
                number=l,
                shape=(placement.widths[l], placement.widths[l - 1]),
                word=placement.words[l - 1],
                axes=placement.chain.axes[stages.in_chain(l) - 1],
                sizes=placement.sizes,
                stage=stage,
                holders=tuple(range(num_stages)) if is_end else (stage,),
                more=f", chunk {stages.chunk_of(l)}" if stages.route.num_chunks > 1 else "",
            )
        )
    most = max(map(len, rows))
    picture = _figure(figsize=(WIDTH * most + 0.4, (HEIGHT + 0.3) * num_stages))
    parts = picture.subfigures(num_stages, 1, squeeze=False)[:, 0]
    for stage, (part, layers) in enumerate(zip(parts, rows, strict=True)):
        _draw_row(part, layers, most)
        part.suptitle(f"stage {stage}", fontsize=10)
    sizes = ", ".join(f"{axis}={placement.sizes[axis]}" for axis in ("stage", "x", "y"))
    picture.suptitle(f"Which device (stage, x, y) holds which block, {sizes}", fontsize=11)
    return picture


def _figure(figsize: tuple[float, float]) -> Any:
    make = require("matplotlib.figure", extra="plot", user="MLP.plot").Figure
    return make(figsize=figsize, layout="constrained")


def _draw_row(figure: Any, layers: list[_Layer], num_panels: int) -> None:
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for panel in panels:
        panel.axis("off")
    for panel, layer in zip(panels, layers, strict=False):
        _draw_layer(panel, layer)


def _draw_layer(panel: Any, layer: _Layer) -> None:
    axes, sizes, num_parts = layer.axes, layer.sizes, len(layer.holders)
    num_g, num_s = sizes[axes["g"]], sizes[axes["s"]]
    num_blocks = num_g * num_s
    for g in range(num_g):
        for s in range(num_s):
            device = {axes["g"]: g, axes["s"]: s}
            for part, holder in enumerate(layer.holders):
                corner = (s / num_s, 1 - (g * num_parts + part + 1) / (num_g * num_parts))
                held = _look({**device, "stage": holder}, sizes)
                _block(panel, corner, 1 / num_s, 1 / (num_g * num_parts), *held)
            own = _look({**device, "stage": layer.stage}, sizes)
            h = (s * num_g + g) / num_blocks
            _block(panel, (h, 1 + GAP), 1 / num_blocks, STRIP, *own)
            z = 1 - (g * num_s + s + 1) / num_blocks
            _block(panel, (1 + GAP, z), STRIP, 1 / num_blocks, *own)
    l, (d_out, d_in) = layer.number, layer.shape
    panel.text(0.5, 1 + 1.4 * GAP + STRIP, f"$h_{{{l}}}$ [{d_in}]  I/s/g", ha="center")
    panel.text(
        1 + 1.4 * GAP + STRIP, 0.5, f"$z_{{{l}}}$ [{d_out}]  O/g/s", va="center", rotation=-90
    )
    name = f"$W_{{{l}}}$ [{d_out}, {d_in}]  {'O/g I/s' if num_parts == 1 else 'O/g/p I/s'}"
    role = f"{layer.word}: g={axes['g']}, s={axes['s']}{layer.more}"
    panel.text(0.5, -GAP, f"{name}\n{role}", ha="center", va="top")
    panel.set_xlim(-GAP, 1 + 5 * GAP + STRIP)
    panel.set_ylim(-4 * GAP, 1 + 4 * GAP + STRIP)
    panel.set_aspect("equal")


def _look(device: dict[str, Any], sizes: dict[str, int]) -> tuple[Any, str]:
    """Return the colour and the label of a device."""
    stage, x, y = (device[axis] for axis in ("stage", "x", "y"))
    number, label = x * sizes["y"] + y, f"{x},{y}"
    num_devices = sizes["x"] * sizes["y"]
    if stage is None:
        return _color(number, num_devices), label
    number += stage * num_devices
    return _color(number, sizes["stage"] * num_devices), f"{stage},{label}"


def _block(
    panel: Any, corner: tuple[float, float], width: float, height: float, color: Any, label: str
) -> None:
    patches = require("matplotlib.patches", extra="plot", user="MLP.plot")
    panel.add_patch(patches.Rectangle(corner, width, height, facecolor=color, edgecolor="white"))
    x, y = corner[0] + width / 2, corner[1] + height / 2
    narrow = min(width, height)
    if narrow > 0.05:
        panel.text(x, y, label, ha="center", va="center", fontsize=7 if narrow < 0.2 else 10)


def _color(device: int, num_devices: int) -> Any:
    colors = require("matplotlib", extra="plot", user="MLP.plot").colormaps["turbo"]
    r, g, b, _ = colors((device + 0.5) / num_devices)
    # Halfway to white, so that black labels can be read on every colour.
    return tuple(0.5 + 0.5 * channel for channel in (r, g, b))
