"""The notation: what a signature says, and that a signature that lies is refused.

A failure in a round trip or a meaning: strings are not read as DESIGN's notation says, and every
kernel is suspect. A failure in a lie: a wrong signature in a kernel would pass unseen, or its error
would not show it.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from tests.cases import mesh_of
from tpmlp.layout import (
    Dim,
    Layout,
    LayoutError,
    Signature,
    einsum_formula,
    gathered,
    padded,
    parse_layout,
    parse_signature,
    partition_spec,
    reduced,
    scattered,
)


@st.composite
def honest_layouts(draw):
    axes = draw(st.permutations(["g", "s", "d", "x1", "stage"]))
    dims = []
    for name in draw(st.lists(st.sampled_from("OIBCK"), unique=True, max_size=4)):
        cut = draw(st.integers(0, len(axes)))
        dims.append(Dim(name, tuple(axes[:cut])))
        axes = axes[cut:]
    return Layout(tuple(dims), tuple(axes[: draw(st.integers(0, len(axes)))]))


FEW = settings(max_examples=50, deadline=None, derandomize=True)


@FEW
@given(honest_layouts())
def test_a_layout_is_read_back_from_its_string(layout):
    assert parse_layout(str(layout)) == layout


@FEW
@given(st.lists(honest_layouts(), min_size=1, max_size=3), honest_layouts())
def test_a_signature_is_read_back_from_its_strings(operands, result):
    text = f"{', '.join(map(str, operands))} -> {result}"
    assert parse_signature(text) == Signature(text, tuple(operands), result)


@FEW
@given(honest_layouts())
def test_the_axes_of_a_layout_are_all_that_it_names(layout):
    named = [axis for dim in layout.dims for axis in dim.axes] + list(layout.partial)
    assert sorted(layout.axes) == sorted(named)


MEANINGS = [
    (gathered, "I/s/g B/d -> I/s B/d", (0, ("g",))),
    (gathered, "I B/d/g -> I B", (1, ("d", "g"))),
    (scattered, "O/g B/d +s -> O/g/s B/d", (0, ("s",))),
    (scattered, "O B +s+g -> O/g/s B", (0, ("g", "s"))),
    (scattered, "O B +s+d -> O B/s +d", (1, ("s",))),
    (reduced, "O/g I/s +d -> O/g I/s", ("d",)),
    (reduced, "+g+s -> ", ("g", "s")),
    (reduced, "O +g+s -> O +s", ("g",)),
]


@pytest.mark.parametrize(("meaning", "text", "wanted"), MEANINGS)
def test_a_signature_says_which_dim_and_axes_a_collective_works_on(meaning, text, wanted):
    assert meaning(parse_signature(text)) == wanted


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("O/g I/s, I/s B/d -> O/g B/d +s", "ab,bc->ac"),
        ("O/g B/d, I/s B/d -> O/g I/s +d", "ab,cb->ac"),
        ("O/g/s B/d -> O/g/s +d", "ab->a"),
        ("K C/g/s B/d -> K B/d +s+g", "abc->ac"),
    ],
)
def test_an_honest_einsum_becomes_its_subscripts(text, formula):
    assert einsum_formula(text) == formula


LIES = {
    "malformed token": (parse_signature, "I/s 3B -> I/s", "3B"),
    "malformed axis": (parse_signature, "I/S -> I", "I/S"),
    "malformed partial": (parse_signature, "I s+ -> I", "s+"),
    "no arrow": (parse_signature, "I/s I", "->"),
    "two arrows": (parse_signature, "I/s -> I -> I", "->"),
    "two results": (parse_signature, "I/s -> I, I", "->"),
    "dim twice": (parse_signature, "I/s I -> I", "dim I twice"),
    "axis twice in one dim": (parse_signature, "I/s/s -> I", "axis s twice"),
    "axis twice in two dims": (parse_signature, "I/s B/s -> I B", "axis s twice"),
    "axis split and partial": (parse_signature, "I/s +s -> I", "axis s twice"),
    "lie in the result": (parse_signature, "I/s B -> I I", "dim I twice"),
    "gather of a major axis": (gathered, "I/s/g -> I/g", "from the end"),
    "gather that changes another dim": (gathered, "I/s/g B/d -> I/s B", "changes 2 dims"),
    "gather that changes nothing": (gathered, "I/s -> I/s", "changes 0 dims"),
    "gather that splits": (gathered, "I/s -> I/s/g", "removes axes"),
    "gather that reorders axes": (gathered, "I/s/g -> I/g/s", "from the end"),
    "gather that changes the order of dims": (gathered, "I/s B -> B I", "order"),
    "gather that renames a dim": (gathered, "I/s B -> O B", "order"),
    "gather that drops a dim": (gathered, "I/s B -> I", "order"),
    "gather that changes a partial sum": (gathered, "I/s B +g -> I B", "partial"),
    "gather of two operands": (gathered, "I/s, I/s -> I", "one"),
    "reduce-scatter over other axes": (scattered, "O B +s -> O/g B", "exactly the axes"),
    "reduce-scatter that splits too much": (scattered, "O B +s -> O/s/g B", "exactly the axes"),
    "reduce-scatter that splits too little": (scattered, "O B +s+g -> O/s B", "exactly the axes"),
    "reduce-scatter into two dims": (scattered, "O B +s+g -> O/s B/g", "changes 2 dims"),
    "reduce-scatter that prepends": (scattered, "O/g B +s -> O/s/g B", "appends"),
    "reduce-scatter that sums nothing": (scattered, "O B -> O/s B", "exactly the axes"),
    "reduce-scatter that makes a partial": (scattered, "O +s -> O/s +g", "exactly the axes"),
    "reduce-scatter without a split": (scattered, "O +s -> O", "changes 0 dims"),
    "reduce-scatter that gathers": (scattered, "O/g +s -> O", "exactly the axes"),
    "all-reduce that moves a dim": (reduced, "O/g +s -> O", "moves a dim"),
    "all-reduce that splits": (reduced, "O +s -> O/s", "moves a dim"),
    "all-reduce that sums nothing": (reduced, "O/g -> O/g", "sums nothing"),
    "all-reduce that makes a partial": (reduced, "O/g +s -> O/g +d", "sums nothing"),
    "contraction over a split dim without +axis": (
        einsum_formula,
        "O/g I/s, I/s B -> O/g B",
        "['s']",
    ),
    "+axis without contraction": (einsum_formula, "O/g I, I B -> O/g B +s", "('s',)"),
    "+axis of a kept dim": (einsum_formula, "O I/s, I/s B/d -> O B/d +s+d", "twice"),
    "dim split two ways": (einsum_formula, "O/g I/s, I/d B -> O/g B +s", "I/s and I/d"),
    "dim split in one operand": (einsum_formula, "O/g I/s, I B -> O/g B +s", "I/s and I"),
    "partial operand": (einsum_formula, "O I +s, I B -> O B", "partial"),
    "result dim from nowhere": (einsum_formula, "O I, I B -> O C", "gives C"),
    "result dim split anew": (einsum_formula, "O I, I B -> O/g B", "gives O/g"),
}


@pytest.mark.parametrize(("check", "text", "reason"), LIES.values(), ids=LIES)
def test_a_lying_signature_is_refused_and_shown(check, text, reason):
    with pytest.raises(LayoutError) as refusal:
        check(text if check in (parse_signature, einsum_formula) else parse_signature(text))
    assert f'"{text}"' in str(refusal.value)
    assert reason in str(refusal.value)


AXES = {"g": "x", "s": "y", "d": "data"}


@pytest.mark.parametrize(
    ("sizes", "text", "spec"),
    [
        ((2, 2, 2), "I/s/g B/d", PartitionSpec(("y", "x"), "data")),
        ((2, 2, 2), "O/g/s B/d", PartitionSpec(("x", "y"), "data")),
        ((1, 4, 1), "O/g/s B/d", PartitionSpec("x", None)),
        ((1, 1, 1), "O/g/s B/d", PartitionSpec(None, None)),
        ((2, 2, 2), "", PartitionSpec()),
    ],
)
def test_a_layout_is_a_partition_spec_without_axes_of_size_one(sizes, text, spec):
    assert partition_spec(text, mesh_of(sizes), AXES) == spec


def test_a_partial_sum_has_no_partition_spec():
    with pytest.raises(LayoutError, match=r'"O \+s" is a partial sum'):
        partition_spec("O +s", mesh_of((2, 2, 2)), AXES)


@FEW
@given(st.integers(1, 10_000), st.integers(1, 512))
def test_a_padded_width_is_the_least_multiple_that_is_enough(width, num_blocks):
    whole = padded(width, num_blocks)
    assert whole % num_blocks == 0
    assert width <= whole < width + num_blocks
