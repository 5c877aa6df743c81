"""How much forward search reads at other cuts, through codecs and through noise."""

# Shapes:  N rows   D model width

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cutlayer.audit.battery import Rows
from cutlayer.audit.candidates import CandidateTable
from cutlayer.audit.finding import Finding
from cutlayer.audit.forward_search import SearchSettings, forward_search
from cutlayer.audit.public import PublicModel
from cutlayer.audit.search import Prior
from cutlayer.audit.traffic import made_here, texts_of
from cutlayer.wire.codecs import round_trip

__all__ = ["by_codec", "by_depth", "by_noise"]

SEARCHED_CODECS = ("raw", "bf16", "int8", "rotated4")
NOISE = (0.1, 0.3, 1.0, 3.0)
"""Standard deviations of noise over the root mean square of the activations."""


def by_depth(
    model: str, rows: Rows, depths: Sequence[int], *, revision: str | None = None
) -> dict[str, Any]:
    """Search at several depths of the lower cut, without defense."""
    points = []
    for depth in depths:
        public = PublicModel.load(model, bottom_layers=depth, top_layers=0, revision=revision)
        points.append(_point(depth, _read(public, rows, CandidateTable(public))))
    return {"axis": "layers below the cut", "points": points}


def by_codec(public: PublicModel, table: CandidateTable, rows: Rows) -> dict[str, Any]:
    """Search through codecs of 32 to 4 bits, which are known to all."""
    points = []
    for name in SEARCHED_CODECS:
        release = functools.partial(round_trip, name)
        settings = None if name == "raw" else SearchSettings(score="quant", release=release)
        points.append(_point(name, _read(public, rows, table, settings, release)))
    return {"axis": "codec", "points": points}


def by_noise(
    public: PublicModel, table: CandidateTable, rows: Rows, prior: Prior | None = None
) -> dict[str, Any]:
    """Search through Gaussian noise of several strengths, which the attacker knows."""
    points = []
    generator = torch.Generator().manual_seed(0)
    for strength in NOISE:
        rms = float(
            texts_of(made_here(public, rows, gradients=False))[0].smashed_TD.square().mean().sqrt()
        )

        def noisy(rows_ND: Tensor, _sigma: float = strength * rms) -> Tensor:
            return rows_ND + _sigma * torch.randn(rows_ND.shape, generator=generator)

        settings = SearchSettings(
            score="map" if prior else "l2",
            sigma=strength * rms,
            beams=4 if prior else 1,
            rungs=(256, 4096),
        )
        found = _read(public, rows, table, settings, noisy, prior)
        points.append(_point(strength, found))
    return {"axis": "noise over signal", "points": points}


def _read(
    public: PublicModel,
    rows: Rows,
    table: CandidateTable | None,
    settings: SearchSettings | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
    prior: Any = None,
) -> Finding:
    texts = texts_of(made_here(public, rows, gradients=False))
    if change is not None:
        texts = [dataclasses.replace(t, smashed_TD=change(t.smashed_TD)) for t in texts]
    return forward_search(
        public,
        [text.smashed_TD for text in texts],
        [text.ids_T for text in texts],
        settings,
        prior=prior,
        table=table,
    )


def _point(x: Any, found: Finding) -> dict[str, Any]:
    low, high = found.trr_ci
    return {
        "x": x,
        "trr": found.trr,
        "low": low,
        "high": high,
        "prior": found.prior_trr,
        "sequences": found.sequences,
        "tokens": found.tokens,
    }
