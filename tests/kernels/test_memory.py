"""What a step is predicted to hold is what the compiler allocates.

A failure of a packing test: the packer gives a block that its buffers do not fit in. Of a program:
the kernel keeps an array longer than its docstring says, makes one it does not name, or XLA packs
otherwise than it did.
"""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tpmlp
from tests.cases import mesh_of, name_of
from tpmlp.kernels.memory import Buffer, Tape, packed_bytes
from tpmlp.placement import place
from tpmlp.predict import step_temp_bytes

# Sums over the batch and scalars are not in the prediction, nor how small buffers lie between
# large ones: up to 15 % may be missing, none may be too much.
MOST = 1.15

SIZES = {"deep": (64, 16, 2048), "square": (256, 6, 256), "few samples": (256, 4, 32)}
MESHES = [(1, 2, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1)]
STRATEGIES: dict[str, dict[str, Any]] = {
    "shard": {},
    "gathered": {"keep": "gathered"},
    "recompute": {"keep": "recompute"},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "split": {"shard_weights": True},
    "microbatches": {"microbatches": 4},
    "split microbatches": {"microbatches": 2, "shard_weights": True, "keep": "gathered"},
}
PROGRAMS = [
    *((size, mesh, "shard") for size in SIZES for mesh in MESHES),
    *(("deep", mesh, name) for mesh in MESHES[1:4] for name in ("gathered", "recompute")),
    *(("square", mesh, "bfloat16") for mesh in MESHES[1:3]),
    *(("deep", mesh, "microbatches") for mesh in (MESHES[1], MESHES[3], MESHES[4])),
    *(("square", MESHES[3], name) for name in ("split", "split microbatches")),
    ("deep", (1, 1, 1), "shard"),
]


@pytest.mark.parametrize(("size", "mesh", "name"), PROGRAMS, ids=name_of)
def test_temporaries_are_what_was_predicted(size, mesh, name):
    d, num_layers, batch_size = SIZES[size]
    widths, where = (d,) * (num_layers + 1), mesh_of(mesh)
    strategy = tpmlp.Strategy(**STRATEGIES[name])
    step = tpmlp.value_and_grad(tpmlp.MLP(widths), loss="mse", mesh=where, strategy=strategy)
    compiled = tpmlp.audit(step.compile(batch_size)).temp_bytes
    placement = place(widths, where, strategy)
    predicted = step_temp_bytes(placement, bias=True, batch_size=batch_size)
    assert predicted is not None
    assert 1 <= compiled / predicted <= MOST


def test_what_is_not_predicted_is_said_to_be_so():
    mesh, strategy = mesh_of((1, 8, 1)), tpmlp.Strategy(overlap="ring")
    assert step_temp_bytes(place((8, 8), mesh, strategy), bias=True, batch_size=8) is None
    summary = tpmlp.MLP((8, 8)).summary(mesh, batch_size=8, strategy=strategy)
    assert "within the step not predicted" in str(summary)


BUFFERS = st.lists(
    st.builds(
        lambda size, made, life: Buffer("x", size, made, made + life),
        st.integers(1, 9),
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(BUFFERS)
def test_a_block_is_no_smaller_than_what_lives_at_once_and_no_larger_than_all(buffers):
    at_once = [sum(b.bytes for b in buffers if b.made <= t <= b.last) for t in range(20)]
    assert max(at_once) <= packed_bytes(buffers) <= sum(b.bytes for b in buffers)


@given(BUFFERS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_buffers_that_never_meet_lie_in_the_same_place(buffers):
    if any(a.meets(b) for a, b in combinations(buffers, 2)):
        buffers = buffers[:1]
    assert packed_bytes(buffers) == max((b.bytes for b in buffers), default=0)


def test_a_temporary_that_is_dead_before_a_result_is_made_lies_in_it():
    tape = Tape()
    first = tape.make("first", 8)
    second = tape.make("second", 6, first)
    third = tape.make("third", 4, second)
    tape.make("result", 8, third, result=True)
    # The first lies in the result; the second meets it, the third meets the result.
    assert tape.temp_bytes() == 10
