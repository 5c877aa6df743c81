"""A5: undo a secret bottom or a secret rotation with a few texts whose tokens are known.

A server that knows some of the plaintext (a template, its own account's requests) has pairs of
what was sent and what the public bottom would send. A linear fit between them turns everything
else that was sent into what the public bottom would have sent, nearly, and A1 reads that.
"""

# Shapes:  N known tokens   T tokens   D width   R rank

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutlayer.audit.finding import Finding
from cutlayer.audit.forward_search import SearchSettings, forward_search
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError

__all__ = ["FITS", "Alignment", "align", "aligned_search"]

_RIDGE = 1e-2
_HELD_OUT = 4  # one known token of so many judges the fits


@dataclass(frozen=True)
class Alignment:
    """What turns received rows into public ones.

    Attributes:
        kind: Which of `FITS`.
        apply: From received rows, (T, D), to rows that are compared, (T, any).
        release: From the public bottom's rows, (T, D), to rows that are compared, (T, any).
        matched: Share of the known tokens which were not fitted whose row comes nearest to their
            own public one; None if the kind was given.
    """

    kind: str
    apply: Callable[[Tensor], Tensor] = field(repr=False)
    release: Callable[[Tensor], Tensor] = field(repr=False)
    matched: float | None = None


def _ridge(received_ND: Tensor, public_ND: Tensor) -> Alignment:
    """Fit the public rows."""
    return _linear("ridge", received_ND, public_ND, torch.zeros_like(received_ND))


def _residual(received_ND: Tensor, public_ND: Tensor) -> Alignment:
    """Fit the difference: few tokens suffice where the secret bottom is near the public one."""
    return _linear("residual", received_ND, public_ND, received_ND)


def _linear(kind: str, received_ND: Tensor, public_ND: Tensor, kept_ND: Tensor) -> Alignment:
    """Fit public - kept by ridge regression, and weigh each element by how well that does."""
    mean_D, wanted_D = received_ND.mean(0), (public_ND - kept_ND).mean(0)
    known_ND, wanted_ND = received_ND - mean_D, public_ND - kept_ND - wanted_D
    gram_DD = known_ND.T @ known_ND
    gram_DD.diagonal().add_(_RIDGE * received_ND.square().mean() * len(received_ND))
    map_DD = torch.linalg.solve(gram_DD, known_ND.T @ wanted_ND)
    # With fewer tokens than elements a fit meets the known ones exactly. What it leaves over of a
    # token that it has not seen follows in closed form.
    leverage_N = (known_ND * torch.linalg.solve(gram_DD, known_ND.T).T).sum(1)
    left_ND = (wanted_ND - known_ND @ map_DD) / (1 - leverage_N - 1 / len(known_ND))[:, None]
    error_D = left_ND.square().mean(0)
    weight_D = ((error_D + error_D.mean()) / error_D.mean().clamp(min=1e-30)).rsqrt()

    def apply(rows_TD: Tensor) -> Tensor:
        fitted_TD = (rows_TD.double() - mean_D) @ map_DD + wanted_D
        kept_TD = rows_TD if kind == "residual" else torch.zeros_like(rows_TD)
        return ((kept_TD + fitted_TD) * weight_D).to(rows_TD)

    return Alignment(kind, apply, lambda rows_TD: rows_TD * weight_D.to(rows_TD))


def _rotation(received_ND: Tensor, public_ND: Tensor) -> Alignment:
    """Solve the orthogonal Procrustes problem on the directions that the known tokens span."""
    left_DD, values_D, right_DD = torch.linalg.svd(received_ND.T @ public_ND)
    rank = min(int((values_D > 1e-9 * values_D[0]).sum()), len(received_ND))
    left_DR, right_DR = left_DD[:, :rank], right_DD[:rank].T
    return Alignment(
        "rotation",
        lambda rows_TD: rows_TD @ left_DR.to(rows_TD),
        lambda rows_TD: rows_TD @ right_DR.to(rows_TD),
    )


FITS: dict[str, Callable[[Tensor, Tensor], Alignment]] = {
    "residual": _residual,
    "rotation": _rotation,
    "ridge": _ridge,
}


def align(received_ND: Tensor, public_ND: Tensor, fit: str = "best") -> Alignment:
    """Return the map from received to public rows that known pairs of them show.

    Args:
        received_ND: What was received of known tokens.
        public_ND: What the public bottom sends for them.
        fit: One of `FITS`, or `best` for the one that does best on a part that is held out.

    Raises:
        ConfigError: If the fit is unknown.
        DataError: If the pairs do not match or are too few.
    """
    if fit != "best" and fit not in FITS:
        raise ConfigError(f"fit '{fit}' is unknown: use best or one of {', '.join(FITS)}")
    if received_ND.shape != public_ND.shape or len(received_ND) < 2 * _HELD_OUT:
        raise DataError(
            f"{len(received_ND)} received and {len(public_ND)} public rows are no basis for an "
            f"alignment: give as many of both, and {2 * _HELD_OUT} at least"
        )
    received_ND, public_ND = received_ND.double(), public_ND.double()
    if fit != "best":
        return FITS[fit](received_ND, public_ND)
    held_N = torch.arange(len(received_ND), device=received_ND.device) % _HELD_OUT == 0
    tried = {
        name: _judged(
            make(received_ND[~held_N], public_ND[~held_N]), received_ND, public_ND, held_N
        )
        for name, make in FITS.items()
    }
    best = max(tried, key=lambda name: tried[name])
    return replace(FITS[best](received_ND, public_ND), matched=tried[best][0])


def _judged(
    found: Alignment, received_ND: Tensor, public_ND: Tensor, held_N: Tensor
) -> tuple[float, float]:
    """Return the share of held-out rows that come nearest to their own, and how near they come."""
    wanted_NR, came_MR = found.release(public_ND), found.apply(received_ND[held_N])
    own_M = torch.nonzero(held_N)[:, 0]
    matched = torch.cdist(came_MR, wanted_NR).argmin(1) == own_M
    spread = (wanted_NR - wanted_NR.mean(0)).square().mean().clamp(min=1e-30)
    left = (came_MR - wanted_NR[held_N]).square().mean() / spread
    return float(matched.double().mean()), -float(left)


@torch.no_grad()
def aligned_search(
    public: PublicModel,
    smashed: Sequence[Tensor],
    truth: Sequence[Tensor],
    known_smashed: Sequence[Tensor],
    known: Sequence[Tensor],
    settings: SearchSettings | None = None,
    *,
    fit: str = "best",
    known_tokens: int = 256,
    params: dict[str, Any] | None = None,
    **how: Any,
) -> Finding:
    """Return what forward search reads after an alignment on known plaintext.

    Args:
        public: The model whose bottom the secret one is made from.
        smashed: What was received of each text to read, (T, D).
        truth: The tokens of each, (T,).
        known_smashed: What was received of each known text, (T, D).
        known: The tokens of each, (T,).
        settings: How to search; no distance is taken for a proof (`eps` is 0) unless it is set.
        fit: One of `FITS`, or `best`.
        known_tokens: How many of the known tokens to use at most.
        params: More of how it was run, for the finding.
        how: Handed on to `forward_search`.

    Raises:
        ConfigError: As `forward_search` and `align`, and if `settings` say what was done.
        DataError: If texts and activations are not of the same length, or too few are known.
        NotFinite: If what was received is not finite.
    """
    settings = settings or SearchSettings()
    if settings.release is not None or settings.sigma is not None:
        raise ConfigError(
            "an alignment finds out what was done to the activations: leave release and sigma out"
        )
    if [len(rows) for rows in known_smashed] != [len(ids) for ids in known] or not len(known):
        raise DataError(
            f"{len(known_smashed)} known sequences of activations do not match {len(known)} known "
            "texts token by token: give each text with its own activations, without padding"
        )
    public_ND = torch.cat([public.bottom(ids_T[None].to(public.device))[0] for ids_T in known])
    received_ND = torch.cat(list(known_smashed)).to(public_ND)
    found = align(received_ND[:known_tokens], public_ND[:known_tokens], fit)
    settings = replace(settings, release=found.release, eps=settings.eps or 0.0)
    used = min(known_tokens, len(public_ND))
    facts = {"fit": found.kind, "known_tokens": used, "fit_matched": found.matched}
    mapped = [found.apply(rows_TD.to(public_ND)) for rows_TD in smashed]
    how |= {"attack": "A5", "params": {**facts, **(params or {})}}
    return forward_search(public, mapped, truth, settings, **how)
