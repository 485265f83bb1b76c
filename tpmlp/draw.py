"""Pictures of a placement: which device holds which part of every layer.

Each layer is drawn as z = W h: h above W, along its columns; z beside it, along its rows. A block's
colour and label are those of the device that holds it, so that one sees the gather (the blocks of h
over one column of W belong to several devices) and the scatter (those of z beside one row).
"""

from typing import Any

from tpmlp.extras import require
from tpmlp.placement import Placement

STRIP = 0.13  # thickness of h and z, in units of the side of W
GAP = 0.05


def draw_layers(placement: Placement) -> Any:
    """Return a matplotlib Figure with one panel a layer.

    Args:
        placement: the layers on their mesh; data and stage are not drawn.
    """
    figure = require("matplotlib.figure", extra="plot", user="MLP.plot").Figure
    num_layers = len(placement.words)
    picture = figure(figsize=(3.6 * num_layers + 0.4, 4.2), layout="constrained")
    panels = picture.subplots(1, num_layers, squeeze=False)[0]
    for l, panel in enumerate(panels, 1):
        _draw_layer(panel, placement, l)
    sizes = placement.sizes
    picture.suptitle(
        f"Which device (x, y) holds which block, x={sizes['x']}, y={sizes['y']}", fontsize=11
    )
    return picture


def _draw_layer(panel: Any, placement: Placement, l: int) -> None:
    axes, sizes = placement.axes[l - 1], placement.sizes
    num_g, num_s = sizes[axes["g"]], sizes[axes["s"]]
    num_blocks = num_g * num_s
    for g in range(num_g):
        for s in range(num_s):
            device = {axes["g"]: g, axes["s"]: s}
            label = f"{device['x']},{device['y']}"
            color = _color(device["x"] * sizes["y"] + device["y"], num_blocks)
            top = 1 - (g + 1) / num_g
            _block(panel, (s / num_s, top), 1 / num_s, 1 / num_g, color, label)
            h = (s * num_g + g) / num_blocks
            _block(panel, (h, 1 + GAP), 1 / num_blocks, STRIP, color, label)
            z = 1 - (g * num_s + s + 1) / num_blocks
            _block(panel, (1 + GAP, z), STRIP, 1 / num_blocks, color, label)
    d_in, d_out = placement.widths[l - 1 : l + 1]
    panel.text(0.5, 1 + 1.4 * GAP + STRIP, f"$h_{{{l}}}$ [{d_in}]  I/s/g", ha="center")
    panel.text(
        1 + 1.4 * GAP + STRIP, 0.5, f"$z_{{{l}}}$ [{d_out}]  O/g/s", va="center", rotation=-90
    )
    role = f"{placement.words[l - 1]}: g={axes['g']}, s={axes['s']}"
    name = f"$W_{{{l}}}$ [{d_out}, {d_in}]  O/g I/s"
    panel.text(0.5, -GAP, f"{name}\n{role}", ha="center", va="top")
    panel.set_xlim(-GAP, 1 + 5 * GAP + STRIP)
    panel.set_ylim(-4 * GAP, 1 + 4 * GAP + STRIP)
    panel.set_aspect("equal")
    panel.axis("off")


def _block(
    panel: Any, corner: tuple[float, float], width: float, height: float, color: Any, label: str
) -> None:
    patches = require("matplotlib.patches", extra="plot", user="MLP.plot")
    panel.add_patch(patches.Rectangle(corner, width, height, facecolor=color, edgecolor="white"))
    x, y = corner[0] + width / 2, corner[1] + height / 2
    narrow = min(width, height)
    if narrow > 0.05:
        panel.text(x, y, label, ha="center", va="center", fontsize=7 if narrow < 0.2 else 10)


def _color(device: int, num_blocks: int) -> Any:
    colors = require("matplotlib", extra="plot", user="MLP.plot").colormaps["turbo"]
    r, g, b, _ = colors((device + 0.5) / num_blocks)
    # Halfway to white, so that black labels can be read on every colour.
    return tuple(0.5 + 0.5 * channel for channel in (r, g, b))
