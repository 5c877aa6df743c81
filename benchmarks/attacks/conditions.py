"""What is done to a tensor before it leaves: each codec of the wire, and each defense."""

# Shapes:  B batch   T tokens   D model width   N rows   V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.attacks.victim import Change
from cutlayer.audit.embedding import embedding_table, replay
from cutlayer.audit.finding import Finding, Recovered
from cutlayer.audit.metrics import finding_of
from cutlayer.audit.public import PublicModel
from cutlayer.privacy.defenses import Defense, defense_of
from cutlayer.privacy.mechanisms import ClippedGaussian
from cutlayer.wire.codecs import CODECS, round_trip
from cutlayer.wire.statics import Learner

__all__ = [
    "NOISES",
    "Noisy",
    "embedding_reading",
    "lossy_codecs",
    "noise_at_the_embedding",
    "through",
    "unclipped",
]

NOISES: dict[str, Callable[[], Defense]] = {
    "gaussian_0.5": lambda: defense_of("gaussian", nsr=0.5),
    "gaussian_2.0": lambda: defense_of("gaussian", nsr=2.0),
    "ldp_8": lambda: defense_of("ldp_sequence", clip=1.0, epsilon=8.0, delta=1e-6),
}
"""Defenses of activations at the cut."""


def lossy_codecs(kind: str) -> list[str]:
    """Return the codecs for `activations` or `gradients` that change them."""
    exact = ("raw", "int32")
    return [name for name, codec in CODECS.items() if kind in codec.carries and name not in exact]


@torch.no_grad()
def through(codec: str, public: PublicModel, texts: Sequence[Tensor]) -> Change:
    """Return what activations are behind a codec, once it has learnt from texts what it learns.

    A server has what a codec learnt: the client sends it.
    """
    statics = None
    if CODECS[codec].learns:
        sent = [public.bottom(ids_T[None]) for ids_T in texts]
        learner = Learner(sent[0].shape[-1], basis=CODECS[codec].learns == "basis")
        for sent_BTD in sent:
            learner.see(sent_BTD, {})
        statics = learner.learnt(getattr(CODECS[codec], "budget", 0.0))
    return lambda tensor: round_trip(codec, tensor, statics)


def unclipped(defense: Defense) -> Change:
    """Return what a text's rows are to a server that is told by how much they were clipped."""

    def defended(rows_TD: Tensor) -> Tensor:
        sent_TD = defense.apply(rows_TD[None])[0]
        if isinstance(defense, ClippedGaussian):
            sent_TD = sent_TD * (rows_TD.norm() / defense.clip).clamp_min(1)
        return sent_TD

    return defended


def noise_at_the_embedding(public: PublicModel, ratio: float) -> Defense:
    """Return metric privacy with noise of `ratio` times an embedding's length, on average."""
    table_VD = embedding_table(public)
    length = float(table_VD.norm(dim=1).median())
    return defense_of("metric_dp_embed", eta=table_VD.shape[1] / (ratio * length))


class Noisy:
    """A public model whose embeddings are defended; every call draws anew."""

    def __init__(self, public: PublicModel, defense: Defense) -> None:
        """Take both."""
        self._public, self._defense = public, defense
        self._table_VD = embedding_table(public)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._public, name)

    def bottom(self, ids_BT: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Return the activations that these tokens send up, (B, T, D), 0 at padding."""
        rows = []
        for row, ids_T in enumerate(ids_BT):
            length = len(ids_T) if attention_mask is None else int(attention_mask[row].sum())
            embedded_TD = self._table_VD[ids_T[:length]]
            rows.append(replay(self._public, self._defense.apply(embedded_TD[None])[0]))
        return pad_sequence(rows, batch_first=True)


@torch.no_grad()
def embedding_reading(public: PublicModel, texts: Sequence[Tensor], defense: Defense) -> Finding:
    """Return what a server reads that has undone the layers and sees the noisy embeddings.

    It takes the nearest embedding, which is the likeliest as noise of this kind falls off with its
    length. Nothing that a server has at any cut tells more of one token by itself.
    """
    table_VD = embedding_table(public)
    commonest = int(torch.cat([*texts]).mode().values)
    recovered = []
    for ids_T in texts:
        noisy_TD = defense.apply(table_VD[ids_T][None])[0]
        guess_T = torch.cdist(noisy_TD, table_VD).argmin(1)
        prior = (commonest,) * len(ids_T)
        recovered.append(Recovered(tuple(ids_T.tolist()), tuple(guess_T.tolist()), prior))
    return finding_of("A1", "activations", recovered, seconds=0.0)
