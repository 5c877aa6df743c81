"""How far what a candidate would have sent is from what was sent, whatever was done to it.

A secret that leaves distances, norms or sorted values as they are hides nothing: the attacker
compares just these. To add a score, add it to `SCORES`.

References:
    l2: Nikolaou et al., 2025, https://arxiv.org/abs/2510.15511
    sorted_l1, any_row: Thomas et al., 2025, https://arxiv.org/abs/2505.18332
    Noise of unknown strength: BeamClean, 2025, https://arxiv.org/abs/2505.13758
"""

# Shapes:  N candidates   R released rows   P positions before   D width   V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["GRAM_POSITIONS", "SCORES", "Distance", "fit_sigma"]

Distance = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From candidates (N, D), released rows (R, D), and for the last positions what the recovered
tokens send (P, D) and what was released there (P, D), to distances (N, R)."""

GRAM_POSITIONS = 8
"""How many positions before a candidate `gram` compares with it, at most."""


def _l2(sent_ND: Tensor, seen_RD: Tensor, _sent_PD: Tensor, _seen_PD: Tensor) -> Tensor:
    # By matrix products it would be faster, and wrong at the fourth digit where norms are large.
    return torch.cdist(sent_ND, seen_RD, compute_mode="donot_use_mm_for_euclid_dist")


def _sorted_l1(sent_ND: Tensor, seen_RD: Tensor, _sent_PD: Tensor, _seen_PD: Tensor) -> Tensor:
    return torch.cdist(sent_ND.sort(-1).values, seen_RD.sort(-1).values, p=1)


def _gram(sent_ND: Tensor, seen_RD: Tensor, sent_PD: Tensor, seen_PD: Tensor) -> Tensor:
    norms_NR = sent_ND.square().sum(-1)[:, None] - seen_RD.square().sum(-1)[None]
    products_NP, products_RP = sent_ND @ sent_PD.T, seen_RD @ seen_PD.T
    return norms_NR.abs() + torch.cdist(products_NP, products_RP, p=1)


SCORES: dict[str, Distance] = {
    "l2": _l2,
    "map": _l2,
    "sorted_l1": _sorted_l1,
    "any_row": _l2,
    "gram": _gram,
    "quant": _l2,
}
"""`map` adds the noise's strength and a language model's prior, `any_row` looks for the row among
all those that are not taken, `quant` compares after what is known to be done to a row."""


def fit_sigma(squared_NK: Tensor, width: int, *, steps: int = 50) -> float:
    """Return the standard deviation of Gaussian noise on rows of unknown tokens.

    Expectation maximisation of a mixture: a row is one of K known centres plus noise.

    Args:
        squared_NK: Squared distance of each row to its K nearest centres.
        width: How many elements a row has.
        steps: How many iterations.
    """
    squared_NK = squared_NK.double()
    variance = float(squared_NK.amin(1).mean()) / width
    for _ in range(steps):
        if variance <= 0:
            return 0.0
        weights_NK = torch.softmax(-squared_NK / (2 * variance), 1)
        variance = float((weights_NK * squared_NK).sum(1).mean()) / width
    return math.sqrt(variance)
