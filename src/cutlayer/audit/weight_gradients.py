"""Read the tokens from gradients of weights (A6): they lie in the span of what a layer was given.

The gradient of a linear layer is a sum over positions of (what came back)(what went in)', so its
rows span the inputs, if there are fewer positions than directions. A candidate input that lies in
the span was there. Of a LoRA pair the gradient of A has the same rows, but no more of them than
its rank: fewer than there are positions, and the span proves nothing.
"""

# Shapes:  B batch   T tokens   D width of a layer's input   O rows of a gradient   R rank
#          N candidates

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.audit.finding import Finding, Recovered
from cutlayer.audit.metrics import finding_of
from cutlayer.audit.public import PublicModel
from cutlayer.errors import DataError

__all__ = [
    "LayerGradients",
    "Matched",
    "discrete_moves",
    "gradient_span",
    "lamp_distance",
    "match_gradients",
    "span_distance",
    "span_of",
    "span_search",
    "tag_distance",
]

_CANDIDATES_AT_ONCE = 4096
_PREFIXES_AT_ONCE = 2048


@dataclass(frozen=True)
class LayerGradients:
    """The gradients of linear layers that are given the same input, as query, key and value are."""

    module: str
    """Name of one of them in the public model."""
    gradients: tuple[Tensor, ...]
    """Of weights (out, D), or of LoRA's A (rank, D); of a Conv1D, as GPT-2 has it, transposed."""


def span_of(gradients: Sequence[Tensor], *, tolerance: float = 1e-6) -> Tensor:
    """Return an orthonormal basis of the inputs that these gradients are made of, (R, D).

    Layers that share an input are taken together: the ranks of their LoRA pairs then add up.

    Args:
        gradients: Of weights, (O, D) each.
        tolerance: Singular values below this share of the largest count as zero; in float32 the
            gradient's own rounding is near 1e-7.

    Raises:
        DataError: If they are all zero, as those of LoRA's A are while B is, or differ in width.
    """
    if len({gradient.shape[-1] for gradient in gradients}) != 1:
        raise DataError(
            f"gradients of widths {sorted({g.shape[-1] for g in gradients})} have no common input: "
            "give those of layers that are given the same"
        )
    # Each at its own scale: otherwise the largest decides what counts as zero in the others.
    scaled = [g.detach().double() for g in gradients if g.any()]
    if not scaled:
        raise DataError(
            "all gradients are zero, as those of LoRA's A are before its B has moved: take those "
            "of a later step"
        )
    rows_OD = torch.cat([g / torch.linalg.matrix_norm(g, 2) for g in scaled])
    _left, values_R, basis_RD = torch.linalg.svd(rows_OD, full_matrices=False)
    return basis_RD[values_R > tolerance * values_R[0]]


def span_distance(basis_RD: Tensor, candidates_ND: Tensor) -> Tensor:
    """Return what part of each candidate lies outside the span, as a ratio of norms, (N,)."""
    candidates_ND = candidates_ND.to(basis_RD)
    outside_ND = candidates_ND - (candidates_ND @ basis_RD.T) @ basis_RD
    return outside_ND.norm(dim=1) / candidates_ND.norm(dim=1).clamp_min(1e-30)


def span_search(
    public: PublicModel,
    layers: Sequence[LayerGradients],
    *,
    max_tokens: int,
    first_tolerance: float = 1e-5,
    tolerance: float = 1e-3,
    max_prefixes: int = 64,
    span_tolerance: float = 1e-6,
) -> list[list[int]]:
    """Return the texts whose inputs lie in the spans of the layers' gradients (DAGER).

    The first layer says which tokens stand at which position; where its input does not depend on
    the position, only which tokens there are. The others say which of them follow each other. The
    last token of a text, which carries no label, leaves no trace in gradients and is not found.

    Args:
        public: The public weights, with a bottom that has these layers.
        layers: The first attention layer's gradients, then those of later ones.
        max_tokens: How many positions to search.
        first_tolerance: Largest distance at the first layer.
        tolerance: Largest distance at the others.
        max_prefixes: How many of the nearest to go on with.
        span_tolerance: As `span_of` has it.

    Raises:
        DataError: If gradients are all zero or of different widths.

    References:
        Petrov et al., DAGER, NeurIPS 2024, https://arxiv.org/abs/2405.15586
    """
    names = [layer.module for layer in layers]
    spans = [span_of(layer.gradients, tolerance=span_tolerance) for layer in layers]
    found: list[list[int]] = []
    prefixes: list[list[int]] = [[]]
    at_position = _candidates(public, names[0], spans[0], first_tolerance)
    for position in range(max_tokens):
        tokens = at_position(position)
        tried = [[*prefix, token] for prefix, token in itertools.product(prefixes, tokens)]
        kept = _in_later_spans(public, names[1:], spans[1:], tried, tolerance)[:max_prefixes]
        heads = {tuple(prefix[:-1]) for prefix in kept}
        found += [prefix for prefix in prefixes if prefix and tuple(prefix) not in heads]
        prefixes = kept
        if not kept:
            break
    return found + prefixes


def _candidates(
    public: PublicModel, name: str, basis_RD: Tensor, tolerance: float
) -> Callable[[int], list[int]]:
    """Return a function from a position to the tokens that the first layer's span allows there."""

    @torch.no_grad()
    def inputs(ids_N: Tensor, position: int) -> Tensor:
        where_N1 = torch.full((len(ids_N), 1), position, device=public.device)
        (given_N1D,) = public.inputs_to([name], ids_N.unsqueeze(1), position_ids=where_N1)
        return given_N1D.squeeze(1)

    vocabulary_V = torch.arange(public.vocabulary, device=public.device)
    same_everywhere = torch.equal(inputs(vocabulary_V[:8], 0), inputs(vocabulary_V[:8], 1))
    known: dict[int, list[int]] = {}

    def at(position: int) -> list[int]:
        position = 0 if same_everywhere else position
        if position not in known:
            distances = [
                span_distance(basis_RD, inputs(piece_N, position))
                for piece_N in vocabulary_V.split(_CANDIDATES_AT_ONCE)
            ]
            known[position] = (torch.cat(distances) < tolerance).nonzero().squeeze(1).tolist()
        return known[position]

    return at


@torch.no_grad()
def _in_later_spans(
    public: PublicModel,
    names: Sequence[str],
    spans: Sequence[Tensor],
    tried: Sequence[list[int]],
    tolerance: float,
) -> list[list[int]]:
    """Return the prefixes whose last input lies in the span of each later layer, nearest first."""
    if not tried or not names:
        return list(tried)
    distances = []
    for start in range(0, len(tried), _PREFIXES_AT_ONCE):
        ids_NT = torch.tensor(tried[start : start + _PREFIXES_AT_ONCE], device=public.device)
        given = public.inputs_to(names, ids_NT)
        each = [
            span_distance(basis_RD, inputs_NTD[:, -1])
            for basis_RD, inputs_NTD in zip(spans, given, strict=True)
        ]
        distances.append(torch.stack(each).amax(0))
    distance_N = torch.cat(distances)
    order = distance_N.argsort().tolist()
    return [tried[n] for n in order if distance_N[n] < tolerance]


def gradient_span(
    public: PublicModel,
    layers: Sequence[LayerGradients],
    truth: Sequence[Sequence[int]],
    *,
    max_tokens: int | None = None,
) -> Finding:
    """Return what the gradients of the bottom's weights give away of a batch's texts (A6).

    Each text is held against the found one that agrees with it most. Of a text's tokens all but
    the last are asked for.

    Raises:
        DataError: If gradients are all zero or of different widths.
    """
    begun = time.monotonic()
    asked = [tuple(text[:-1]) for text in truth]
    found = span_search(public, layers, max_tokens=max_tokens or max(map(len, asked)))
    recovered = []
    for text in asked:
        best = max(found, key=lambda one: _agreeing(text, one), default=[])
        guess = (*best[: len(text)], *[-1] * (len(text) - len(best)))
        recovered.append(Recovered(text, guess))
    ranks = [len(span_of(layer.gradients)) for layer in layers]
    return finding_of(
        "A6",
        "adapter",
        recovered,
        seconds=time.monotonic() - begun,
        params={"layers": [layer.module for layer in layers]},
        extra={"ranks": ranks, "positions": sum(map(len, asked)), "texts_found": len(found)},
    )


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


@dataclass(frozen=True)
class Matched:
    """What gradient matching came to."""

    guesses: tuple[Tensor, ...]
    """The optimised inputs, as they were given."""
    distances: tuple[float, ...]
    """After each step."""


def tag_distance(found: Sequence[Tensor], target: Sequence[Tensor], *, l1: float = 0.01) -> Tensor:
    """Return TAG's distance of gradients: squares, and a share of absolute differences.

    References:
        Deng et al., TAG, EMNLP Findings 2021, https://arxiv.org/abs/2103.06819
    """
    differences = [a - b for a, b in zip(found, target, strict=True)]
    return torch.stack([d.square().sum() + l1 * d.abs().sum() for d in differences]).sum()


def lamp_distance(found: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Return LAMP's distance of gradients: one minus the cosine, averaged over layers.

    References:
        Balunović et al., LAMP, NeurIPS 2022, https://arxiv.org/abs/2202.08827
    """
    cosines = [
        torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        for a, b in zip(found, target, strict=True)
    ]
    return 1 - torch.stack(cosines).mean()


def match_gradients(
    gradients_of: Callable[..., Sequence[Tensor]],
    target: Sequence[Tensor],
    start: Sequence[Tensor],
    *,
    distance: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor] = tag_distance,
    steps: int = 300,
    lr: float = 0.09,
) -> Matched:
    """Look for inputs whose gradients are those that were seen (TAG; LAMP's continuous part).

    Kept for comparison with published figures: the span check needs no optimisation and is exact.

    Args:
        gradients_of: Given tensors like `start` (embeddings, and logits of labels), return the
            gradients of the weights, made with `create_graph=True`.
        target: The gradients that were seen.
        start: Where to begin.
        distance: Of two lists of gradients.
        steps: How many.
        lr: AdamW's learning rate.
    """
    guesses = [tensor.detach().clone().requires_grad_() for tensor in start]
    optimizer = torch.optim.AdamW(guesses, lr=lr, weight_decay=0.01)
    distances = []
    for _ in range(steps):
        loss = distance(gradients_of(*guesses), target)
        for guess, gradient in zip(guesses, torch.autograd.grad(loss, guesses), strict=True):
            guess.grad = gradient
        optimizer.step()
        distances.append(float(loss.detach()))
    return Matched(tuple(guess.detach() for guess in guesses), tuple(distances))


def discrete_moves(
    order: Sequence[int],
    score: Callable[[Sequence[int]], float],
    *,
    tries: int = 100,
    seed: int = 0,
) -> list[int]:
    """Return the best reordering of positions among random ones: LAMP's discrete part.

    The moves are: swap two positions, move one, move a span, put a prefix at the end.

    Args:
        order: The positions, or tokens, as they stand.
        score: Lower is better: the distance of gradients plus a share of a language model's loss.
        tries: How many moves to try, each from `order`.
        seed: Of the moves.

    References:
        Balunović et al., LAMP, NeurIPS 2022, 4.2, https://arxiv.org/abs/2202.08827
    """
    draw = random.Random(seed)  # noqa: S311  no secret
    best, best_score = list(order), score(order)
    if len(order) < 2:
        return best
    for _ in range(tries):
        moved = list(order)
        first, second = sorted(draw.sample(range(len(moved)), 2))
        match draw.randrange(4):
            case 0:
                moved[first], moved[second] = moved[second], moved[first]
            case 1:
                moved.insert(first, moved.pop(second))
            case 2:
                span, rest = moved[first:second], moved[:first] + moved[second:]
                at = draw.randrange(len(rest) + 1)
                moved = rest[:at] + span + rest[at:]
            case _:
                moved = moved[second:] + moved[:second]
        moved_score = score(moved)
        if moved_score < best_score:
            best, best_score = moved, moved_score
    return best
