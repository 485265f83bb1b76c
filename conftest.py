"""The suite's ground rules: 8 simulated CPU devices, float64 on, strict promotion of types.

`mesh` is a parametrised fixture: a test that takes it runs on every mesh of MESHES, which has 3,
5, 6 and 7 devices in it as well as powers of two, so that no width is divisible by luck.
"""

import os

import hypothesis
import jax
import pytest
from jax.sharding import Mesh

import tpmlp

# `make test-gpu` names its platforms; everything else runs on simulated CPU devices alone.
if "JAX_PLATFORMS" in os.environ:
    jax.config.update("jax_num_cpu_devices", 8)
else:
    tpmlp.simulate_devices(8)
# A test is no stopwatch: on a busy machine the first example of any may take long.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# (data, x, y)
MESHES = (
    (1, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (2, 1, 1),
    (1, 3, 1),
    (1, 2, 2),
    (2, 1, 2),
    (1, 5, 1),
    (1, 2, 3),
    (1, 3, 2),
    (1, 1, 7),
    (1, 8, 1),
    (1, 4, 2),
    (1, 2, 4),
    (2, 2, 2),
    (4, 2, 1),
    (8, 1, 1),
)


@pytest.fixture(params=MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def mesh(request: pytest.FixtureRequest) -> Mesh:
    """Return one mesh of MESHES."""
    data, x, y = request.param
    return tpmlp.make_mesh(data=data, x=x, y=y)
