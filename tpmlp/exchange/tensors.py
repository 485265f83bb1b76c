"""Named tensors in a file, held against the layers of a model before any of them is read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpmlp.model import MLP, Arrays

# float16 is in files only: Adam's 1e-8 is 0 in it. It becomes float32, which has all its numbers.
DTYPES = ("float32", "bfloat16", "float64", "float16")

# Names come from the file: a hostile one must not fill the screen.
_SHOWN_NAMES = 8
_SHOWN_CHARACTERS = 60

Names = Sequence[tuple[str, str]]


class Tensor(NamedTuple):
    """What a file says of a tensor; the dtype by NumPy's name, or the file's where it has none."""

    shape: tuple[int, ...]
    dtype: str


def shown(text: object, most: int = _SHOWN_CHARACTERS) -> str:
    r"""Return what a file says for an error: cut to a sane length, control characters escaped.

    Examples:
        >>> shown("0.weight"), shown((4, 3)), shown("\x1b[31m" * 1000, most=4)
        ("'0.weight'", "'(4, 3)'", "'\\x1b[31'...")
    """
    text = str(text)
    return repr(text[:most]) + ("..." if len(text) > most else "")


def listed(names: Sequence[str]) -> str:
    """Return names for an error, the first few, each cut to a sane length.

    Examples:
        >>> listed(["0.weight", "0.bias"]), listed([])
        ("'0.weight', '0.bias'", 'none')
    """
    first = ", ".join(map(shown, names[:_SHOWN_NAMES]))
    more = len(names) - _SHOWN_NAMES
    return (first or "none") + (f" and {more} more" if more > 0 else "")


def check_once(path: Path, names: Iterable[str]) -> None:
    """Refuse a name that a file has twice: readers differ in which of the two they take."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"tensor {shown(name)} must be in {path} once: got it twice. Write the file again."
            )
        seen.add(name)


def check_names(path: Path, model: MLP, found: Sequence[str], names: Names) -> None:
    """Refuse names that are not exactly those of a model's tensors.

    Args:
        path: of the file, for the message.
        model: the model.
        found: the names in the file.
        names: what W_l and b_l must be called in it.

    Raises:
        ValueError: gives the tensors that are missing or extra.
    """
    wanted = {name: symbol for symbol, name, _ in _wanted(model, names)}
    extra = [name for name in found if name not in wanted]
    if extra:
        raise ValueError(
            f"tensors of {path} must be the model's and no others: got {listed(extra)} besides, "
            f"num_layers={model.num_layers}, bias={model.bias}. The file is of another model; or "
            "write one without them."
        )
    present = set(found)
    for name, symbol in wanted.items():
        if name not in present:
            raise ValueError(
                f"tensor {name} ({symbol}) must be in {path}: got {listed(found)}, "
                f"num_layers={model.num_layers}, bias={model.bias}. The file is of another model, "
                "or not whole."
            )


def check_tensors(path: Path, model: MLP, found: Mapping[str, Tensor], names: Names) -> None:
    """Refuse tensors, all of them there, that are not of a model's shapes or of one usable dtype.

    Args:
        path: of the file, for the message.
        model: the model.
        found: what the file says of each tensor.
        names: what W_l and b_l are called in it.

    Raises:
        ValueError: names the tensor.
    """
    first = names[0][0]
    for symbol, name, shape in _wanted(model, names):
        got = found[name]
        if got.shape != shape:
            found_shape = got.shape if len(got.shape) < 4 else f"of {len(got.shape)} dims"
            raise ValueError(
                f"tensor {name} ({symbol}) must have shape {shape}: got shape {found_shape} in "
                f"{path}, widths={model.widths}. {_remedy(got.shape, shape)}"
            )
        _check_dtype(path, name, got.dtype)
        if got.dtype != found[first].dtype:
            raise ValueError(
                f"tensors of {path} must have one dtype: got {first} of {found[first].dtype}, "
                f"{name} of {got.dtype}. Convert them and write the file again."
            )


def check_dtypes(arrays: Arrays) -> None:
    """Refuse to write what could not be read again: arrays of several dtypes, or of another."""
    dtypes = sorted({a.dtype.name for layer in arrays for a in layer if a is not None})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        raise ValueError(
            f"params must have one dtype of {DTYPES} to be written: got {', '.join(dtypes)}. "
            "Convert them first."
        )


def usable(arrays: Arrays) -> Arrays:
    """Return arrays in a type that one can train in: float16 as float32, others as they are."""
    return [(_widened(W), None if b is None else _widened(b)) for W, b in arrays]


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _wanted(model: MLP, names: Names) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (symbol, name, shape) of every tensor of a model, in order."""
    wanted = []
    for l, ((W, b), shape) in enumerate(zip(names, model.layer_shapes, strict=True), 1):
        wanted.append((f"W_{l}", W, shape))
        if model.bias:
            wanted.append((f"b_{l}", b, shape[:1]))
    return wanted


def _remedy(got: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if len(wanted) == 2 and got == wanted[::-1]:
        return "It is the transpose: W_l is [d_l, d_l-1], outputs first."
    return "W_l is [d_l, d_l-1], b_l is [d_l]."


def _check_dtype(path: Path, name: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"tensor {name} must have a dtype of {DTYPES}: got dtype={dtype} in {path}. Convert "
            "it and write the file again."
        )
    if jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)) != dtype:
        raise ValueError(
            f"tensor {name} must have a dtype that JAX has switched on: got dtype={dtype} in "
            f"{path}. Use jax.config.update('jax_enable_x64', True), or convert the file."
        )
