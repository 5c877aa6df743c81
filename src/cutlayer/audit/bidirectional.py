"""Match what was sent by gradient descent, as published (A3): EIA and BiSR(f), (b), (b+f).

The server replays the public bottom and top on a guess of the text and changes the guess until it
sends what was sent: forward the activations (f), backward the gradient (b). These attacks are kept
at their published settings, for comparison with papers: forward search (A1) and linear label
inversion (A4) recover more from the same messages, and without settings to tune.

References:
    EIA: Song and Raghunathan, CCS 2020, https://arxiv.org/abs/2004.00053
    TAG: Deng et al., EMNLP Findings 2021, https://arxiv.org/abs/2103.06819
    BiSR: Chen et al., CCS 2024, https://arxiv.org/abs/2409.00960
"""

# Shapes:  T tokens   D model width   V vocabulary   K tokens that are tried

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize, one_hot

from cutlayer.audit.embedding import embedding_table, replay
from cutlayer.audit.finding import Finding, Recovered
from cutlayer.audit.inverter import Inverter
from cutlayer.audit.metrics import finding_of
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError

__all__ = [
    "PUBLISHED",
    "BisrSettings",
    "Descent",
    "Stage",
    "bidirectional_recovery",
    "bisr",
    "embedding_inversion",
    "gradient_matching",
    "smashed_matching",
]

Stage = Literal["b", "f"]


@dataclass(frozen=True)
class Descent:
    """One descent by AdamW with betas .9 and .999 and epsilon 1e-6."""

    steps: int
    lr: float
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        """Refuse a descent that goes nowhere."""
        if self.steps < 1 or not self.lr > 0:
            raise ConfigError(
                f"a descent of {self.steps} steps at lr {self.lr} goes nowhere: give one step or "
                "more and an lr above 0"
            )


@dataclass(frozen=True)
class BisrSettings:
    """Settings of all stages: by default the published ones for Llama-2, but for `decode`."""

    embedding: Descent = Descent(72_000, 0.09)
    """Of EIA; it is stopped earlier where it stands still."""
    forward: Descent = Descent(800, 5e-3, 0.02)
    backward: Descent = Descent(18, 0.09)
    embedding_temperature: float = 0.2
    start_temperature: float = 1.2
    """What the inverter's logits are divided by before (b) begins."""
    squared_share: float = 0.85
    """Of squared against absolute differences in (b)."""
    decode: Literal["cosine", "product"] = "cosine"
    """How (f) finds the nearest token. The published product favours tokens of long embeddings: on
    SmolLM2, where lengths differ, it gives less back than there was to begin with."""


PUBLISHED: dict[str, BisrSettings] = {
    "llama-2": BisrSettings(decode="product"),
    "chatglm": BisrSettings(forward=Descent(800, 5e-3, 0.01), decode="product"),
    "gpt2-large": BisrSettings(
        forward=Descent(800, 1e-2, 0.01), backward=Descent(32, 0.09), decode="product"
    ),
    "tag": BisrSettings(backward=Descent(300, 0.09)),
}
"""As in the authors' scripts, by the model that they attacked; `tag` is (b) without a start."""


def embedding_inversion(
    public: PublicModel,
    smashed_TD: Tensor,
    *,
    settings: BisrSettings | None = None,
    tried_K: Tensor | None = None,
    patience: int = 500,
    seed: int = 0,
) -> Tensor:
    """Return the tokens whose softened mixture sends nearly these activations (EIA), (T,).

    Args:
        public: The model.
        smashed_TD: What was sent for one text.
        settings: As published for Llama-2 if none are given.
        tried_K: The tokens that may be mixed; all if none are given, at a cost of T x V each step.
        patience: Stop when the loss has not fallen by a thousandth for so many steps.
        seed: Of the start.
    """
    settings = settings or BisrSettings()
    table_VD = embedding_table(public)
    tried_K = torch.arange(len(table_VD), device=public.device) if tried_K is None else tried_K
    generator = torch.Generator().manual_seed(seed)
    mix_TK = torch.rand(len(smashed_TD), len(tried_K), generator=generator).to(public.device)
    optimizer = _adamw(mix_TK, settings.embedding)
    best, since = float("inf"), 0
    for _ in range(settings.embedding.steps):
        shares_TK = (mix_TK / settings.embedding_temperature).softmax(-1)
        sent_TD = replay(public, shares_TK @ table_VD[tried_K])
        loss = (sent_TD - smashed_TD).square().sum()
        _step(optimizer, mix_TK, loss)
        now = float(loss.detach())
        best, since = (now, 0) if now < 0.999 * best else (best, since + 1)
        if since >= patience:
            break
    return tried_K[mix_TK.argmax(-1)]


def smashed_matching(
    public: PublicModel,
    smashed_TD: Tensor,
    start_T: Tensor,
    *,
    settings: BisrSettings | None = None,
) -> Tensor:
    """Return the tokens nearest to embeddings that send nearly these activations (f), (T,).

    Args:
        public: The model.
        smashed_TD: What was sent for one text.
        start_T: The tokens to begin with.
        settings: As published for Llama-2 if none are given.
    """
    settings = settings or BisrSettings()
    table_VD = embedding_table(public)
    guess_TD = table_VD[start_T].clone()
    optimizer = _adamw(guess_TD, settings.forward)
    for _ in range(settings.forward.steps):
        sent_TD = replay(public, guess_TD)
        _step(optimizer, guess_TD, 1 - cosine_similarity(sent_TD, smashed_TD, dim=-1).mean())
    rows_VD = normalize(table_VD, dim=-1) if settings.decode == "cosine" else table_VD
    return (guess_TD.detach() @ rows_VD.T).argmax(-1)


def gradient_matching(
    public: PublicModel,
    trunk_out_TD: Tensor,
    gradient_TD: Tensor,
    *,
    start_TV: Tensor | None = None,
    labels: int | None = None,
    settings: BisrSettings | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the scores of tokens as whose labels this gradient could have gone up (b), (T, V).

    A label is the token after its position, so the gradient says nothing of the first token.

    Args:
        public: The model.
        trunk_out_TD: What came down for one text.
        gradient_TD: What went up for it.
        start_TV: Logits to begin with, -inf allowed; random ones if none are given (TAG).
        labels: How many labels the client's mean was over; those of this text if none is given.
        settings: As published for Llama-2 if none are given.
        seed: Of the random start.
    """
    settings = settings or BisrSettings()
    own = len(trunk_out_TD) - 1
    wanted_TD = gradient_TD * ((labels or own) / own)
    if start_TV is None:
        generator = torch.Generator().manual_seed(seed)
        start_TV = torch.randn(own + 1, public.vocabulary, generator=generator)
        labels_TV = start_TV.to(public.device).softmax(-1)
    else:
        labels_TV = (start_TV / settings.start_temperature).softmax(-1)
    labels_TV = labels_TV.clone()
    point_1TD = trunk_out_TD.detach()[None].clone().requires_grad_()
    logits_TV = public.head(public.top(point_1TD))[0]
    optimizer = _adamw(labels_TV, settings.backward)
    for _ in range(settings.backward.steps):
        # A softmax of what already is one, as published: a start is soft, and steps are bold.
        loss = cross_entropy(logits_TV[:-1], labels_TV[1:].softmax(-1))
        (found_1TD,) = torch.autograd.grad(loss, point_1TD, create_graph=True)
        off_TD = found_1TD[0] - wanted_TD
        squared, absolute = off_TD.square().sum(), off_TD.abs().sum()
        share = settings.squared_share
        _step(optimizer, labels_TV, share * squared + (1 - share) * absolute)
    return labels_TV.detach()


def bisr(
    public: PublicModel,
    smashed_TD: Tensor,
    start_TV: Tensor,
    *,
    trunk_out_TD: Tensor | None = None,
    gradient_TD: Tensor | None = None,
    stages: Sequence[Stage] = ("b", "f"),
    labels: int | None = None,
    settings: BisrSettings | None = None,
) -> Tensor:
    """Return the tokens that BiSR recovers for one text, (T,).

    Args:
        public: The model.
        smashed_TD: What was sent for the text.
        start_TV: What a learned inverter (A2) thinks of it, as logits.
        trunk_out_TD: What came down for it; (b) needs it.
        gradient_TD: What went up for it; (b) needs it.
        stages: Which of (b) and (f) are run, in this order; none leaves the inverter's answer.
        labels: As for `gradient_matching`.
        settings: As published for Llama-2 if none are given.

    Raises:
        ConfigError: If a stage is unknown or lacks what it matches.
    """
    scores_TV = start_TV
    for stage in stages:
        if stage == "b":
            if trunk_out_TD is None or gradient_TD is None:
                raise ConfigError(
                    "BiSR's stage 'b' matches the gradient at the upper cut, and none was given: "
                    "give trunk_out_TD and gradient_TD, or leave the stage out"
                )
            scores_TV = gradient_matching(
                public,
                trunk_out_TD,
                gradient_TD,
                start_TV=scores_TV,
                labels=labels,
                settings=settings,
            )
        elif stage == "f":
            ids_T = smashed_matching(public, smashed_TD, scores_TV.argmax(-1), settings=settings)
            scores_TV = one_hot(ids_T, public.vocabulary).float()
        else:
            raise ConfigError(f"'{stage}' is no stage of BiSR: it has 'b' and 'f'")
    return scores_TV.argmax(-1)


def bidirectional_recovery(
    public: PublicModel,
    inverter: Inverter,
    smashed: Sequence[Tensor],
    truth: Sequence[Tensor],
    *,
    trunk_out: Sequence[Tensor] | None = None,
    gradients: Sequence[Tensor] | None = None,
    stages: Sequence[Stage] = ("b", "f"),
    labels: int | None = None,
    settings: BisrSettings | None = None,
) -> Finding:
    """Return what BiSR recovers of a client's texts.

    Args:
        public: The model.
        inverter: Trained on public text; BiSR begins where it ends.
        smashed: What was sent for each text, (T, D).
        truth: The tokens of each text, (T,).
        trunk_out: What came down for each, (T, D).
        gradients: What went up for each, (T, D).
        stages: As for `bisr`.
        labels: As for `gradient_matching`.
        settings: As published for Llama-2 if none are given.

    Raises:
        ConfigError: As `bisr`.
        DataError: If there is nothing to attack, or the messages are not of these texts.
    """
    messages = [m for m in (smashed, trunk_out, gradients) if m is not None]
    if not truth or any([*map(len, m)] != [*map(len, truth)] for m in messages):
        raise DataError(
            f"the messages of {len(smashed)} texts were given for {len(truth)} texts, or not of "
            "their lengths: give what was sent and the tokens of the same texts, one or more"
        )
    began = time.perf_counter()
    recovered = []
    for i, text_T in enumerate(truth):
        ids_T = bisr(
            public,
            smashed[i],
            inverter.logits(smashed[i][None])[0],
            trunk_out_TD=None if trunk_out is None else trunk_out[i],
            gradient_TD=None if gradients is None else gradients[i],
            stages=stages,
            labels=labels,
            settings=settings,
        )
        guess = tuple(ids_T.tolist())
        prior = (inverter.commonest,) * len(guess)
        recovered.append(Recovered(tuple(text_T.tolist()), guess, prior))
    params: dict[str, Any] = {"stages": "+".join(stages), **asdict(settings or BisrSettings())}
    return finding_of(
        "A3",
        "gradients" if "b" in stages else "activations",
        recovered,
        seconds=time.perf_counter() - began,
        params=params,
        extra={"start": inverter.facts},
    )


def _adamw(guess: Tensor, descent: Descent) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [guess.requires_grad_()], lr=descent.lr, weight_decay=descent.weight_decay, eps=1e-6
    )


def _step(optimizer: torch.optim.Optimizer, guess: Tensor, loss: Tensor) -> None:
    (guess.grad,) = torch.autograd.grad(loss, guess)
    optimizer.step()
