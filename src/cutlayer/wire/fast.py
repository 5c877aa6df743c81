"""Rotate and round in one pass over a token, by numba.

The same bits as the form in torch (rotated.py): its sums are exact, and what is rounded is rounded
in the same order here. For blocks of 64 on a CPU. Compiled at the first call, kept in no cache.
"""

# Shapes:  N tokens   R some of them   D values of a token, a multiple of 64

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

__all__ = ["decode", "encode", "sums"]

# Adding and taking away rounds to whole numbers, halves to even, below 2^22.
_WHOLE = np.float32(1.5 * 2**23)
_LARGEST = np.float32(2**20 - 1)


def _jit(**options: Any) -> Any:
    return njit(**({"nogil": True, "error_model": "numpy"} | options))


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
def encode(rows_R, x_ND, mean_D, offset_D, is_sink_N, factor_N, signs_D, edges, code_RD):  # type: ignore[no-untyped-def]
    """Write the codes of some tokens.

    Args:
        rows_R: Which.
        x_ND: Tokens.
        mean_D: What is subtracted.
        offset_D: What is subtracted from sinks besides.
        is_sink_N: Which tokens are sinks.
        factor_N: Makes whole numbers of what is left.
        signs_D: What comes before Hadamard's matrix.
        edges: At which place above the grid's middle each further level begins.
        code_RD: Written.
    """
    values, levels = x_ND.shape[1], edges.size + 1
    a_D, b_D = np.empty(values, np.float32), np.empty(values, np.float32)
    place_D, code_D = np.empty(values, np.int16), np.empty(values, np.uint8)
    for r in range(rows_R.size):
        x_D, factor = x_ND[rows_R[r]], factor_N[rows_R[r]]
        if is_sink_N[rows_R[r]]:
            for i in range(values):
                left = (x_D[i] - mean_D[i]) - offset_D[i]
                a_D[i] = (left * signs_D[i] * factor + _WHOLE) - _WHOLE
        else:
            for i in range(values):
                left = x_D[i] - mean_D[i]
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
            code_RD[r, i] = code_D[i] if b_D[i] >= 0 else np.uint8(2 * levels - 1) - code_D[i]


@_jit()
def decode(rows_R, code_RD, told, signs_D, factor_N, is_sink_N, mean_D, offset_D, out_ND):  # type: ignore[no-untyped-def]
    """Write the tokens whose codes these are.

    Args:
        rows_R: Which those are.
        code_RD: As `encode` wrote them.
        told: What each code stands for.
        signs_D: What comes behind Hadamard's matrix.
        factor_N: The tokens' own sizes.
        is_sink_N: Which tokens are sinks.
        mean_D: What is added.
        offset_D: What is added to sinks besides.
        out_ND: Written.
    """
    values = out_ND.shape[1]
    a_D, b_D = np.empty(values, np.float32), np.empty(values, np.float32)
    for r in range(rows_R.size):
        out_D, factor = out_ND[rows_R[r]], factor_N[rows_R[r]]
        for i in range(values):
            a_D[i] = told[code_RD[r, i]]
        _quartered(a_D, b_D)
        _quartered(b_D, a_D)
        _quartered(a_D, b_D)
        for i in range(values):
            out_D[i] = b_D[i] * (signs_D[i] * factor) + mean_D[i]
        if is_sink_N[rows_R[r]]:
            for i in range(values):
                out_D[i] += offset_D[i]
