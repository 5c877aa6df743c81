"""Small integers into bytes and back, a row of each token's by itself."""

# Shapes:  N tokens   P codes of a token, a multiple of 8

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["packed", "unpacked"]

# How many bits go together: 3 = 2 + 1, so that each part divides a byte.
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}


def packed(codes_NP: Tensor, bits: int) -> Tensor:
    """Return codes below 2^bits as bytes, (N, P * bits / 8).

    Values far apart share a byte, because whole slices are shifted faster than neighbours.
    """
    planes, low = [], 0
    for width in _PLANES[bits]:
        plane_NP = codes_NP >> low if low else codes_NP
        plane_NP = plane_NP & (2**width - 1) if low + width < bits else plane_NP
        slices = plane_NP.chunk(8 // width, dim=-1)
        byte = slices[-1] << (8 - width)
        for position, each in enumerate(slices[:-1]):
            byte |= each << (width * position) if position else each
        planes.append(byte)
        low += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


def unpacked(bytes_NQ: Tensor, bits: int) -> Tensor:
    """Return the codes that were packed, (N, P); any bytes are codes of something."""
    tokens, size = bytes_NQ.shape
    codes = size * 8 // bits
    out_NP: Tensor | None = None
    start = low = 0
    for width in _PLANES[bits]:
        end = start + codes * width // 8
        plane = bytes_NQ[:, start:end]
        shares = 8 // width
        found = torch.empty(tokens, shares, codes // shares, dtype=torch.uint8, device=plane.device)
        for position in range(shares):
            low_bits = plane >> (width * position) if position else plane
            if position < shares - 1:
                torch.bitwise_and(low_bits, 2**width - 1, out=found[:, position])
            else:
                found[:, position] = low_bits
        found_NP = found.view(tokens, codes)
        out_NP = found_NP if out_NP is None else out_NP | (found_NP << low)
        start, low = end, low + width
    assert out_NP is not None
    return out_NP
