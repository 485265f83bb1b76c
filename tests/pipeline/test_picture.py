"""The picture of a pipeline says which device holds what: a failure means that it is of another."""

from typing import Any

import jax
import numpy as np
import pytest

import tpmlp
from tests.pipeline.test_trace import ODD, V, traced


def labels_of(figure: Any, l: int) -> dict[tuple[float, ...], str]:
    """Return the labels of the panel of a layer by their position."""
    (panel,) = [p for p in figure.axes if any(f"$W_{{{l}}}$" in t.get_text() for t in p.texts)]
    return {tuple(np.round(t.get_position(), 6)): t.get_text() for t in panel.texts}


def name_of(device: Any, mesh: Any) -> str:
    return ",".join(str(int(i[0])) for i in np.nonzero(mesh.devices[0] == device))


@pytest.mark.parametrize("case", [ODD, V], ids=str)
def test_each_block_of_a_weight_is_given_to_the_device_that_holds_it(case):
    model, mesh, strategy = case.model, case.mesh, case.strategy
    params: Any = model.init(jax.random.key(0), mesh, strategy=strategy)
    figure = model.plot(mesh, strategy=strategy)
    for l in range(1, case.num_layers + 1):
        ends = {1: params.first, case.num_layers: params.last}
        slot, stage = params.stages.where.get(l, (None, None))
        W = ends[l][0] if slot is None else params.slots[slot][0]
        labels, (rows, columns) = labels_of(figure, l), W.shape[-2:]
        seen = 0
        for shard in W.addressable_shards:
            *at, row, column = (
                part.indices(n) for part, n in zip(shard.index, W.shape, strict=True)
            )
            if at and at[0][0] != stage:
                continue
            middle = ((column[0] + column[1]) / 2 / columns, 1 - (row[0] + row[1]) / 2 / rows)
            assert labels[tuple(np.round(middle, 6))] == name_of(shard.device, mesh)
            seen += 1
        assert seen == mesh.size // (mesh.shape["stage"] if slot is not None else 1)


def test_h_and_z_are_given_to_the_devices_of_the_layers_own_stage():
    run, mesh = traced(ODD), ODD.mesh
    figure = ODD.model.plot(mesh, strategy=ODD.strategy)
    for l in range(1, ODD.num_layers + 1):
        texts = labels_of(figure, l)
        for name, where, is_here in (
            ("h", 0, lambda at: 1 < at[1] < 1.2),
            ("z", 1, lambda at: 1 < at[0] < 1.2 and at[1] != 0.5),
        ):
            drawn = sorted(
                (at[where] if name == "h" else 1 - at[where], text)
                for at, text in texts.items()
                if is_here(at) and not text.startswith("$")
            )
            stage = str(run.grads.stages.stage_of(l))
            shards = [
                (s.index[1].start or 0, name_of(s.device, mesh))
                for s in getattr(run, name)[l].addressable_shards
            ]
            held = [device for _, device in sorted(shards) if device.startswith(stage)]
            assert [text for _, text in drawn] == held


def test_a_row_is_a_stage_and_chunks_are_named():
    figure = V.model.plot(V.mesh, strategy=V.strategy)
    assert [part.get_suptitle() for part in figure.subfigs] == ["stage 0", "stage 1"]
    said = [t.get_text() for panel in figure.axes for t in panel.texts]
    assert [sum(f"chunk {c}" in text for text in said) for c in (0, 1)] == [3, 2]
    assert not any("chunk" in t.get_text() for p in plain().axes for t in p.texts)


def plain() -> Any:
    return tpmlp.MLP((8, 8, 8)).plot(tpmlp.make_mesh(stage=2, x=2))
