"""One of two processes, each with two simulated devices, that talk over gloo.

    python two_processes.py RANK PORT FOLDER

It tries the mesh, tries it again with a fault that is in process 1 alone, trains, writes the
parameters and reads what the first process wrote; FOLDER/report-RANK.json tells what it saw.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.multihost_utils import sync_global_devices

import tpmlp
from tpmlp import collectives
from tpmlp.preflight import check_collectives

LARGEST_BYTES = 4096


def join(rank: int, port: int) -> None:
    """Join the other process."""
    tpmlp.simulate_devices(2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    # By default the first process would listen on every interface.
    bound = address if rank == 0 else None
    jax.distributed.initialize(address, 2, rank, coordinator_bind_address=bound)


def put_fault() -> None:
    """Make this process's sums wrong, and only where they are split again."""

    def faulty(*args: Any, **more: Any) -> jax.Array:
        return lax.psum_scatter(*args, **more) + 1

    changed: Any = SimpleNamespace(**vars(lax) | {"psum_scatter": faulty})
    collectives.lax = changed


def read_fault(mesh: Any) -> str:
    """Return the error of a preflight with the fault in process 1."""
    if jax.process_index() == 1:
        put_fault()
    try:
        check_collectives(mesh, LARGEST_BYTES)
    except RuntimeError as error:
        return str(error)
    finally:
        unchanged: Any = lax
        collectives.lax = unchanged
    return "none"


def main(rank: int, port: int, folder: Path) -> None:
    """Do all that the module says."""
    join(rank, port)
    mesh, model = tpmlp.make_mesh(x=4), tpmlp.MLP((4, 8, 4), activation="tanh")
    check_collectives(mesh, LARGEST_BYTES)
    report: dict[str, Any] = {"passed": True, "fault": read_fault(mesh)}
    x = np.linspace(-1, 1, 32).reshape(8, 4)
    settings: Any = {"loss": "mse", "steps": 2, "batch_size": 8, "progress": False}
    params = tpmlp.fit(model, (x, x**2), mesh=mesh, **settings).params
    report["hash"] = tpmlp.parameter_hash(model, params)
    tpmlp.save_npz(model, params, folder / f"written-{rank}.npz")
    report["written"] = (folder / f"written-{rank}.npz").exists()
    sync_global_devices("written")
    read = tpmlp.load_npz(model, folder / "written-0.npz", mesh)
    report["read"] = tpmlp.parameter_hash(model, read)
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
