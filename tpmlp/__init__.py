"""tpmlp: tensor-parallel multilayer perceptrons with an explicit, verified backward pass."""

from tpmlp.batch import Batch, shard_batch
from tpmlp.exchange.fingerprint import parameter_hash
from tpmlp.exchange.npz import load_npz, save_npz
from tpmlp.exchange.safetensors import load_safetensors, save_safetensors
from tpmlp.graph.graph import Graph
from tpmlp.graph.structure import Repeat
from tpmlp.graph.vertex import Vertex
from tpmlp.inspection.audit import Audit, audit
from tpmlp.inspection.curvature import gauss_newton_vector_product, hessian_vector_product
from tpmlp.inspection.per_example import (
    ClippedSum,
    NoiseScale,
    clipped_gradient_sum,
    gradient_noise_scale,
    per_example_gradient_norms,
)
from tpmlp.inspection.trace import trace
from tpmlp.inspection.verify import verify
from tpmlp.losses import Loss, cross_entropy, logistic, mse, output
from tpmlp.mesh import make_mesh, simulate_devices
from tpmlp.model import MLP
from tpmlp.norms import ClippedGradients, clip_by_global_norm, global_norm
from tpmlp.outputs import apply
from tpmlp.parameters import from_numpy, reshard, to_numpy
from tpmlp.pipeline.generators import make_schedule
from tpmlp.pipeline.schedule import Schedule, plot_schedules
from tpmlp.pipeline.simulate import simulate
from tpmlp.planner.ahead import compile_for
from tpmlp.regularizers import elastic_net, l1, l2
from tpmlp.step import value_and_grad
from tpmlp.strategy import Strategy
from tpmlp.train.callbacks import EarlyStopping, JSONLines
from tpmlp.train.inference import Evaluation, evaluate, predict
from tpmlp.train.loop import fit
from tpmlp.train.run import FitResult

__all__ = [
    "MLP",
    "Audit",
    "Batch",
    "ClippedGradients",
    "ClippedSum",
    "EarlyStopping",
    "Evaluation",
    "FitResult",
    "Graph",
    "JSONLines",
    "Loss",
    "NoiseScale",
    "Repeat",
    "Schedule",
    "Strategy",
    "Vertex",
    "apply",
    "audit",
    "clip_by_global_norm",
    "clipped_gradient_sum",
    "compile_for",
    "cross_entropy",
    "elastic_net",
    "evaluate",
    "fit",
    "from_numpy",
    "gauss_newton_vector_product",
    "global_norm",
    "gradient_noise_scale",
    "hessian_vector_product",
    "l1",
    "l2",
    "load_npz",
    "load_safetensors",
    "logistic",
    "make_mesh",
    "make_schedule",
    "mse",
    "output",
    "parameter_hash",
    "per_example_gradient_norms",
    "plot_schedules",
    "predict",
    "reshard",
    "save_npz",
    "save_safetensors",
    "shard_batch",
    "simulate",
    "simulate_devices",
    "to_numpy",
    "trace",
    "value_and_grad",
    "verify",
]
