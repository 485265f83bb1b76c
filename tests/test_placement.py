"""Placement: which roles a layout gives each layer, and what "auto" chooses.

A failure in the roles: every kernel binds wrong axes, though each alone is right. A failure in the
choice: results stay right and more words move than need be.
"""

from itertools import pairwise, product

import pytest

import tpmlp
from conftest import MESHES
from tests.cases import mesh_of, name_of
from tpmlp.kernels.cost import layer_words
from tpmlp.placement import place

X, Y = {"g": "x", "s": "y", "d": "data"}, {"g": "y", "s": "x", "d": "data"}


@pytest.mark.parametrize(
    ("sizes", "layout", "roles"),
    [
        ((1, 4, 1), "column", (X, X, X)),
        ((1, 4, 1), "row", (Y, Y, Y)),
        ((1, 4, 1), "alternate", (X, Y, X)),
        ((1, 1, 4), "column", (Y, Y, Y)),
        ((1, 1, 4), "row", (X, X, X)),
        ((1, 2, 2), "alternate", (X, Y, X)),
        ((1, 2, 2), ("row", "column", "row"), (Y, X, Y)),
        ((1, 4, 1), ["row", "row", "column"], (Y, Y, X)),
    ],
)
def test_a_word_binds_the_roles_of_its_layer(sizes, layout, roles):
    placement = place((8, 8, 8, 8), mesh_of(sizes), tpmlp.Strategy(layout=layout))
    assert placement.axes == roles


def test_every_layer_reads_what_the_one_before_left(mesh):
    placement = place((17, 12, 20, 10), mesh, tpmlp.Strategy(layout="auto"))
    for l in range(1, 3):
        assert placement.spec("O/g/s B/d", l) == placement.spec("I/s/g B/d", l + 1)


def words_moved(widths, sizes, words):
    """Add up what the layers receive, by the formula that tests of the audit count."""
    _, x, y = sizes
    main, other = (y, x) if x == 1 else (x, y)
    total = 0
    for i, word in enumerate(words):
        g, s = (main, other) if word == "column" else (other, main)
        total += layer_words(d_in=widths[i], d_out=widths[i + 1], g=g, s=s, input_gradient=i > 0)
    return total


def legal(sizes, num_layers):
    words = product(("column", "row"), repeat=num_layers)
    both = sizes[1] > 1 and sizes[2] > 1
    return [w for w in words if not both or all(a != b for a, b in pairwise(w))]


@pytest.mark.parametrize("widths", [(840, 1680, 840, 10080), (10080, 840, 3360, 840)])
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_auto_moves_the_fewest_words_of_all_legal_layouts(sizes, widths):
    # Widths that every mesh divides, so that padding does not blur the count.
    chosen = place(widths, mesh_of(sizes), None).words
    assert chosen in legal(sizes, 3)
    least = min(words_moved(widths, sizes, words) for words in legal(sizes, 3))
    assert words_moved(widths, sizes, chosen) == least


def test_padded_widths_are_multiples_of_the_tensor_devices(mesh):
    placement = place((17, 12, 10), mesh, None)
    M = mesh.shape["x"] * mesh.shape["y"]
    for width, whole in zip(placement.widths, placement.padded_widths, strict=True):
        assert whole % M == 0
        assert width <= whole < width + M
    assert placement.is_padded == (placement.widths != placement.padded_widths)


@pytest.mark.parametrize(
    ("layout", "clash"),
    [
        ("column", "layers 1 and 2 both 'column'"),
        ("row", "layers 1 and 2 both 'row'"),
        (("column", "row", "row"), "layers 2 and 3 both 'row'"),
    ],
)
def test_two_tensor_axes_without_alternation_are_refused_with_reason_and_fix(layout, clash):
    with pytest.raises(ValueError, match="layout must alternate") as refusal:
        place((8, 8, 8, 8), mesh_of((1, 4, 2)), tpmlp.Strategy(layout=layout))
    for part in (clash, f"layout={layout!r}", "x=4, y=2", "because", "layout='alternate'"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("layout", [("column",), ("row",) * 4])
def test_a_layout_of_another_length_is_refused(layout):
    with pytest.raises(ValueError, match=f"got {len(layout)} words .*num_layers=3"):
        place((8, 8, 8, 8), mesh_of((1, 4, 1)), tpmlp.Strategy(layout=layout))


@pytest.mark.parametrize(
    "wrong", ["columns", "", (), ("column", "auto"), ("col",), None, 3, ("row", ["column"])]
)
def test_an_unknown_layout_is_refused_with_the_words_there_are(wrong):
    with pytest.raises(ValueError, match="layout must be one of") as refusal:
        tpmlp.Strategy(layout=wrong)
    assert f"layout={wrong!r}" in str(refusal.value)
    assert "alternate" in str(refusal.value)
