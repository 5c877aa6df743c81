#!/usr/bin/env python3
"""What secret shuffles, rotations, rounding and noise hide of a text: nearly nothing, measured.

The attack is a Python call on tensors; no server, no run and no configuration is needed. Who wants
to test another idea writes one more `hide` and says how the attacker compares. Example:

    python recipes/noise_and_permutation.py                  # a tiny random GPT-2, in seconds
    python recipes/noise_and_permutation.py .data/smollm2    # real weights, random tokens: minutes
"""

# Shapes:  T tokens   D model width   N rows

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cutlayer.audit.candidates import CandidateTable
from cutlayer.audit.forward_search import SearchSettings, forward_search
from cutlayer.audit.public import PublicModel

NOISE = (0.1, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
Hide = Callable[[Tensor], Tensor]


def tiny(folder: str) -> str:
    """Write a random GPT-2 to a folder."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1024, n_positions=64, n_embd=96, n_layer=4, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def permuted(rows_TD: Tensor) -> Tensor:
    """Shuffle the elements of each row, each in an order of its own."""
    return torch.stack([row_D[torch.randperm(len(row_D))] for row_D in rows_TD])


def rotated(rows_TD: Tensor) -> Tensor:
    """Rotate all rows alike, by a matrix that nobody else has."""
    return rows_TD @ torch.linalg.qr(torch.randn(rows_TD.shape[1], rows_TD.shape[1]))[0]


def rounded(bits: int) -> Hide:
    """Round each row over its own range; everybody knows how."""

    def hide(rows_ND: Tensor) -> Tensor:
        step_N1 = rows_ND.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
        return (rows_ND / step_N1).round() * step_N1

    return hide


def noisy(nsr: float) -> Hide:
    """Add Gaussian noise of `nsr` times the root mean square."""

    def hide(rows_TD: Tensor) -> Tensor:
        return rows_TD + nsr * rows_TD.square().mean().sqrt() * torch.randn_like(rows_TD)

    return hide


def ways() -> dict[str, tuple[Hide, SearchSettings]]:
    """Return what a client might do, and how an attacker who knows of it compares."""
    named: dict[str, tuple[Hide, SearchSettings]] = {
        "nothing": (lambda rows_TD: rows_TD, SearchSettings()),
        "permutation": (permuted, SearchSettings(score="sorted_l1")),
        "rotation": (rotated, SearchSettings(score="gram")),
    }
    for bits in (8, 4):
        hide = rounded(bits)
        named[f"int{bits}"] = (hide, SearchSettings(score="quant", release=hide))
    for nsr in NOISE:
        named[f"noise {nsr}"] = (noisy(nsr), SearchSettings(rungs=(256, 4096), eps=0.0))
    return named


def recoveries(model: str, *, texts: int = 4, tokens: int = 12) -> dict[str, float]:
    """Return the share of tokens that forward search reads through each."""
    public = PublicModel.load(model, bottom_layers=2, top_layers=1)
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(public.vocabulary, (texts, tokens), generator=generator)
    with torch.no_grad():
        sent = list(public.bottom(ids_NT))
    table, found = CandidateTable(public), {}
    torch.manual_seed(1)
    for name, (hide, settings) in ways().items():
        hidden = [hide(rows_TD) for rows_TD in sent]
        found[name] = forward_search(public, hidden, list(ids_NT), settings, table=table).trr
        print(f"{name:12s} {found[name]:6.1%}", flush=True)
    return found


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        recoveries(sys.argv[1] if len(sys.argv) > 1 else tiny(folder))


if __name__ == "__main__":
    main()
