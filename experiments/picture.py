"""Which device holds which part of one layer: the picture in the README.

Question: what does one device hold of W, h and z, and what must it gather and scatter?
Method: one layer on x=4, y=2, drawn from the placement that the kernel itself uses.
Command: make picture
Prediction: every device holds 1/8 of each array; the four devices of a column of W hold
    together the part of h it multiplies, the two of a row the part of z it adds to.
Finding: docs/layer.svg.
"""

from pathlib import Path

import matplotlib as mpl

import tpmlp


def main() -> None:
    """Draw the layer and write docs/layer.svg."""
    tpmlp.simulate_devices(8)
    mlp = tpmlp.MLP((64, 64))
    figure = mlp.plot(tpmlp.make_mesh(x=4, y=2))
    # A fixed salt and no date: the same picture is the same file.
    with mpl.rc_context({"svg.hashsalt": "tpmlp"}):
        figure.savefig(Path("docs") / "layer.svg", metadata={"Date": None})
    Path("results").mkdir(exist_ok=True)
    figure.savefig(Path("results") / "layer.png", dpi=150)


if __name__ == "__main__":
    main()
