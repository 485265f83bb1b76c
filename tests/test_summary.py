"""The summary says what arrays really are on a device.

A failure means that a table of `make train` shows shapes or bytes that no device has.
"""

import jax
import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of, name_of
from tpmlp.draw import draw_layers
from tpmlp.placement import place

WIDTHS = (17, 12, 10)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 1), (1, 1, 7), (2, 2, 2)], ids=name_of)
def test_parts_have_the_shapes_of_the_shards(sizes):
    mesh = mesh_of(sizes)
    model = tpmlp.MLP(WIDTHS)
    params = model.init(jax.random.key(0), mesh)
    x, y = np.ones((30, 17), np.float32), np.zeros(30, int)
    run = tpmlp.trace(model, params, x, y, loss="cross_entropy", mesh=mesh)
    held = {}
    for l, (W, b) in enumerate(params, 1):
        held |= {f"W_{l}": W, f"b_{l}": b, f"h_{l}": run.h[l], f"z_{l}": run.z[l]}
        held |= {f"g_{l}": run.g[l]}
    parts = model.summary(mesh, batch_size=30).parts
    assert {part.tensor for part in parts} == set(held)
    for part in parts:
        shard = held[part.tensor].addressable_shards[0].data
        assert (part.local, part.bytes) == (shard.shape, shard.nbytes)


def test_logical_shapes_are_the_users():
    parts = tpmlp.MLP(WIDTHS, bias=False).summary(tpmlp.make_mesh(x=8), batch_size=30).parts
    assert {part.tensor: part.logical for part in parts[:4]} == {
        "W_1": (12, 17),
        "h_1": (30, 17),
        "z_1": (30, 12),
        "g_1": (30, 12),
    }


def test_one_device_has_no_collectives():
    summary = tpmlp.MLP(WIDTHS).summary(tpmlp.make_mesh(x=1), batch_size=4, loss="mse")
    assert summary.collectives == ()
    assert "no collectives" in str(summary)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        tpmlp.MLP(WIDTHS).summary(tpmlp.make_mesh(x=1), batch_size=0)


def test_the_picture_gives_each_block_to_the_device_that_holds_it():
    mesh = tpmlp.make_mesh(x=4, y=2)
    placement = place((8, 8), mesh, tpmlp.Strategy(layout="column"))
    (panel,) = draw_layers(placement).axes
    params = tpmlp.MLP((8, 8)).init(jax.random.key(0), mesh)
    labels = {tuple(np.round(t.get_position(), 6)): t.get_text() for t in panel.texts}
    for shard in params[0][0].addressable_shards:
        rows, columns = shard.index
        middle = ((columns.start + columns.stop) / 16, 1 - (rows.start + rows.stop) / 16)
        (x,), (y,) = (p.tolist() for p in np.nonzero(mesh.devices[0, 0] == shard.device))
        assert labels[tuple(np.round(middle, 6))] == f"{x},{y}"
