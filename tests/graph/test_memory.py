"""What a graph's step is predicted to hold is what the compiler allocates, neither more nor less.

A failure with more compiled than predicted: the engine keeps an array after its last reader, or one
is made long before its first. With less: an array is told that is not there, or is told too early.
"""

import pytest

import tpmlp
from tests.graph.memory_cases import STEPS, Step, compiled_and_predicted, name_of_step
from tpmlp.graph import Dense, Input, Vertex

# What the issue on graphs asks of the peak; arrays of one number a token, and how the compiler
# orders operations that do not wait for each other, are not in the prediction.
MOST = 1.15


@pytest.mark.parametrize("step", STEPS, ids=name_of_step)
def test_temporaries_are_what_was_predicted(step: Step):
    audit, predicted = compiled_and_predicted(step)
    assert predicted is not None
    held = audit.argument_bytes + audit.output_bytes
    assert 1 / MOST <= audit.temp_bytes / predicted <= MOST
    assert 1 / MOST <= audit.peak_bytes / (held + predicted) <= MOST


def test_the_summary_shows_them():
    graph = tpmlp.Graph([Vertex("x", Input(8)), Vertex("out", Dense(8), "x")])
    summary = graph.summary(tpmlp.make_mesh(x=2), batch_size=64)
    assert summary.temp_bytes
    assert "on one device: parameters" in str(summary)
    assert "within the step 4" in str(summary)


def test_what_a_function_writes_is_not_predicted():
    graph = tpmlp.Graph([Vertex("x", Input(8)), Vertex.from_function("out", lambda x: 2 * x, "x")])
    summary = graph.summary(tpmlp.make_mesh(x=2), batch_size=64)
    assert summary.temp_bytes is None
    assert "within the step not predicted" in str(summary)
