"""Rotate and round in one pass over a token, where numba is installed.

The same bytes and values as the form in torch (rotated.py), bit for bit: all sums are exact there,
and what is rounded is rounded in the same order here. For blocks of 64 on a CPU. Numba compiles
each function at its first call, which takes a second or two; nothing is read from a cache.
"""

# Shapes:  N tokens   D values of a token, a multiple of 64

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from numba import njit
except ImportError:
    njit = None

__all__ = ["IS_HERE", "decode", "encode", "sums"]

IS_HERE = njit is not None
"""Whether numba is installed."""

# Adding and taking away rounds to whole numbers, halves to even, below 2^22.
_WHOLE = np.float32(1.5 * 2**23)
_LARGEST = np.float32(2**20 - 1)


def _jit(**options: Any) -> Any:
    kept = {"nogil": True, "error_model": "numpy"} | options
    return njit(**kept) if njit is not None else lambda function: function


# Only sums of float64 may be taken in any order.
@_jit(fastmath={"reassoc"})
def sums(x_ND, mean_D, offset_D, half, squares_N, is_sink_N):  # type: ignore[no-untyped-def]
    """Write each token's squared length, and whether it is nearer to mean + offset than to mean.

    Args:
        x_ND: Tokens.
        mean_D: What is subtracted.
        offset_D: What is subtracted from sinks besides.
        half: Half of the offset's squared length.
        squares_N: Written: squared lengths of what is left.
        is_sink_N: Written: which tokens are sinks.
    """
    for n in range(x_ND.shape[0]):
        square, along = 0.0, 0.0
        for i in range(x_ND.shape[1]):
            left = np.float64(x_ND[n, i] - mean_D[i])
            square += left * left
            along += left * offset_D[i]
        is_sink_N[n] = along > half
        if along > half:
            square = 0.0
            for i in range(x_ND.shape[1]):
                left = np.float64((x_ND[n, i] - mean_D[i]) - offset_D[i])
                square += left * left
        squares_N[n] = square


@_jit(inline="always")
def _quartered(a_D, b_D):  # type: ignore[no-untyped-def]
    """Take two of the six steps of Hadamard's transform; three times are one."""
    for block in range(a_D.size // 64):
        first = block * 64
        for i in range(16):
            u0, u1 = a_D[first + i], a_D[first + 16 + i]
            u2, u3 = a_D[first + 32 + i], a_D[first + 48 + i]
            v0, v1, v2, v3 = u0 + u2, u1 + u3, u0 - u2, u1 - u3
            b_D[first + 4 * i] = v0 + v1
            b_D[first + 4 * i + 1] = v0 - v1
            b_D[first + 4 * i + 2] = v2 + v3
            b_D[first + 4 * i + 3] = v2 - v3


@_jit()
def encode(x_ND, mean_D, offset_D, is_sink_N, factor_N, signs_D, edges, code_ND):  # type: ignore[no-untyped-def]
    """Write the codes of tokens.

    Args:
        x_ND: Tokens.
        mean_D: What is subtracted.
        offset_D: What is subtracted from sinks besides.
        is_sink_N: Which tokens are sinks.
        factor_N: Makes whole numbers of what is left.
        signs_D: What comes before Hadamard's matrix.
        edges: At which place above the grid's middle each further level begins.
        code_ND: Written.
    """
    tokens, values = x_ND.shape
    a_D, b_D = np.empty(values, np.float32), np.empty(values, np.float32)
    place_D, code_D = np.empty(values, np.int16), np.empty(values, np.uint8)
    levels = edges.size + 1
    for n in range(tokens):
        factor = factor_N[n]
        if is_sink_N[n]:
            for i in range(values):
                left = (x_ND[n, i] - mean_D[i]) - offset_D[i]
                a_D[i] = (left * signs_D[i] * factor + _WHOLE) - _WHOLE
        else:
            for i in range(values):
                left = x_ND[n, i] - mean_D[i]
                a_D[i] = (left * signs_D[i] * factor + _WHOLE) - _WHOLE
        _quartered(a_D, b_D)
        _quartered(b_D, a_D)
        _quartered(a_D, b_D)
        for i in range(values):
            size = b_D[i] if b_D[i] >= 0 else np.float32(-1) - b_D[i]
            size = size if size < _LARGEST else _LARGEST
            place_D[i] = np.int16(np.int32(size) >> np.int32(9))
            code_D[i] = np.uint8(levels)
        for edge in edges:
            for i in range(values):
                code_D[i] += np.uint8(place_D[i] >= edge)
        for i in range(values):
            code_ND[n, i] = code_D[i] if b_D[i] >= 0 else np.uint8(2 * levels - 1) - code_D[i]


@_jit()
def decode(code_ND, told, signs_D, factor_N, is_sink_N, mean_D, offset_D, out_ND):  # type: ignore[no-untyped-def]
    """Write the tokens whose codes these are.

    Args:
        code_ND: As `encode` wrote them.
        told: What each code stands for.
        signs_D: What comes behind Hadamard's matrix.
        factor_N: The tokens' own sizes.
        is_sink_N: Which tokens are sinks.
        mean_D: What is added.
        offset_D: What is added to sinks besides.
        out_ND: Written.
    """
    tokens, values = out_ND.shape
    a_D, b_D = np.empty(values, np.float32), np.empty(values, np.float32)
    for n in range(tokens):
        for i in range(values):
            a_D[i] = told[code_ND[n, i]]
        _quartered(a_D, b_D)
        _quartered(b_D, a_D)
        _quartered(a_D, b_D)
        factor = factor_N[n]
        for i in range(values):
            out_ND[n, i] = b_D[i] * (signs_D[i] * factor) + mean_D[i]
        if is_sink_N[n]:
            for i in range(values):
                out_ND[n, i] += offset_D[i]
