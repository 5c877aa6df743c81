"""Read tokens off activations with a network that is trained on public text (A2).

The server runs the public bottom on any text that it likes, so it has as many pairs of text and
activations as it wants, and learns the way back. What a client does to its activations, the server
does to its own before it trains, with the same parameters: only the draw of the noise is secret.

Otherwise than in the published code, each stage of training has one optimizer whose gradients are
cleared at each step, and the best epoch is chosen on held-out public text, not on the victims. By
default the last layer is not a linear one over the tokens of the public text but a comparison with
the public embedding: it needs ten times less text, and reads tokens that no public text had.

References:
    SIP and its noise-aware mixture: Chen et al., CCS 2024, https://arxiv.org/abs/2409.00960
"""

# Shapes:  B batch   T tokens   D width of what is sent   V vocabulary   K tokens that are known
#          N rows

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cutlayer.audit.finding import Finding, Recovered
from cutlayer.audit.inverter_networks import GruInverter, MixtureInverter
from cutlayer.audit.inverter_training import (
    PUBLISHED_INVERTER,
    Batch,
    Defend,
    InverterSettings,
    Lesson,
    mask_of,
)
from cutlayer.audit.metrics import finding_of, unigram_prior
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError

__all__ = [
    "PUBLISHED_INVERTER",
    "Defend",
    "Inverter",
    "InverterSettings",
    "Noise",
    "add_gaussian",
    "invert",
    "learned_inversion",
    "train_inverter",
    "train_mixture",
]

Noise = Callable[[Tensor, float], Tensor]
"""Noise of a given strength on the activations of one text, (1, T, D)."""

_TEXTS_AT_ONCE = 32
_POSITIONS_AT_ONCE = 512


@dataclass(frozen=True)
class Inverter:
    """A trained way back from activations to tokens.

    Attributes:
        network: From activations and a mask to logits of the tokens that its head knows.
        seen_K: The tokens of the public text. A linear head knows these only, which keeps it small
            where a vocabulary has 49,152, and bounds what it can recover.
        commonest: The most frequent token of the public text: the best guess without traffic.
        vocabulary: How many tokens the model has.
        facts: How it was trained.
    """

    network: GruInverter | MixtureInverter
    seen_K: Tensor
    commonest: int
    vocabulary: int
    facts: dict[str, Any]

    @torch.no_grad()
    def known_logits(self, smashed_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return what it thinks of each token that it knows, (B, T, K).

        Args:
            smashed_BTD: Activations as they were sent.
            mask_BT: 1 where there is a token; padding stands at the right.

        Raises:
            DataError: If the activations are not as wide as those that it was trained on.
        """
        if smashed_BTD.shape[-1] != self.facts["sent_width"]:
            raise DataError(
                f"activations of width {smashed_BTD.shape[-1]} met an inverter that was trained on "
                f"width {self.facts['sent_width']}: train it with the defense that was in use"
            )
        if mask_BT is None:
            mask_BT = torch.ones(smashed_BTD.shape[:2], device=smashed_BTD.device)
        logits_BTK: Tensor = self.network(smashed_BTD.float(), mask_BT.bool())
        return logits_BTK

    def logits(self, smashed_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the same for every token, (B, T, V), with -inf for those that are not known."""
        known_BTK = self.known_logits(smashed_BTD, mask_BT)
        logits_BTV = known_BTK.new_full((*known_BTK.shape[:2], self.vocabulary), -torch.inf)
        logits_BTV[..., self.network.head.tokens_K] = known_BTK
        return logits_BTV


def invert(inverter: Inverter, smashed_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Return the token that each activation most likely carries, (B, T).

    Raises:
        DataError: If the activations are not as wide as those that it was trained on.
    """
    # A row of logits has up to V numbers, so a few texts at a time.
    rows = max(1, _POSITIONS_AT_ONCE // max(1, smashed_BTD.shape[1]))
    masks = [None] * -(-len(smashed_BTD) // rows) if mask_BT is None else mask_BT.split(rows)
    best = [
        inverter.known_logits(some_BTD, some_BT).argmax(-1)
        for some_BTD, some_BT in zip(smashed_BTD.split(rows), masks, strict=True)
    ]
    return inverter.network.head.tokens_K[torch.cat(best)]


def add_gaussian(smashed_BTD: Tensor, strength: float) -> Tensor:
    """Return activations with Gaussian noise of `strength` times their root mean square.

    It is the root mean square of the median token: the first one is far larger in most models.
    """
    rms = smashed_BTD.square().mean(-1).median().sqrt()
    return smashed_BTD + strength * rms * torch.randn_like(smashed_BTD)


def train_inverter(
    public: PublicModel,
    aux_texts: Sequence[Tensor],
    *,
    defend: Defend | None = None,
    settings: InverterSettings | None = None,
    labels: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> Inverter:
    """Return a GRU that was trained to read public texts off their activations.

    Args:
        public: The model, cut where the run is.
        aux_texts: Tokens of public texts, (T,) each; the nearer to the client's, the better.
        defend: What the client does to its activations, with its parameters. It is applied anew
            whenever a text is seen, so that noise is never the same.
        settings: How it is trained.
        labels: What to teach in place of the texts' own tokens. For a control: an inverter that
            was taught other labels must give back no text.
        seed: Of the start, of the order and, if it draws from torch's generator, of the noise.

    Raises:
        DataError: If there is too little text, or text that is not of this model.
        ConfigError: If the defense changes how many tokens there are.
        NotFinite: If training goes astray.
    """
    settings = settings or InverterSettings()
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lesson = Lesson.of(public, aux_texts, labels or aux_texts, defend, settings, seed)
        network = GruInverter(
            lesson.sent_width,
            lesson.head(public),
            width=settings.width,
            dropout=settings.dropout,
        ).to(public.device)
        if settings.standardise:
            network.scale.fit(lesson.rows(defend))

        def loss_of(batch: Batch) -> Tensor:
            return batch.loss(network(batch.seen(defend), batch.mask_BT))

        def score() -> float:
            return lesson.held_out_recovery(network, [defend])

        best = lesson.teach(network, [*network.parameters()], loss_of, lesson.epochs, score)
    facts = {"network": "gru", "defended": defend is not None, "held_out_trr": best}
    return _learned(lesson, network, aux_texts, facts, began)


def train_mixture(
    public: PublicModel,
    aux_texts: Sequence[Tensor],
    *,
    strengths: Sequence[float],
    noise: Noise = add_gaussian,
    settings: InverterSettings | None = None,
    seed: int = 0,
) -> Inverter:
    """Return a mixture of GRUs that reads through noise of a strength that it is not told.

    One expert learns clean activations, one any strength, and one each of `strengths`. Then the
    gate learns which of them to believe, and then all learn together.

    Args:
        public: The model, cut where the run is.
        aux_texts: As for `train_inverter`.
        strengths: Strengths of noise that may be met.
        noise: The kind of noise.
        settings: How it is trained.
        seed: As for `train_inverter`.

    Raises:
        DataError: As `train_inverter`.
        ConfigError: If no strength is given, or one that is not positive.
        NotFinite: If training goes astray.
    """
    settings = settings or InverterSettings()
    if not strengths or min(strengths) <= 0:
        raise ConfigError(
            f"strengths = {list(strengths)}: a noise-aware mixture needs one strength of noise or "
            "more, each above 0"
        )
    began, draw = time.perf_counter(), np.random.default_rng(seed)

    def of(strength: float) -> Defend | None:
        return None if strength == 0 else lambda smashed_BTD: noise(smashed_BTD, strength)

    def of_any() -> Defend | None:
        # As published: as many draws in between as there are strengths, four clean, one twofold.
        between = [draw.uniform(min(strengths), max(strengths)) for _ in strengths]
        pool = [*between, 0.0, 0.0, 0.0, 0.0, 2 * max(strengths)]
        return of(float(draw.choice(pool)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lesson = Lesson.of(public, aux_texts, aux_texts, None, settings, seed)
        network = MixtureInverter(
            lesson.sent_width,
            lesson.head(public),
            len(strengths) + 2,
            width=settings.width,
            dropout=settings.dropout,
        ).to(public.device)
        if settings.standardise:
            network.scale.fit(lesson.rows(None))

        def loss_of_experts(batch: Batch) -> Tensor:
            met = [None, of_any(), *map(of, strengths)]
            losses = [
                batch.loss(network.of_expert(expert, batch.seen(defend)))
                for expert, defend in enumerate(met)
            ]
            return torch.stack(losses).sum()

        def loss_of_all(batch: Batch) -> Tensor:
            return batch.loss(network(batch.seen(of_any()), batch.mask_BT))

        def score() -> float:
            return lesson.held_out_recovery(network, [None, *map(of, strengths)])

        experts, gate = network.expert_parameters(), network.gate_parameters()
        lesson.teach(network, experts, loss_of_experts, lesson.epochs)
        lesson.teach(network, gate, loss_of_all, settings.gate_epochs, score)
        best = lesson.teach(network, experts + gate, loss_of_all, settings.joint_epochs, score)
    facts = {"network": "mixture", "strengths": list(strengths), "held_out_trr": best}
    return _learned(lesson, network, aux_texts, facts, began)


def learned_inversion(
    inverter: Inverter, smashed: Sequence[Tensor], truth: Sequence[Tensor]
) -> Finding:
    """Return what an inverter reads from the activations of a client's texts.

    Args:
        inverter: Trained on public text, and on the defense that was in use.
        smashed: What was sent for each text, (T, D).
        truth: The tokens of each text, (T,).

    Raises:
        DataError: If there is nothing to attack, or texts and activations do not match.
    """
    if not truth or [len(s) for s in smashed] != [len(t) for t in truth]:
        raise DataError(
            f"{len(smashed)} activations were given for {len(truth)} texts, or not of their "
            "lengths: give the activations and the tokens of the same texts, one or more"
        )
    began = time.perf_counter()
    recovered = []
    for start in range(0, len(truth), _TEXTS_AT_ONCE):
        texts = truth[start : start + _TEXTS_AT_ONCE]
        padded_BTD = pad_sequence([*smashed[start : start + _TEXTS_AT_ONCE]], batch_first=True)
        ids_BT = invert(inverter, padded_BTD, mask_of(texts))
        for text_T, ids_T in zip(texts, ids_BT, strict=True):
            guess = tuple(ids_T[: len(text_T)].tolist())
            prior = (inverter.commonest,) * len(guess)
            recovered.append(Recovered(tuple(text_T.tolist()), guess, prior))
    seen = torch.isin(torch.cat([*truth]), inverter.seen_K.to(truth[0].device))
    return finding_of(
        "A2",
        "activations",
        recovered,
        seconds=time.perf_counter() - began,
        params=inverter.facts,
        extra={"seen_tokens_share": float(seen.float().mean())},
    )


def _learned(
    lesson: Lesson,
    network: GruInverter | MixtureInverter,
    texts: Sequence[Tensor],
    facts: dict[str, Any],
    began: float,
) -> Inverter:
    facts |= {
        "aux_texts": len(texts),
        "aux_tokens": sum(map(len, texts)),
        "seen_tokens": len(lesson.tokens_K),
        "sent_width": lesson.sent_width,
        "train_seconds": time.perf_counter() - began,
        **asdict(lesson.settings),
        "epochs": lesson.epochs,
    }
    network.head.open(True)
    commonest = unigram_prior(text_T.tolist() for text_T in texts)
    return Inverter(network.eval(), lesson.tokens_K, commonest, lesson.vocabulary, facts)
