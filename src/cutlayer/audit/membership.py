"""Tell from a released adapter what it was trained on, and bound its epsilon from below (A7).

Whoever gets the adapter has the base model as well, so each text can be asked of both. A text on
which the tuned model does better than the base, more than on other texts, was in the training data.
Canaries, random texts of which each is trained on by the toss of a coin, turn this into a number:
an adapter that is differentially private with a small epsilon cannot let anybody guess the tosses.

References:
    EZ-MIA: Ilić, Stanojević and Cvejoski, 2026, https://arxiv.org/abs/2601.12104
    One run: Steinke, Nasr and Jagielski, NeurIPS 2023, https://arxiv.org/abs/2305.08846
"""

# Shapes:  B batch   T tokens   V vocabulary   N texts   C canaries

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binom, mannwhitneyu
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cutlayer.audit.finding import Finding, Recovered
from cutlayer.audit.metrics import clopper_pearson, finding_of
from cutlayer.errors import ConfigError, DataError, NotFinite

__all__ = [
    "MEMBERSHIP_SCORES",
    "CanaryAudit",
    "Likelihood",
    "Separation",
    "canary_epsilon",
    "epsilon_lower_bound",
    "likelihoods",
    "make_canaries",
    "membership",
    "membership_scores",
    "separation",
    "toss",
]

LogitsOf = Callable[[Tensor, Tensor], Tensor]
"""A causal language model: from tokens (B, T) and their mask (B, T) to logits (B, T, V)."""


@dataclass(frozen=True)
class Likelihood:
    """What a model makes of one text, at each token but the first."""

    logprob_T: Tensor
    """Log-probability of the token that is there, in nats."""
    missed_T: Tensor
    """True where another token was likelier."""


@dataclass(frozen=True)
class Separation:
    """How well a score tells members from others.

    Attributes:
        auc: Probability that a member scores above another text, ties counted half.
        tpr: For each rate of false positives that is allowed: the share of members found, its 95%
            interval (Clopper-Pearson), and whether there were enough others to measure that rate.
        members: How many.
        others: How many.
    """

    auc: float
    tpr: dict[float, tuple[float, tuple[float, float], bool]]
    members: int
    others: int


@dataclass(frozen=True)
class CanaryAudit:
    """A lower bound on an adapter's epsilon, and the guesses on which it stands."""

    epsilon: float
    """0 where nothing could be shown."""
    correct: int
    guesses: int
    canaries: int
    delta: float
    confidence: float


@torch.no_grad()
def likelihoods(
    logits_of: LogitsOf,
    texts: Sequence[Tensor],
    *,
    counted: Sequence[Tensor] | None = None,
    batch: int = 16,
) -> list[Likelihood]:
    """Return what a model makes of each text.

    Args:
        logits_of: The model.
        texts: Tokens, (T,) each, two or more.
        counted: True at the tokens that the model was trained to predict, (T,) each; all if none.
        batch: How many texts to ask at once.

    Raises:
        DataError: If a text has fewer than two tokens.
    """
    if any(len(text_T) < 2 for text_T in texts):
        raise DataError("a text of fewer than two tokens has nothing to predict: leave it out")
    found = []
    for start in range(0, len(texts), batch):
        rows = texts[start : start + batch]
        ids_BT = pad_sequence([*rows], batch_first=True)
        mask_BT = pad_sequence([torch.ones_like(text_T) for text_T in rows], batch_first=True)
        logits_BTV = logits_of(ids_BT, mask_BT)[:, :-1].float()
        truth_BT1 = ids_BT[:, 1:, None]
        logprob_BT = logits_BTV.log_softmax(-1).gather(-1, truth_BT1)[..., 0]
        missed_BT = logits_BTV.argmax(-1) != truth_BT1[..., 0]
        for i, text_T in enumerate(rows):
            kept = torch.arange(len(text_T) - 1, device=ids_BT.device)
            if counted is not None:
                kept = kept[counted[start + i][1:].to(kept.device)]
            found.append(Likelihood(logprob_BT[i, kept], missed_BT[i, kept]))
    return found


def _loss_ratio(target: Likelihood, base: Likelihood) -> float:
    """Return the base model's loss divided by the tuned model's."""
    losses = [-float(of.logprob_T.double().mean()) for of in (base, target)]
    return losses[0] / max(losses[1], 1e-12)


def _error_zone(target: Likelihood, base: Likelihood) -> float:
    """Return how much log-probability tuning gave, divided by how much it took, where it errs.

    A text without an error is judged by all its tokens: the published code gives the lowest score
    to those that are known best.
    """
    change_T = (target.logprob_T - base.logprob_T).double()
    if bool(target.missed_T.any()):
        change_T = change_T[target.missed_T]
    gained, lost = float(change_T.clamp(min=0).sum()), float((-change_T).clamp(min=0).sum())
    if lost == 0:
        return float("inf") if gained > 0 else 1.0
    return gained / lost


MEMBERSHIP_SCORES: dict[str, Callable[[Likelihood, Likelihood], float]] = {
    "loss_ratio": _loss_ratio,
    "ez": _error_zone,
}


def membership_scores(
    target: Sequence[Likelihood], base: Sequence[Likelihood], *, score: str = "ez"
) -> Tensor:
    """Return a number for each text that is larger for those trained on, (N,).

    Args:
        target: What the model with the adapter makes of the texts.
        base: What the base model makes of them.
        score: A name of `MEMBERSHIP_SCORES`.

    Raises:
        ConfigError: If there is no such score.
        DataError: If the two are not of the same texts, or a text has no token that counts.
        NotFinite: If a log-probability is not a number.
    """
    if score not in MEMBERSHIP_SCORES:
        raise ConfigError(f"score = '{score}': unknown; one of {', '.join(MEMBERSHIP_SCORES)}")
    lengths = [[len(of.logprob_T) for of in side] for side in (target, base)]
    if lengths[0] != lengths[1] or 0 in lengths[0]:
        raise DataError(
            "the two models must be asked about the same texts, each with one counted token or more"
        )
    pairs = list(zip(target, base, strict=True))
    if not all(bool(of.logprob_T.isfinite().all()) for pair in pairs for of in pair):
        raise NotFinite(
            "a model gave a log-probability that is no finite number: look for NaN in the adapter"
        )
    measure = MEMBERSHIP_SCORES[score]
    return torch.tensor([measure(one, other) for one, other in pairs], dtype=torch.float64)


def separation(
    scores_N: Tensor, is_member_N: Tensor, *, false_positives: Sequence[float] = (0.01, 0.001)
) -> Separation:
    """Return how well a score tells members from others.

    Args:
        scores_N: The scores; infinite ones are allowed.
        is_member_N: True for texts that were trained on.
        false_positives: The shares of others that may be taken for members.

    Raises:
        DataError: If one of the two kinds is missing.
    """
    members, others = scores_N[is_member_N.bool()], scores_N[~is_member_N.bool()]
    if not len(members) or not len(others):
        raise DataError(
            f"{len(members)} members and {len(others)} other texts were given: both are needed"
        )
    statistic = mannwhitneyu(members.numpy(), others.numpy(), method="asymptotic").statistic
    falling = others.sort(descending=True).values
    tpr = {}
    for allowed in false_positives:
        found = int((members > falling[int(allowed * len(others))]).sum())
        interval = clopper_pearson(found, len(members))
        tpr[allowed] = (found / len(members), interval, allowed * len(others) >= 1)
    return Separation(
        float(statistic) / (len(members) * len(others)), tpr, len(members), len(others)
    )


def make_canaries(
    count: int, *, tokens: int, ids: Sequence[int] | range, seed: int = 0
) -> list[Tensor]:
    """Return texts of random tokens, (T,) each, that nobody would write and no model could guess.

    Args:
        count: How many. Some hundred bound an epsilon of 4, 62 one of 3.
        tokens: How many tokens each has.
        ids: The tokens to draw from: ordinary ones, not those with a meaning for the model.
        seed: Of the draw.
    """
    drawn = np.random.default_rng(seed).choice(np.asarray(ids), (count, tokens))
    return list(torch.from_numpy(drawn).long())


def toss(count: int, *, seed: int) -> Tensor:
    """Return by independent fair coins which canaries are trained on, (C,)."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, count).astype(bool))


def epsilon_lower_bound(
    correct: int, guesses: int, total: int, *, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """Return the largest epsilon that so many correct guesses refute, 0 if they refute none.

    If training is (epsilon, delta)-private, then each guess is right with probability
    e^epsilon / (1 + e^epsilon) at most, but for what delta allows (theorem 5.2 of the paper). So
    an epsilon is refuted if that would make so many correct guesses a rare thing.

    Args:
        correct: How many guesses about canaries were right.
        guesses: How many were made; abstaining is allowed, by a rule that does not look at truth.
        total: How many canaries there were.
        delta: Of the guarantee that is tested.
        confidence: How sure to be.

    Raises:
        ConfigError: If the numbers contradict each other.
    """
    if not 0 <= correct <= guesses <= total or not 0 <= delta < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"{correct} correct of {guesses} guesses about {total} canaries at delta = {delta} and "
            f"confidence = {confidence} are no audit: 0 <= correct <= guesses <= total, "
            "0 <= delta < 1 and 0 < confidence < 1 must hold"
        )

    def too_likely(epsilon: float) -> float:
        return _chance(correct, guesses, total, epsilon, delta) - (1 - confidence)

    if too_likely(0.0) > 0:
        return 0.0
    high = 1.0
    while too_likely(high) <= 0:
        high *= 2
    return float(brentq(too_likely, 0.0, high, xtol=1e-9))


def _chance(correct: int, guesses: int, total: int, epsilon: float, delta: float) -> float:
    """Return how likely so many correct guesses are, at most, under (epsilon, delta)."""
    right = float(expit(epsilon))
    chance = float(binom.sf(correct - 1, guesses, right))
    if delta and correct:
        below = binom.pmf(np.arange(correct - 1, -1, -1), guesses, right).cumsum()
        chance += 2 * total * delta * float((below / np.arange(1, correct + 1)).max())
    return chance


def canary_epsilon(
    scores_C: Tensor,
    included_C: Tensor,
    *,
    guesses: Sequence[int] | None = None,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> CanaryAudit:
    """Return a lower bound on the epsilon of one training run with canaries.

    The highest half of the guessed canaries is said to be in, the lowest half to be out, and those
    between are passed over. If several numbers of guesses are tried, the confidence is shared
    among them (Bonferroni), so that the best may be taken.

    Args:
        scores_C: A membership score of each canary.
        included_C: True for those that were trained on, as `toss` said.
        guesses: How many to guess; one, two, three and four quarters if none are given. One number,
            fixed beforehand, gives the better bound.
        delta: Of the guarantee that is tested.
        confidence: How sure to be.

    Raises:
        ConfigError: If more are to be guessed than there are.
        DataError: If there is not one toss for each score.
    """
    total = len(scores_C)
    if len(included_C) != total or total < 2:
        raise DataError(
            f"{total} scores and {len(included_C)} tosses were given: one of each is needed for "
            "every canary, and two canaries at least"
        )
    quarters = {max(2, total * part // 4) for part in (1, 2, 3, 4)}
    tried = sorted(quarters if guesses is None else guesses)
    shared = 1 - (1 - confidence) / len(tried)
    rising = scores_C.argsort(stable=True)
    audits = []
    for count in tried:
        said_in, said_out = rising[total - count // 2 :], rising[: count - count // 2]
        correct = int(included_C[said_in].sum()) + int((~included_C[said_out].bool()).sum())
        epsilon = epsilon_lower_bound(correct, count, total, delta=delta, confidence=shared)
        audits.append(CanaryAudit(epsilon, correct, count, total, delta, confidence))
    return max(audits, key=lambda audit: audit.epsilon)


def membership(
    scores_N: Tensor,
    is_member_N: Tensor,
    *,
    seconds: float,
    canaries: CanaryAudit | None = None,
    params: dict[str, Any] | None = None,
) -> Finding:
    """Return what an adapter tells about who was in its training data.

    Each text counts as a sequence of one label, in or out; the half that scores highest is said
    to be in. So the finding's `trr` is the share of right answers, and its `prior_trr` that of
    always giving the commoner one.

    Args:
        scores_N: As from `membership_scores`.
        is_member_N: True for texts that were trained on.
        seconds: What it took to ask both models.
        canaries: The bound from canaries, if there were any.
        params: How it was run.

    Raises:
        DataError: If one of the two kinds is missing.
    """
    told = separation(scores_N, is_member_N)
    said_N = torch.zeros(len(scores_N), dtype=torch.long)
    said_N[scores_N.argsort(stable=True)[len(scores_N) // 2 :]] = 1
    commoner = int(told.members >= told.others)
    recovered = [
        Recovered((int(member),), (int(said),), (commoner,))
        for member, said in zip(is_member_N.tolist(), said_N.tolist(), strict=True)
    ]
    extra = {"auc": told.auc, "tpr": {str(at): found for at, found in told.tpr.items()}}
    if canaries is not None:
        extra["canaries"] = asdict(canaries)
    return finding_of("A7", "adapter", recovered, seconds=seconds, params=params, extra=extra)
