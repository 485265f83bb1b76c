"""A hash of parameters at logical widths: the same on every mesh and in every file.

    sha256 of, for W_1, b_1, W_2, b_2, ... in turn:
        a line of text, "<dtype> <shape>", for example "float32 [12, 17]" and a line feed;
        the array's bytes, row by row, little-endian.

It is a hash of bits, not of values: 0.0 and -0.0 differ, two NaNs agree only with equal bits, and
float32 differs from float64 of the same numbers. A layer without bias adds nothing for it.
"""

import hashlib

import numpy as np

from tpmlp.model import MLP, Arrays, Params
from tpmlp.models import check_is_chain
from tpmlp.parameters import to_numpy


def parameter_hash(model: MLP, params: Params) -> str:
    """Return the hash of parameters, or gradients, whatever mesh and layout they are on.

    Args:
        model: the model; its widths say what is padding. Its activation is not in the hash.
        params: as the model's parameters, on any mesh.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: parameters of another model, or arrays that no mesh has.

    Examples:
        >>> import tpmlp
        >>> mlp, arrays = MLP((2, 1)), [(np.float32([[1, -2]]), np.float32([0.5]))]
        >>> meshes = tpmlp.make_mesh(x=1), tpmlp.make_mesh(x=4, y=2)
        >>> [parameter_hash(mlp, tpmlp.from_numpy(mlp, arrays, mesh))[:16] for mesh in meshes]
        ['cb5cc53aa46c19d1', 'cb5cc53aa46c19d1']
    """
    check_is_chain(model, "parameter_hash")
    return hash_arrays(to_numpy(model, params))


def hash_arrays(arrays: Arrays) -> str:
    """Return the hash of arrays of logical widths, as `to_numpy` gives them."""
    digest = hashlib.sha256()
    for array in (a for layer in arrays for a in layer if a is not None):
        digest.update(f"{array.dtype.name} {list(array.shape)}\n".encode())
        digest.update(_little_endian(array).data)
    return digest.hexdigest()


def _little_endian(array: np.ndarray) -> np.ndarray:
    size = array.dtype.itemsize
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return native.view(f"u{size}").astype(f"<u{size}", copy=False)
