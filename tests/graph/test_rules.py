"""Each row of the rule table is a function and its transpose, on some meshes (all: every_rule.py).

A failure of an output says that r is wrong on that mesh; of a gradient, which one; of the adjoint,
that the two directions of a rule do not belong together, whatever the plain function says.
"""

from collections.abc import Iterable
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import tpmlp
from tests.cases import Sizes, mesh_of, name_of
from tests.graph.rows import (
    KEY,
    ROWS,
    directions,
    expected_outputs,
    floats_of,
    numbers,
    sole,
)
from tests.tolerances import CENTRAL_DIFFERENCE, FLOAT64
from tpmlp.graph import kinds
from tpmlp.graph.placement import Gather, Turn, Whole
from tpmlp.graph.rules import RULES

STEP = 1e-4
# One device; one axis that no width is a multiple of, beside data; two axes, either one longer.
SOME = ((1, 1, 1), (2, 3, 1), (1, 2, 3), (1, 4, 2))
MOVED = ((1, 1, 1), (1, 2, 3))


def is_moved(sizes: Sizes) -> bool:
    """Return whether derivatives along v are taken on a mesh: on some of SOME, and all others."""
    return sizes in MOVED or sizes not in SOME


class Both(NamedTuple):
    """What a rule gives in both directions.

    Attributes:
        outputs: r.
        along: the derivative of r along v, by a central difference; None where it was not taken.
        grads: by the parameters and by the samples, of the sum of w * r.
    """

    outputs: Any
    along: Any
    grads: tuple[Any, Any]


def both(function: Any, w: Any, params: Any, floats: Any, v: Any, *, along: bool) -> Both:
    """Run a function of parameters and samples forward and backward; traced."""

    def moved(step: float) -> Any:
        return function(*jax.tree.map(lambda a, v: a + step * v, (params, floats), v))

    outputs, transposed = jax.vjp(function, params, floats)
    difference = (moved(STEP) - moved(-STEP)) / (2 * STEP) if along else None
    return Both(outputs, difference, transposed(w))


@cache
def problem(name: str) -> Any:
    """Return w, parameters, samples, ids and v of a row."""
    graph = ROWS[name].graph
    params, samples = numbers(graph)
    floats, ids = floats_of(samples)
    w = directions(jax.eval_shape(lambda: expected_outputs(graph, params, samples)), seed=2)
    return w, params, floats, ids, directions((params, floats), seed=1)


@cache
def expected(name: str) -> Both:
    """Return both directions of a row from the plain function, by JAX."""
    w, params, floats, ids, v = problem(name)

    def function(params: Any, floats: Any) -> Any:
        return expected_outputs(ROWS[name].graph, params, {**floats, **ids})

    return jax.device_get(
        jax.jit(lambda *args: both(function, *args, along=False))(w, params, floats, v)
    )


@cache
def sharded(sizes: Sizes) -> dict[str, Both]:
    """Return both directions of every row; one program for all."""
    mesh, placed = mesh_of(sizes), {}
    for name, row in ROWS.items():
        graph = row.graph
        w, params, floats, ids, (v_params, v_floats) = problem(name)
        v = tpmlp.from_numpy(graph, v_params, mesh), v_floats
        placed[name] = w, tpmlp.from_numpy(graph, params, mesh), floats, v, ids

    @jax.jit
    def run(placed: Any) -> dict[str, Both]:
        results = {}
        for name, (w, params, floats, v, ids) in placed.items():
            graph = ROWS[name].graph

            def function(params: Any, floats: Any, graph: Any = graph, ids: Any = ids) -> Any:
                x = sole({**floats, **ids})
                return tpmlp.apply(graph, params, x, mesh=mesh, key=KEY, training=True)

            results[name] = both(function, w, params, floats, v, along=is_moved(sizes))
        return results

    return {
        name: Both(
            np.asarray(result.outputs),
            jax.device_get(result.along),
            (tpmlp.to_numpy(ROWS[name].graph, result.grads[0]), jax.device_get(result.grads[1])),
        )
        for name, result in run(placed).items()
    }


def error(got: Any, wanted: Any) -> float:
    """Return max |a - b| / max |b|."""
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


def named(meshes: Iterable[Sizes]) -> Any:
    """Return the decorator for a test of every row on each of these meshes."""
    cases = product(meshes, ROWS)
    parameters = [pytest.param(s, name, id=f"{name_of(s)}-{name}") for s, name in cases]
    return pytest.mark.parametrize(("sizes", "name"), parameters)


@named(SOME)
def test_an_output_is_that_of_the_plain_function(sizes, name):
    assert error(sharded(sizes)[name].outputs, expected(name).outputs) <= FLOAT64


@named(SOME)
def test_every_gradient_is_that_of_the_plain_function(sizes, name):
    got, wanted = sharded(sizes)[name].grads, expected(name).grads
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    worst = jax.tree.leaves(jax.tree.map(error, got, wanted))
    assert max(worst, default=0) <= FLOAT64


@named(MOVED)
def test_backward_is_the_adjoint_of_forward(sizes, name):
    w, _, _, _, v = problem(name)
    result = sharded(sizes)[name]
    forward = np.vdot(result.along, w)
    terms = jax.tree.leaves(jax.tree.map(np.multiply, v, result.grads))
    backward = sum(np.sum(term) for term in terms)
    scale = sum(np.abs(term).sum() for term in terms)
    assert abs(forward - backward) <= CENTRAL_DIFFERENCE * scale


def test_every_rule_has_a_row():
    inserted = {Gather, Turn, Whole}  # by the mesh; Turn in test_engine.py
    assert {type(row.kind) for row in ROWS.values()} == set(RULES) - inserted


def test_every_kind_that_is_no_source_has_a_rule():
    defined = {
        kind
        for kind in vars(kinds).values()
        if isinstance(kind, type) and issubclass(kind, kinds.Kind) and kind.__name__[0] != "_"
    }
    abstract = {kinds.Kind, kinds.Source}
    assert defined - abstract - {kinds.Input, kinds.Tokens} == set(RULES) - {Gather, Turn, Whole}
