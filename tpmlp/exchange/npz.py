"""Weights as a .npz of NumPy: W_1, b_1, W_2, b_2, ... at logical widths, and no pickle.

Loading looks at the names in the archive, then at the header of each array, and reads data only
when all of it fits the model. NumPy has no bfloat16: such an array is there as two bytes a number
(dtype V2), which is how np.savez writes one, and is read as bfloat16 again.
"""

import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.lib import format as npy

from tpmlp.exchange.files import check_file, written_whole
from tpmlp.exchange.tensors import (
    Names,
    Tensor,
    check_dtypes,
    check_names,
    check_once,
    check_tensors,
    shown,
    usable,
)
from tpmlp.model import MLP, Arrays, Params
from tpmlp.models import check_is_chain
from tpmlp.parameters import from_numpy, to_numpy
from tpmlp.strategy import Strategy

# What zipfile, its decompressors and NumPy raise for bytes that are no archive or no array.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
    tokenize.TokenError,
)
# NumPy's own take about 80. It evaluates a header as Python's literals, and long ones exhaust that.
_MAX_HEADER_CHARACTERS = 1000
_BFLOAT16 = np.dtype("V2")


def save_npz(model: MLP, params: Params, path: Any) -> None:
    """Write parameters as a .npz, for programs that have NumPy alone.

    The file at path is replaced when the new one is whole. Every process calls this; the first
    one writes.

    Args:
        model: the model.
        params: its parameters, on any mesh.
        path: of the file, as it is to be; its folder must be there.

    Raises:
        ValueError: parameters of another model or of several dtypes, or no path for a file.
    """
    check_is_chain(model, "save_npz")
    arrays = to_numpy(model, params)
    check_dtypes(arrays)
    names = [name for pair in _names(model) for name in pair]
    pairs = zip(names, (a for layer in arrays for a in layer), strict=True)
    if jax.process_index() == 0:
        # Given a name rather than a file, np.savez would add a suffix.
        with written_whole(path) as temporary, temporary.open("wb") as file:
            found = {name: array for name, array in pairs if array is not None}
            np.savez(file, allow_pickle=False, **found)


def load_npz(
    model: MLP,
    path: Any,
    mesh: Mesh,
    *,
    strategy: Strategy | None = None,
    ignore: Collection[str] = (),
) -> Params:
    """Read weights from a .npz, compressed or not, and place them.

    Args:
        model: the model; its widths and bias say what must be in the file.
        path: of the file.
        mesh: the mesh.
        strategy: Strategy() by default.
        ignore: names of other arrays that the file may have: ("mean", "scale") for that of
            `make train`.

    Returns:
        Parameters in the file's dtype; float16 becomes float32, which has all its numbers.

    Raises:
        ValueError: names the array that is missing, extra, twice there, misshapen, of another
            dtype or damaged; or says what is wrong with the file.
    """
    return from_numpy(model, read_npz(model, path, ignore), mesh, strategy=strategy)


def read_npz(model: MLP, path: Any, ignore: Collection[str] = ()) -> Arrays:
    """Read a file into arrays of logical widths; no data is read before all is checked."""
    check_is_chain(model, "load_npz")
    path, names = check_file(path), _names(model)
    with _readable(path, "its list of arrays"):
        archive = zipfile.ZipFile(path)
    with archive:
        found = [name.removesuffix(".npy") for name in archive.namelist()]
        check_once(path, found)
        found = [name for name in found if name not in ignore]
        check_names(path, model, found, names)
        check_tensors(path, model, {name: _header(path, archive, name) for name in found}, names)
        pairs = [
            (_read(path, archive, W), _read(path, archive, b) if model.bias else None)
            for W, b in names
        ]
    return usable(pairs)


def _names(model: MLP) -> Names:
    return [(f"W_{l}", f"b_{l}") for l in range(1, model.num_layers + 1)]


def _header(path: Path, archive: zipfile.ZipFile, name: str) -> Tensor:
    with _member(path, archive, name) as file:
        # Version 3 differs in the names of fields, which these arrays have none of.
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        version = npy.read_magic(file)
        if version not in read:
            raise ValueError(f"version {version} of the format")
        shape, _, dtype = read[version](file, max_header_size=_MAX_HEADER_CHARACTERS)
    return Tensor(shape, "bfloat16" if dtype == _BFLOAT16 else dtype.newbyteorder("=").name)


def _read(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array whose header is known to fit, in the machine's byte order."""
    with _member(path, archive, name) as file:
        array = npy.read_array(file, allow_pickle=False)
        # Only at a member's end does zipfile compare its checksum.
        if file.read(1):
            raise ValueError("more bytes than its shape has")
    if array.dtype == _BFLOAT16:
        return array.view(jnp.bfloat16)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


@contextmanager
def _member(path: Path, archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    with _readable(path, f"tensor {name}"), archive.open(f"{name}.npy") as file:
        yield file


@contextmanager
def _readable(path: Path, part: str) -> Iterator[None]:
    """Turn whatever the readers raise into one ValueError."""
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(
            f"path must be a .npz file of NumPy: got path={str(path)!r}, {part} cannot be read "
            f"({shown(error, most=200)}). It is damaged, or of another format."
        ) from error
