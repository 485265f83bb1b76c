"""What users pass, checked once at the public boundary, before anything is compiled.

Every refusal is a ValueError that gives the name, the value and what to do. Functions that look
only at shape and dtype accept traced arrays too; those that look at values take NumPy arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def as_array(name: str, value: Any) -> Any:
    """Return value as an array, JAX's left as they are; refuse None and what has no numbers."""
    if value is None:
        raise ValueError(
            f"{name} must be given: got {name}=None. Pass an array with one row a sample."
        )
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{name} must have rows of one length and shape: got a {type(value).__name__} that "
            f"is no array ({error})."
        ) from error
    if array.dtype.kind not in "biuf" and array.dtype != jnp.bfloat16:
        raise ValueError(
            f"{name} must be an array of real numbers: got {name} of dtype {array.dtype}. "
            "Convert it first."
        )
    return array


def check_count(name: str, value: Any, remedy: str = "") -> int:
    """Return a positive integer, or refuse it and say what to do."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        remedy = remedy or f"Use for example {name}=8."
        raise ValueError(f"{name} must be a positive integer: got {name}={value!r}. {remedy}")
    return int(value)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False: got {name}={value!r}.")


def check_key(key: Any) -> None:
    """Refuse what is no key of jax.random."""
    if not isinstance(key, jax.Array):
        raise ValueError(
            f"key must be a key of jax.random: got key={key!r}. Use jax.random.key({key!r})."
        )


def check_positive(name: str, value: Any, remedy: str) -> Any:
    """Return a positive real number, infinity included, or refuse it; traced ones are let pass."""
    if isinstance(value, Tracer) and value.ndim == 0:
        return value
    number = not isinstance(value, bool | Tracer) and np.ndim(value) == 0
    number = number and np.asarray(value).dtype.kind in "iuf"
    if not number or not value > 0:
        raise ValueError(f"{name} must be a positive number: got {name}={value!r}. {remedy}")
    return value


# What one trains in. float16 would need its loss scaled.
DTYPES = ("bfloat16", "float32", "float64")


def check_dtype(name: str, dtype: Any) -> str:
    """Return the name of a dtype, or refuse one that is no type to train in, or switched off."""
    try:
        meant = jnp.dtype(dtype).name
    except TypeError:
        meant = None
    if meant not in DTYPES:
        remedy = "'float32', or 'bfloat16', which has its range and so needs no loss scaling"
        raise ValueError(f"{name} must be one of {DTYPES}: got {name}={dtype!r}. Use {remedy}.")
    if meant == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{name}='float64' must have 64-bit types: got jax_enable_x64=False. Call "
            "jax.config.update('jax_enable_x64', True) first, or use 'float32'."
        )
    return meant


def check_length(name: str, array: Any, num_samples: int) -> None:
    """Refuse an array that has not one row for each sample."""
    if array.ndim == 0 or array.shape[0] != num_samples:
        raise ValueError(
            f"{name} must have one row for each row of x: got {name} of shape {array.shape}, "
            f"x with {num_samples} rows."
        )


def check_labels(loss: str, y: Any, num_samples: int) -> Any:
    """Return integer labels [B], or refuse them."""
    y = as_array("y", y)
    if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"y must be integer labels of shape [B] for {loss}: got y of shape {y.shape} and "
            f"dtype {y.dtype}. Use y.astype(int), or argmax for one-hot rows."
        )
    check_length("y", y, num_samples)
    return y


def check_values(loss: str, y: Any, num_samples: int, num_outputs: int, *, name: str = "y") -> Any:
    """Return targets [B, C], or refuse them; [B] will do where C = 1."""
    y = as_array(name, y)
    check_length(name, y, num_samples)
    y = y[:, None] if y.ndim == 1 and num_outputs == 1 else y
    if y.shape != (num_samples, num_outputs):
        raise ValueError(
            f"{name} must have shape [B, d_out] = {(num_samples, num_outputs)} for {loss}: got "
            f"{name} of shape {y.shape}."
        )
    return y


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuse NaN and infinity, naming the first row that has one."""
    if array.dtype.kind in "biu" or np.isfinite(array).all():
        return
    finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    row = int(np.flatnonzero(~finite)[0])
    value = array[row][~np.isfinite(array[row])].flat[0] if array.ndim > 1 else array[row]
    raise ValueError(
        f"{name} must be finite: got {value} in row {row} of {name} "
        f"({int((~finite).sum())} such rows). Remove or fill them."
    )


def check_range(name: str, labels: np.ndarray, low: int, high: int) -> None:
    """Refuse integers outside low .. high, naming the first."""
    wrong = np.flatnonzero((labels < low) | (labels > high))
    if wrong.size:
        raise ValueError(
            f"{name} must be in {low} .. {high}: got {labels[wrong[0]]} in row {wrong[0]} "
            f"({wrong.size} such rows). Map the labels, or give the model more outputs."
        )


def check_weight(weight: np.ndarray) -> None:
    """Refuse sample weights that are negative, not finite, or all 0."""
    check_finite("weight", weight)
    least = np.unravel_index(np.argmin(weight), weight.shape)
    if weight[least] < 0 or not weight.any():
        raise ValueError(
            f"weight must be at least 0 and not all 0: got weight={weight[least]} in row "
            f"{least[0]}. Leave weight out to count every sample once."
        )
