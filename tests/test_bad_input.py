"""Bad input: one ValueError each, that names what is wrong, its value and what to do.

All of it is raised before anything is compiled: a failure here that says "compiled" means that a
user waits for the compiler to learn of a typing error, or reads XLA's error instead of ours.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpmlp
from tests.cases import mesh_of

# Untyped on purpose: these calls are wrong, and a type checker would say so.
api: Any = tpmlp

MESH = mesh_of((2, 2, 2))
MODEL = api.MLP((3, 8, 5))
SHAPES = [(8, 3), (5, 8)]
NUMBERS = [(np.ones(shape), np.ones(shape[0])) for shape in SHAPES]
PARAMS = api.from_numpy(MODEL, NUMBERS, MESH)
X = np.ones((4, 3))
KEY = jax.random.key(0)
LABELS = np.array([0, 1, 2, 4])
VALUES = np.ones((4, 5))
COMPILED: list[str] = []


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    """Fail a test in which JAX compiles a program; to trace one is allowed."""

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            COMPILED.append(event)

    COMPILED.clear()
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not COMPILED, f"compiled before the refusal: {COMPILED}"


def changed(array: Any, index: Any, value: Any) -> Any:
    array = np.array(array)
    array[index] = value
    return array


def step(x: Any, y: Any = None, weight: Any = None, *, loss: Any = "cross_entropy", **more: Any):
    """Run a step on good parameters."""
    return api.value_and_grad(MODEL, loss=loss, mesh=MESH)(PARAMS, x, y, weight, **more)


def with_params(params: Any, model: tpmlp.MLP = MODEL, mesh: Any = MESH, layout: Any = "auto"):
    """Run a step on good samples."""
    strategy = api.Strategy(layout=layout)
    x, y = np.ones((4, model.widths[0])), np.ones((4, model.widths[-1]))
    return api.value_and_grad(model, loss="mse", mesh=mesh, strategy=strategy)(params, x, y)


def foreign_mesh() -> Any:
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("model", "batch"))


# What is wrong: (the call, what the error must say: name, value, way out).
Case = tuple[Callable[[], Any], tuple[str, ...]]
WIDTHS: dict[str, Case] = {
    "no widths": (lambda: api.MLP(()), ("widths", "()", "(64, 256, 10)")),
    "one width": (lambda: api.MLP((3,)), ("widths", "(3,)", "at least two")),
    "zero": (lambda: api.MLP((3, 0, 2)), ("widths", "(3, 0, 2)", "positive")),
    "negative": (lambda: api.MLP((3, -1)), ("widths", "(3, -1)", "positive")),
    "float": (lambda: api.MLP((3, 2.5)), ("widths", "(3, 2.5)", "integers")),
    "whole float": (lambda: api.MLP((3, 2.0)), ("widths", "(3, 2.0)", "integers")),
    "strings": (lambda: api.MLP(("3", "2")), ("widths", "('3', '2')", "integers")),
    "one string": (lambda: api.MLP("32"), ("widths", "'32'", "integers")),
    "number": (lambda: api.MLP(3), ("widths", "widths=3", "integers")),
    "None": (lambda: api.MLP(None), ("widths", "None", "integers")),
    "activation": (lambda: api.MLP((3, 2), "swish"), ("activation", "'swish'", "silu")),
}
MESHES: dict[str, Case] = {
    "too large": (lambda: api.make_mesh(x=9), ("mesh", "x=9", "devices=8", "simulate_devices")),
    "foreign in init": (
        lambda: MODEL.init(KEY, foreign_mesh()),
        ("mesh", "('model', 'batch')", "make_mesh"),
    ),
    "foreign in a step": (
        lambda: api.value_and_grad(MODEL, loss="mse", mesh=foreign_mesh()),
        ("mesh", "('model', 'batch')", "make_mesh"),
    ),
    "foreign in apply": (
        lambda: api.apply(MODEL, PARAMS, X, mesh=foreign_mesh()),
        ("mesh", "('model', 'batch')", "make_mesh"),
    ),
    "foreign in reshard": (
        lambda: api.reshard(MODEL, PARAMS, foreign_mesh()),
        ("mesh", "('model', 'batch')", "make_mesh"),
    ),
    "no mesh": (
        lambda: api.value_and_grad(MODEL, loss="mse", mesh=None),
        ("mesh", "None", "make_mesh"),
    ),
    "sizes for a mesh": (
        lambda: api.value_and_grad(MODEL, loss="mse", mesh={"x": 2}),
        ("mesh", "{'x': 2}", "make_mesh"),
    ),
    "layout": (lambda: api.Strategy(layout="diagonal"), ("layout", "'diagonal'", "alternate")),
    "length of layout": (
        lambda: with_params(PARAMS, layout=("row", "column", "row")),
        ("layout", "('row', 'column', 'row')", "num_layers=2", "2 words"),
    ),
    "two axes without alternation": (
        lambda: with_params(PARAMS, layout="column"),
        ("layout", "'column'", "x=2, y=2", "alternate"),
    ),
    "word for a strategy": (
        lambda: api.value_and_grad(MODEL, loss="mse", mesh=MESH, strategy="row"),
        ("strategy", "'row'", "Strategy(layout="),
    ),
}
FEATURES: dict[str, Case] = {
    "one row as a vector": (lambda: step(np.ones(3), LABELS), ("x", "(3,)", "d_0=3", "rows")),
    "images": (lambda: step(np.ones((4, 3, 1)), LABELS), ("x", "(4, 3, 1)", "d_0=3")),
    "number": (lambda: step(1.0, LABELS), ("x", "()", "d_0=3")),
    "width": (lambda: step(np.ones((4, 7)), LABELS), ("x", "(4, 7)", "d_0=3")),
    "padded width": (lambda: step(np.ones((4, 4)), LABELS), ("x", "(4, 4)", "d_0=3")),
    "columns": (lambda: step(X.T, LABELS), ("x", "(3, 4)", "rows")),
    "empty": (lambda: step(np.ones((0, 3)), LABELS[:0]), ("x", "(0, 3)", "at least one row")),
    "None": (lambda: step(None, LABELS), ("x", "None", "given")),
    "strings": (lambda: step(X.astype(str), LABELS), ("x", "<U", "real numbers")),
    "complex": (lambda: step(X + 0j, LABELS), ("x", "complex128", "real numbers")),
    "objects": (lambda: step(X.astype(object), LABELS), ("x", "object", "real numbers")),
    "ragged": (lambda: step([[1.0, 2, 3], [4]], LABELS[:2]), ("x", "row")),
    "NaN": (lambda: step(changed(X, (2, 1), np.nan), LABELS), ("x", "nan", "row 2", "Remove")),
    "infinity": (lambda: step(changed(X, (3, 0), -np.inf), LABELS), ("x", "-inf", "row 3")),
    "NaN on a device": (
        lambda: step(jax.device_put(changed(X, (1, 1), np.nan)), LABELS),
        ("x", "nan", "row 1"),
    ),
    "NaN in shard_batch": (
        lambda: api.shard_batch(MODEL, changed(X, (2, 1), np.nan), LABELS, mesh=MESH),
        ("x", "nan", "row 2"),
    ),
    "NaN in apply": (
        lambda: api.apply(MODEL, PARAMS, changed(X, (2, 1), np.nan), mesh=MESH),
        ("x", "nan", "row 2"),
    ),
    "width in apply": (
        lambda: api.apply(MODEL, PARAMS, np.ones((4, 2)), mesh=MESH),
        ("x", "(4, 2)", "d_0=3"),
    ),
    "complex in apply": (
        lambda: api.apply(MODEL, PARAMS, jax.device_put(X + 1j), mesh=MESH),
        ("x", "complex128", "real numbers"),
    ),
    "placed for a model of other width": (
        lambda: step(*api.shard_batch(api.MLP((9, 5)), np.ones((4, 9)), LABELS, mesh=MESH)),
        ("x", "(4, 12)"),
    ),
}
TARGETS: dict[str, Case] = {
    "missing labels": (lambda: step(X), ("y", "None", "given")),
    "label too large": (
        lambda: step(X, changed(LABELS, 3, 5)),
        ("y", "0 .. 4", "5 in row 3", "outputs"),
    ),
    "negative label": (lambda: step(X, changed(LABELS, 1, -1)), ("y", "0 .. 4", "-1 in row 1")),
    "label in shard_batch": (
        lambda: api.shard_batch(MODEL, X, changed(LABELS, 3, 5), mesh=MESH),
        ("y", "0 .. 4", "5 in row 3"),
    ),
    "float labels": (lambda: step(X, LABELS * 1.0), ("y", "float64", "astype(int)")),
    "string labels": (lambda: step(X, list("abca")), ("y", "<U1", "real numbers")),
    "bool labels": (lambda: step(X, LABELS > 1), ("y", "bool", "integer")),
    "too few labels": (lambda: step(X, LABELS[:3]), ("y", "(3,)", "4 rows")),
    "one label": (lambda: step(X, 1), ("y", "()", "integer")),
    "one-hot labels": (lambda: step(X, np.eye(5, dtype=int)[LABELS]), ("y", "(4, 5)", "argmax")),
    "missing values": (lambda: step(X, loss="mse"), ("y", "None", "given")),
    "values of other width": (
        lambda: step(X, VALUES[:, :4], loss="mse"),
        ("y", "(4, 4)", "(4, 5)"),
    ),
    "values of other length": (lambda: step(X, VALUES[:2], loss="mse"), ("y", "(2, 5)", "4 rows")),
    "values as a vector": (lambda: step(X, VALUES[:, 0], loss="mse"), ("y", "(4,)", "(4, 5)")),
    "NaN in values": (
        lambda: step(X, changed(VALUES, (1, 0), np.nan), loss="mse"),
        ("y", "nan", "row 1"),
    ),
    "logistic of values": (
        lambda: step(X, changed(VALUES, (2, 0), 0.5), loss="logistic"),
        ("y", "y[2]", "0.5", "0 or 1", "mse"),
    ),
    "y for output": (lambda: step(X, LABELS, loss="output"), ("y", "None", "output")),
    "loss": (lambda: step(X, LABELS, loss="crossentropy"), ("loss", "'crossentropy'", "mse")),
    "no y for a users loss": (lambda: step(X, loss=lambda z, y: z[0]), ("y", "None", "given")),
    "length for a users loss": (
        lambda: step(X, LABELS[:2], loss=lambda z, y: z[0]),
        ("y", "(2,)", "4 rows"),
    ),
    "cotangent missing": (lambda: step(X, loss=None), ("cotangent", "None")),
    "y for a cotangent": (
        lambda: step(X, VALUES, loss=None, cotangent=VALUES),
        ("cotangent", "y given"),
    ),
    "cotangent for a loss": (
        lambda: step(X, LABELS, cotangent=VALUES),
        ("cotangent", "'cross_entropy'", "cotangent given"),
    ),
    "shape of cotangent": (
        lambda: step(X, loss=None, cotangent=VALUES[:, :2]),
        ("cotangent", "(4, 2)", "(4, 5)"),
    ),
    "NaN in cotangent": (
        lambda: step(X, loss=None, cotangent=changed(VALUES, (1, 0), np.nan)),
        ("cotangent", "nan", "row 1"),
    ),
}
WEIGHTS: dict[str, Case] = {
    "negative": (lambda: step(X, LABELS, [1, 1, -0.5, 1]), ("weight", "-0.5", "row 2", "at least")),
    "NaN": (lambda: step(X, LABELS, [1, np.nan, 1, 1]), ("weight", "nan", "row 1")),
    "infinite": (lambda: step(X, LABELS, [1, np.inf, 1, 1]), ("weight", "inf", "row 1")),
    "all zero": (lambda: step(X, LABELS, np.zeros(4)), ("weight", "not all 0", "0.0")),
    "length": (lambda: step(X, LABELS, np.ones(3)), ("weight", "(3,)", "4 rows")),
    "rank": (lambda: step(X, LABELS, np.ones((4, 1))), ("weight", "(4, 1)", "[B]")),
    "number": (lambda: step(X, LABELS, 1.0), ("weight", "()", "4 rows")),
    "strings": (lambda: step(X, LABELS, list("aaaa")), ("weight", "<U1", "real numbers")),
}


def narrow() -> Any:
    """Return parameters of a model with fewer inputs, padded to less."""
    model = api.MLP((17, 8, 5))
    return api.from_numpy(model, [(np.ones((8, 17)), np.ones(8)), NUMBERS[1]], MESH)


PARAMETERS: dict[str, Case] = {
    "another model": (lambda: with_params(narrow()), ("W_1", "(8, 20)", "another model")),
    "fewer layers": (lambda: with_params(PARAMS[:1]), ("num_layers=2", "1 layers", "init")),
    "another mesh": (
        lambda: with_params(PARAMS, mesh=mesh_of((1, 2, 2))),
        ("W_1", "'data': 1", "reshard"),
    ),
    "another padding": (
        lambda: with_params(PARAMS, mesh=mesh_of((1, 8, 1))),
        ("W_1", "(8, 4)", "(8, 8)", "reshard"),
    ),
    "another layout": (
        lambda: with_params(PARAMS, layout=_other_layout()),
        ("W_1", "must be placed as", "reshard"),
    ),
    "one device": (
        lambda: with_params(jax.tree.map(lambda a: jax.device_put(np.asarray(a)), PARAMS)),
        ("W_1", "SingleDevice", "from_numpy"),
    ),
    "NumPy arrays": (lambda: with_params(NUMBERS), ("W_1", "ndarray", "from_numpy")),
    "list of arrays": (
        lambda: with_params([W for W, _ in PARAMS]),
        ("params", "(W, b)", "num_layers=2"),
    ),
    "dictionary": (lambda: with_params({"W_1": 1}), ("params", "dict", "num_layers=2")),
    "None": (lambda: with_params(None), ("params", "NoneType", "num_layers=2")),
    "missing bias": (
        lambda: with_params(tuple((W, None) for W, _ in PARAMS)),
        ("layer 1", "b=None", "bias=True"),
    ),
    "bias that is not": (
        lambda: with_params(PARAMS, api.MLP((3, 8, 5), bias=False)),
        ("layer 1", "b=an array", "bias=False"),
    ),
    "apply on another mesh": (
        lambda: api.apply(MODEL, PARAMS, X, mesh=mesh_of((1, 8, 1))),
        ("W_1", "(8, 8)", "reshard"),
    ),
    "shape in from_numpy": (
        lambda: api.from_numpy(MODEL, [(np.ones((3, 8)), np.ones(8)), NUMBERS[1]], MESH),
        ("W_1", "(3, 8)", "(8, 3)"),
    ),
    "bias in from_numpy": (
        lambda: api.from_numpy(MODEL, [NUMBERS[0], (NUMBERS[1][0], np.ones(8))], MESH),
        ("b_2", "(8,)", "(5,)"),
    ),
    "integers in from_numpy": (
        lambda: api.from_numpy(MODEL, [(W.astype(int), b) for W, b in NUMBERS], MESH),
        ("W_1", "int64", "floating"),
    ),
    "layers in from_numpy": (
        lambda: api.from_numpy(MODEL, NUMBERS[:1], MESH),
        ("num_layers=2", "1 layers"),
    ),
    "another model in to_numpy": (
        lambda: api.to_numpy(api.MLP((30, 8, 5)), PARAMS),
        ("W_1", "(8, 4)"),
    ),
    "another model in reshard": (
        lambda: api.reshard(api.MLP((30, 8, 5)), PARAMS, mesh_of((1, 8, 1))),
        ("W_1", "(8, 4)"),
    ),
    "NumPy arrays in reshard": (
        lambda: api.reshard(MODEL, NUMBERS, MESH),
        ("W_1", "ndarray", "from_numpy"),
    ),
    "no model": (
        lambda: api.value_and_grad((3, 8, 5), loss="mse", mesh=MESH),
        ("model", "a tuple", "MLP"),
    ),
    "no key": (
        lambda: MODEL.init(0, MESH),
        ("key", "key=0", "jax.random.key(0)"),
    ),
    "integer parameters": (
        lambda: MODEL.init(KEY, MESH, dtype=np.int32),
        ("dtype", "int32", "float32"),
    ),
    "whole batch in summary": (
        lambda: MODEL.summary(MESH, batch_size=2.5),
        ("batch_size", "2.5", "one step"),
    ),
    "unknown axis": (lambda: api.make_mesh(z=2), ("mesh axis", "z=2", "data")),
    "stages": (
        lambda: api.value_and_grad(MODEL, loss="mse", mesh=api.make_mesh(stage=4, x=2)),
        ("num_layers=2", "stage=4", "4 layers or more"),
    ),
    "integer regularizer": (
        lambda: api.value_and_grad(
            MODEL, loss="mse", mesh=MESH, regularizer=lambda layers: jnp.int32(1)
        ).lower(PARAMS, np.ones((2, 3)), np.ones((2, 5))),
        ("regularizer", "int32", "jnp.sum"),
    ),
    "regularizer": (
        lambda: api.value_and_grad(MODEL, loss="mse", mesh=MESH, regularizer=0.1),
        ("regularizer", "0.1", "l2"),
    ),
}
STRATEGIES: dict[str, Case] = {
    "keep": (lambda: api.Strategy(keep="all"), ("keep", "'all'", "gathered", "keep='shard'")),
    "keep of another type": (lambda: api.Strategy(keep=["shard"]), ("keep", "['shard']")),
    "keep_every alone": (
        lambda: api.Strategy(keep_every=2),
        ("keep_every", "keep='shard'", "keep_every=2", "keep='recompute'"),
    ),
    "keep_every of nothing": (
        lambda: api.Strategy(keep="recompute", keep_every=0),
        ("keep_every", "keep_every=0", "positive integer"),
    ),
    "keep_every of a float": (
        lambda: api.Strategy(keep="recompute", keep_every=2.0),
        ("keep_every", "keep_every=2.0", "positive integer"),
    ),
    "keep_every of True": (
        lambda: api.Strategy(keep="recompute", keep_every=True),
        ("keep_every", "keep_every=True", "positive integer"),
    ),
    "overlap": (
        lambda: api.Strategy(overlap="async"),
        ("overlap", "'async'", "bidirectional_ring", "overlap='none'"),
    ),
    "overlap of True": (lambda: api.Strategy(overlap=True), ("overlap", "True")),
    "compute_dtype": (
        lambda: api.Strategy(compute_dtype="float16"),
        ("compute_dtype", "'float16'", "bfloat16"),
    ),
    "compute_dtype of integers": (
        lambda: api.Strategy(compute_dtype=np.int32),
        ("compute_dtype", "int32", "float32"),
    ),
    "reduce_dtype": (
        lambda: api.Strategy(reduce_dtype="half a float"),
        ("reduce_dtype", "'half a float'", "bfloat16"),
    ),
    "shard_weights": (
        lambda: api.Strategy(shard_weights="data"),
        ("shard_weights", "'data'", "True or False"),
    ),
    "microbatches": (
        lambda: api.Strategy(microbatches=0),
        ("microbatches", "microbatches=0", "positive integer"),
    ),
    "microbatches of a float": (
        lambda: api.Strategy(microbatches=1.5),
        ("microbatches", "microbatches=1.5", "positive integer"),
    ),
    "offload": (
        lambda: api.Strategy(keep="offload"),
        ("keep='offload'", "TPU", "keep='recompute'"),
    ),
    "dtype to compile for, unknown": (
        lambda: api.value_and_grad(MODEL, loss="mse", mesh=MESH).compile(64, dtype="foo"),
        ("dtype", "'foo'", "'bfloat16'"),
    ),
    "dtype to compile for, float16": (
        lambda: api.value_and_grad(MODEL, loss="mse", mesh=MESH).compile(64, dtype="float16"),
        ("dtype", "'float16'", "'float32'"),
    ),
    "dtype of a summary": (
        lambda: MODEL.summary(MESH, batch_size=64, dtype="int32"),
        ("dtype", "'int32'", "'float32'"),
    ),
    "compute_dtype in verify": (
        lambda: api.verify(
            MODEL, MESH, kind="float64", strategy=api.Strategy(compute_dtype="bfloat16")
        ),
        ("compute_dtype='bfloat16'", "reduce_dtype=None", "kind='float32'"),
    ),
    "whole parameters where they are split": (
        lambda: api.value_and_grad(
            MODEL, loss="mse", mesh=MESH, strategy=api.Strategy(shard_weights=True)
        )(PARAMS, X, VALUES),
        ("W_1", "reshard"),
    ),
}


def of_samples(name: str = "per_example_gradient_norms", x: Any = X, **changes: Any) -> Any:
    """Call a function of single samples' gradients on good arguments, some of them changed."""
    call = {"y": VALUES, "loss": "mse", "mesh": MESH} | changes
    return getattr(api, name)(MODEL, PARAMS, x, **call)


def clipped_to(max_norm: Any) -> Any:
    return of_samples("clipped_gradient_sum", max_norm=max_norm)


GRADIENTS: dict[str, Case] = {
    "no loss": (lambda: of_samples(loss=None), ("loss", "loss=None", "jnp.vdot")),
    "no loss to clip by": (
        lambda: of_samples("clipped_gradient_sum", loss=None, max_norm=1.0),
        ("loss", "loss=None"),
    ),
    "no loss to scale by": (
        lambda: of_samples("gradient_noise_scale", loss=None),
        ("loss", "loss=None"),
    ),
    "tokens": (
        lambda: of_samples(x=np.ones((4, 7, 3))),
        ("x", "(4, 7, 3)", "[B, d_0]", "not for tokens", "x.reshape(-1, 3)"),
    ),
    "tokens to clip": (
        lambda: of_samples("clipped_gradient_sum", x=np.ones((4, 7, 3)), max_norm=1.0),
        ("x", "(4, 7, 3)", "[B, d_0]", "not for tokens"),
    ),
    "tokens to scale by": (
        lambda: of_samples("gradient_noise_scale", x=np.ones((4, 7, 3))),
        ("x", "(4, 7, 3)", "[B, d_0]", "not for tokens"),
    ),
    "one sample as a vector": (lambda: of_samples(x=np.ones(3)), ("x", "(3,)", "d_0=3", "rows")),
    "targets": (lambda: of_samples(y=VALUES[:2]), ("y", "(2, 5)", "4 rows")),
    "another mesh": (lambda: of_samples(mesh=mesh_of((1, 8, 1))), ("W_1", "(8, 8)", "reshard")),
    "one sample": (
        lambda: of_samples("gradient_noise_scale", x=X[:1], y=VALUES[:1]),
        ("x", "at least two rows", "(1, 3)"),
    ),
    "bound of 0": (lambda: clipped_to(0), ("max_norm", "max_norm=0", "positive")),
    "negative bound": (lambda: clipped_to(-1.5), ("max_norm", "max_norm=-1.5", "positive")),
    "NaN as bound": (lambda: clipped_to(np.nan), ("max_norm", "max_norm=nan", "positive")),
    "True as bound": (lambda: clipped_to(True), ("max_norm", "max_norm=True", "positive")),
    "string as bound": (lambda: clipped_to("1"), ("max_norm", "max_norm='1'", "max_norm=1.0")),
    "two bounds": (lambda: clipped_to(np.ones(2)), ("max_norm", "array([1., 1.])")),
    "no bound": (lambda: clipped_to(None), ("max_norm", "max_norm=None", "max_norm=1.0")),
    "bound of the global norm": (
        lambda: api.clip_by_global_norm(MODEL, PARAMS, -1, mesh=MESH),
        ("max_norm", "max_norm=-1", "positive"),
    ),
    "norm on another mesh": (
        lambda: api.global_norm(MODEL, PARAMS, mesh=mesh_of((1, 8, 1))),
        ("W_1", "(8, 8)", "reshard"),
    ),
    "norm of NumPy arrays": (
        lambda: api.global_norm(MODEL, NUMBERS, mesh=MESH),
        ("W_1", "ndarray", "from_numpy"),
    ),
    "norm of no model": (
        lambda: api.global_norm((3, 8, 5), PARAMS, mesh=MESH),
        ("model", "a tuple", "MLP"),
    ),
}


def hessian(params: Any = PARAMS, v: Any = PARAMS, x: Any = X, y: Any = VALUES, **more: Any):
    """Ask for H v."""
    arguments = {"loss": "mse", "mesh": MESH, **more}
    return api.hessian_vector_product(MODEL, params, v, x, y, **arguments)


def without_jvp(z: Any) -> Any:
    """Compute what has a gradient, but no second derivative."""

    @jax.custom_vjp
    def square(z: Any) -> Any:
        return z * z

    square.defvjp(lambda z: (square(z), z), lambda z, g: (2 * square(z) / z * g,))
    return square(z)


def single() -> Any:
    """Return parameters in float32, without a program to convert them."""
    arrays = [tuple(a.astype(np.float32) for a in layer) for layer in NUMBERS]
    return api.from_numpy(MODEL, arrays, MESH)


CURVATURES: dict[str, Case] = {
    "v of another mesh": (
        lambda: hessian(v=api.from_numpy(MODEL, NUMBERS, mesh_of((1, 2, 2)))),
        ("v must", "W_1", "'data': 1", "reshard"),
    ),
    "v of NumPy arrays": (lambda: hessian(v=NUMBERS), ("v must", "W_1", "ndarray", "from_numpy")),
    "one array for v": (lambda: hessian(v=PARAMS[0][0]), ("v must", "num_layers=2")),
    "dtype of v": (
        lambda: hessian(v=single()),
        ("v must", "float32", "float64", "astype"),
    ),
    "v for params": (lambda: hessian(params=None), ("params must", "NoneType")),
    "labels": (
        lambda: hessian(loss="cross_entropy", y=changed(LABELS, 3, 5)),
        ("y", "0 .. 4", "5 in row 3"),
    ),
    "weight": (lambda: hessian(weight=-np.ones(4)), ("weight", "-1.0", "row 0")),
    "sigma' without a derivative": (
        lambda: api.hessian_vector_product(
            api.MLP((3, 8, 5), (jnp.square, without_jvp)),
            PARAMS,
            PARAMS,
            X,
            VALUES,
            loss="mse",
            mesh=MESH,
        ),
        ("activation 'square'", "sigma'", "custom_vjp", "jax.custom_jvp"),
    ),
    "loss without a second derivative": (
        lambda: hessian(loss=lambda z, y: jnp.sum(without_jvp(z - y))),
        ("loss '<lambda>'", "custom_vjp", "jax.numpy"),
    ),
    "regularizer without a second derivative": (
        lambda: hessian(regularizer=lambda layers: jnp.sum(without_jvp(layers[0][0]))),
        ("regularizer", "custom_vjp", "jax.numpy"),
    ),
    "Gauss-Newton of another v": (
        lambda: api.gauss_newton_vector_product(
            MODEL, PARAMS, PARAMS[:1], X, VALUES, loss="mse", mesh=MESH
        ),
        ("v must", "num_layers=2", "1 layers"),
    ),
}


def _other_layout() -> tuple[str, ...]:
    """Return the legal layout that "auto" did not choose."""
    chosen = api.value_and_grad(MODEL, loss="mse", mesh=MESH).objective.placement.words
    return chosen[::-1]


CASES = {
    f"{group} {name}": case
    for group, cases in {
        "widths:": WIDTHS,
        "mesh:": MESHES,
        "x:": FEATURES,
        "y:": TARGETS,
        "weight:": WEIGHTS,
        "params:": PARAMETERS,
        "strategy:": STRATEGIES,
        "gradients:": GRADIENTS,
        "curvature:": CURVATURES,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize(("call", "parts"), CASES.values(), ids=CASES)
def test_it_is_refused_with_name_value_and_way_out(call, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as refusal:
        call()
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("y", "weight"),
    [
        (np.eye(5, dtype=np.int32)[LABELS], None),
        (np.eye(5, dtype=np.int32)[LABELS], np.ones(4)),
        (LABELS * 1.0, None),
        (LABELS * 1.0, np.ones(4)),
        (LABELS[:2], np.ones(4)),
    ],
    ids=["one-hot", "one-hot, weighted", "float", "float, weighted", "too few"],
)
def test_traced_labels_of_wrong_shape_or_dtype_are_refused_too(y, weight):
    # On this mesh 4 samples of 4 features need no padding, as a placed batch needs none.
    mlp = api.MLP((4, 5))
    params = api.from_numpy(mlp, [(np.ones((5, 4)), np.ones(5))], MESH)
    train = api.value_and_grad(mlp, loss="cross_entropy", mesh=MESH)
    with pytest.raises(ValueError, match="y must"):
        jax.eval_shape(lambda x, y, weight: train(params, x, y, weight), np.ones((4, 4)), y, weight)


@pytest.mark.parametrize("x", [jnp.ones(()), jnp.ones(3), jnp.ones((4, 7))])
def test_traced_samples_of_wrong_shape_are_refused_too(x):
    train = api.value_and_grad(MODEL, loss="output", mesh=MESH)
    with pytest.raises(ValueError, match="x must have shape"):
        jax.eval_shape(lambda x: train(PARAMS, x), x)


@pytest.mark.parametrize("name", ["compute_dtype", "reduce_dtype"])
def test_float64_without_64_bit_types_is_refused(name):
    with jax.enable_x64(False), pytest.raises(ValueError, match=name) as refusal:
        api.Strategy(**{name: "float64"})
    for part in ("'float64'", "jax_enable_x64=False", "jax.config.update", "'float32'"):
        assert part in str(refusal.value)
