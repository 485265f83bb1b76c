"""tpmlp: tensor-parallel multilayer perceptrons with an explicit, verified backward pass."""

from tpmlp.batch import Batch, shard_batch
from tpmlp.inspection.audit import Audit, audit
from tpmlp.inspection.trace import trace
from tpmlp.inspection.verify import verify
from tpmlp.losses import Loss, cross_entropy, logistic, mse, output
from tpmlp.mesh import make_mesh, simulate_devices
from tpmlp.model import MLP, from_numpy, reshard, to_numpy
from tpmlp.regularizers import elastic_net, l1, l2
from tpmlp.step import apply, value_and_grad
from tpmlp.strategy import Strategy

__all__ = [
    "MLP",
    "Audit",
    "Batch",
    "Loss",
    "Strategy",
    "apply",
    "audit",
    "cross_entropy",
    "elastic_net",
    "from_numpy",
    "l1",
    "l2",
    "logistic",
    "make_mesh",
    "mse",
    "output",
    "reshard",
    "shard_batch",
    "simulate_devices",
    "to_numpy",
    "trace",
    "value_and_grad",
    "verify",
]
