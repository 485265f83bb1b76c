"""Which optimisers fit accepts. A failure lets padding change a result, or refuses for nothing.

That what is accepted does what optax does is in test_optimizer.py. Here: what is refused, with
the name of the part at fault, and that the small arrays of the probe stand for the real ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import tpmlp
from tests.cases import mesh_of
from tpmlp.placement import place
from tpmlp.train import probe
from tpmlp.train.optimizer import standard_promotion
from tpmlp.train.probe import culprits, describe, make_optimizer, members

SGD = optax.sgd(1e-2)
# Linear, no bias: one array, so that a probe compiles quickly. 10 and 6 are padded on 8 devices.
MODEL = tpmlp.MLP((10, 6), bias=False)


def make(tx: Any, model: tpmlp.MLP = MODEL, sizes: tuple[int, int, int] = (1, 4, 2)) -> Any:
    placement = place(model.widths, mesh_of(sizes))
    return make_optimizer(tx, model=model, placement=placement, dtype=jnp.float32)


CENTRAL = optax.chain(optax.centralize(), SGD)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "adafactor": (lambda: optax.adafactor(1e-2), "clip_by_block_rms, scale_by_param_block_rms"),
    "muon": (lambda: optax.contrib.muon(1e-2), r"got scale_by_shape \(in optax.contrib.muon\)"),
    "centralize": (lambda: CENTRAL, "got centralize,"),
    "rare clip": (lambda: optax.chain(optax.clip_by_block_rms(1e4), SGD), "clip_by_block_rms"),
    "parameter rms": (lambda: optax.chain(SGD, optax.scale_by_param_block_rms()), "param_block_rm"),
    "noise": (lambda: optax.add_noise(0.1, 0.5, jax.random.key(0)), "got add_noise,"),
    "seldom": (lambda: optax.MultiSteps(CENTRAL, 50).gradient_transformation(), "centralize"),
}


@pytest.mark.parametrize(("tx", "name"), REFUSED.values(), ids=REFUSED)
def test_what_padding_would_change_is_refused_by_name(tx: Callable[[], Any], name: str) -> None:
    with pytest.raises(ValueError, match=r"^optimizer must not depend on the shapes") as refusal:
        make(tx())
    refusal.match(name)
    refusal.match(r"W_1 of shape \(6, 10\) padded to \(8, 16\) on the mesh .*'x': 4, 'y': 2")
    refusal.match(r"x\*y=8 divides")


@pytest.mark.parametrize("tx", [optax.adafactor(1e-2), CENTRAL, optax.contrib.muon(1e-2)])
def test_where_nothing_is_padded_the_same_ones_do_what_optax_does(tx: Any) -> None:
    optimizer = make(tx, sizes=(2, 2, 1))
    mesh = optimizer.placement.mesh
    W = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    params = tpmlp.from_numpy(MODEL, [(W, None)], mesh)
    ((updated, _),), _ = jax.jit(optimizer.apply)(
        params, optimizer.init(params), params, jnp.float32(1)
    )
    with standard_promotion():
        wanted, _ = tx.update(((W, None),), tx.init(((W, None),)), ((W, None),))
    # Sums in float32, of at most 60 terms, in another order.
    np.testing.assert_allclose(updated, W + wanted[0][0], rtol=1e-5, atol=1e-6)


def test_a_rule_for_large_arrays_is_seen_whatever_its_threshold() -> None:
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=128)
    make(factored)
    name = r"scale_by_factored_rms \(in optax.adafactor\)"
    with pytest.raises(ValueError, match=name):  # 127 becomes 128
        make(factored, tpmlp.MLP((400, 127), bias=False), (1, 8, 1))
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=5000)
    with pytest.raises(ValueError, match=name):
        make(factored, tpmlp.MLP((6001, 6002), bias=False))


def test_large_widths_are_probed_small_in_the_same_order_with_the_same_padding() -> None:
    shapes = {"logical": (5000, 10, 300, 128), "padded": (5005, 14, 301, 133)}
    setting = probe._Setting(
        **{name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    )
    small = setting.small()
    assert small.logical.shape == (160, 10, 144, 128)
    assert np.subtract(small.padded.shape, small.logical.shape).tolist() == [5, 4, 1, 5]


NEEDY: dict[str, tuple[Callable[[], Any], str]] = {
    "lbfgs": (lambda: optax.lbfgs(), "got scale_by_zoom_linesearch, .*'grad' and 'value_fn'"),
    "sophia": (lambda: optax.contrib.sophia(1e-3), "hutchinson.*obj_fn"),
}


@pytest.mark.parametrize(("tx", "name"), NEEDY.values(), ids=NEEDY)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_what_needs_more_than_value_is_refused_by_name(
    tx: Callable[[], Any], name: str, sizes: tuple[int, int, int]
) -> None:
    with pytest.raises(ValueError, match=rf"^optimizer must need no more than .*{name}"):
        make(tx(), sizes=sizes)


@pytest.mark.parametrize(
    ("tx", "got"),
    [(optax.adam, "function"), ("adam", "str"), (optax.MultiSteps(SGD, 2), "MultiSteps")],
)
def test_what_is_no_transformation_is_refused(tx: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"^optimizer must be an optax.Grad.*got {got}"):
        make(tx)


def test_members_are_found_in_chains_and_wrappers() -> None:
    chain = optax.chain(optax.clip(1.0), optax.scale(2.0))
    assert [describe(m) for m in members(chain)] == ["clip", "scale"]
    assert describe(optax.apply_if_finite(chain, 2)) == "apply_if_finite(chain(clip, scale))"
    steps = optax.MultiSteps(chain, 2).gradient_transformation()
    assert describe(steps) == "MultiSteps(chain(clip, scale))"
    assert members(optax.clip(1.0)) == []


def test_a_whole_that_fails_where_no_part_does_is_named_with_its_parts() -> None:
    chain = optax.chain(optax.clip(1.0), optax.scale(2.0))
    assert culprits(chain, lambda _: False) == ["chain(clip, scale)"]
    assert culprits(chain, lambda _: True) == ["clip", "scale"]


def test_what_acts_only_after_the_probe_is_judged_by_its_parts() -> None:
    def late(step: Any, **_: Any) -> Any:
        return step > 20

    waiting = optax.conditionally_transform(optax.centralize(), late)
    with pytest.raises(ValueError, match="centralize"):
        make(optax.chain(waiting, optax.sgd(0.1)))
