"""Notice a server that cheats (A8): what a client can check about answers that it did not compute.

Everything here takes two calls, of which a client has both: `answer` sends activations up and
returns what comes down, `pull` sends activations and a gradient up and returns the gradient that
comes down. A server that follows the protocol passes; one that passes may still cheat on other
batches, so the checks are repeated at times that the server cannot foresee.

An active server gains little over a curious one here: a bottom that is frozen learns nothing from
the gradients that come down, and the public weights already give the text away (A1, A4).
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.errors import DataError

__all__ = [
    "Answer",
    "Check",
    "Probes",
    "Pull",
    "angle_between",
    "answers_are_deterministic",
    "gradient_fits_answers",
    "gradients_follow_labels",
    "hijack_score",
    "probe_digest",
]

Answer = Callable[[Tensor], Tensor]
"""From what goes up, (B, T, D), to what comes down."""
Pull = Callable[[Tensor, Tensor], Tensor]
"""From what goes up and the gradient at the upper cut to the gradient at the lower cut."""


@dataclass(frozen=True)
class Check:
    """What one check came to.

    Attributes:
        name: Of the check.
        passed: Whether the server did as an honest one does.
        found: What was measured.
        limit: What it was held against.
        says: One sentence for the report.
    """

    name: str
    passed: bool
    found: float
    limit: float
    says: str


def _deviation(one: Tensor, other: Tensor) -> float:
    """Return the norm of a difference relative to the first's norm; infinite if shapes differ."""
    if one.shape != other.shape:
        return math.inf
    one, other = one.detach().double(), other.detach().double()
    size = float(one.norm())
    apart = float((one - other).norm())
    if not math.isfinite(apart):
        return math.inf
    return apart / size if size else (math.inf if apart else 0.0)


def answers_are_deterministic(
    answer: Answer, smashed_BTD: Tensor, *, times: int = 2, tolerance: float = 0.0
) -> Check:
    """Send the same activations again: the answers must be the same.

    Args:
        answer: The server, in a mode without dropout and between two optimizer steps.
        smashed_BTD: What to send.
        times: How often in all, at least 2.
        tolerance: Relative deviation to allow, for a server whose sums have no fixed order.
    """
    first = answer(smashed_BTD)
    found = max(_deviation(first, answer(smashed_BTD)) for _ in range(max(times, 2) - 1))
    return Check(
        "deterministic answers",
        found <= tolerance,
        found,
        tolerance,
        f"the same activations, sent {max(times, 2)} times, came back up to {found:.2g} apart",
    )


@dataclass
class Probes:
    """Batches that were sent once, to be sent again later among the others.

    Of a server that is frozen (inference, forward-only training) the answers must stay the same;
    while its adapter is trained they drift, and `tolerance` says how far they may.

    Attributes:
        share: What part of the batches to keep.
        tolerance: Relative deviation to allow.
        at_most: How many to keep.
        seed: Of the choice; keep it from the server.
    """

    share: float = 0.01
    tolerance: float = 0.0
    at_most: int = 8
    seed: int | None = None
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise DataError(
                f"a share of {self.share} of the batches cannot be kept: it must be above 0 and at "
                "most 1"
            )
        self._draw = torch.Generator()
        if self.seed is None:
            self._draw.seed()
        else:
            self._draw.manual_seed(self.seed)

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._kept)

    def saw(self, smashed_BTD: Tensor, trunk_out_BTD: Tensor) -> None:
        """Keep this batch and its answer, or not."""
        chosen = float(torch.rand((), generator=self._draw)) < self.share
        if chosen and len(self._kept) < self.at_most:
            self._kept.append((smashed_BTD.detach().cpu(), trunk_out_BTD.detach().cpu()))

    def replay(self, answer: Answer) -> Check:
        """Send all that were kept again and compare.

        Raises:
            DataError: If none was kept.
        """
        if not self._kept:
            raise DataError(
                f"no batch was kept to be sent again: {self.share:.0%} of them were to be, so send "
                "more or raise the share"
            )
        found = max(_deviation(once, answer(sent).cpu()) for sent, once in self._kept)
        return Check(
            "replayed probes",
            found <= self.tolerance,
            found,
            self.tolerance,
            f"{len(self._kept)} batches, sent again later, came back up to {found:.2g} apart",
        )


def probe_digest(answer: Answer, smashed_BTD: Tensor) -> str:
    """Return a digest of the answer to a probe: clients with the same weights get the same.

    It is of the exact bits, so it holds between clients of one server only, or of equal hardware
    and software.
    """
    found = answer(smashed_BTD).detach().cpu().contiguous()
    shape = f"{found.dtype} {tuple(found.shape)} ".encode()
    return hashlib.sha256(shape + found.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def angle_between(one: Tensor, other: Tensor) -> float:
    """Return the angle between two tensors of one shape, in radians; 0 if one is zero."""
    one, other = (t.detach().double().flatten() for t in (one, other))
    size = float(one.norm() * other.norm())
    # The angle from its tangent: an inverse cosine loses half of the digits of small angles.
    if size == 0:
        return 0.0
    one, other = one / one.norm(), other / other.norm()
    return 2 * math.atan2(float((one - other).norm()), float((one + other).norm()))


def gradients_follow_labels(
    pull: Pull,
    smashed_BTD: Tensor,
    grad_BTD: Tensor,
    shuffled_grad_BTD: Tensor,
    *,
    share: float = 0.1,
) -> Check:
    """Send the gradients of right and of shuffled labels: what comes down must differ as they do.

    A backward is linear, so two gradients at an angle come back at one, as a rule of like size. A
    server that trains the bottom towards an aim of its own (FSHA) sends back the gradient of that
    aim, which no label changes: the angle is zero.

    Args:
        pull: The server.
        smashed_BTD: What went up.
        grad_BTD: The gradient of the right labels.
        shuffled_grad_BTD: That of shuffled ones, of the same forward. It must not train anything.
        share: The least part of the angle that must come back.

    References:
        Erdogan et al., SplitGuard, WPES 2022, https://arxiv.org/abs/2108.09052, whose batches are
        not the same; Pasquini et al., FSHA, CCS 2021, https://arxiv.org/abs/2012.02670
    """
    sent = angle_between(grad_BTD, shuffled_grad_BTD)
    if sent == 0:
        raise DataError(
            "the gradients of right and shuffled labels are the same: shuffle other labels, for "
            "these can prove nothing"
        )
    back = angle_between(pull(smashed_BTD, grad_BTD), pull(smashed_BTD, shuffled_grad_BTD))
    return Check(
        "gradients follow the labels",
        back >= share * sent,
        back / sent,
        share,
        f"gradients sent {math.degrees(sent):.1f} degrees apart came back "
        f"{math.degrees(back):.1f} degrees apart",
    )


def gradient_fits_answers(
    answer: Answer,
    pull: Pull,
    smashed_BTD: Tensor,
    grad_BTD: Tensor,
    *,
    step: float = 1e-2,
    tolerance: float = 0.05,
    seed: int = 0,
) -> Check:
    """Compare the gradient that comes down with how the answers really change.

    Along a direction d the answers change by J d, so <G, J d> = <J' G, d>. The left side is read
    from two forwards, the right from the backward: a server that sends back anything but the
    gradient of the answers it gives is caught, whatever its aim.

    Args:
        answer: The server's forward, without dropout and between two optimizer steps.
        pull: Its backward.
        smashed_BTD: What went up.
        grad_BTD: The gradient at the upper cut.
        step: Length of the step, relative to the activations: larger under a coarse codec.
        tolerance: Relative difference to allow.
        seed: Of the random part of the direction.

    References:
        The dot-product test of adjoints: Claerbout, Earth Soundings Analysis, 1992.
    """
    back = pull(smashed_BTD, grad_BTD).detach().double()
    if not torch.isfinite(back).all():
        return Check("gradient fits the answers", False, math.inf, tolerance, "it is not finite")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(back.shape, generator=generator, dtype=torch.float64).to(back.device)
    # Half along what came back, where an honest product is large, and half where it would be small.
    along = back / back.norm().clamp_min(1e-30) + noise / noise.norm()
    along = along / along.norm() * step * smashed_BTD.double().norm()
    ahead, behind = (
        answer((smashed_BTD.double() + sign * along).to(smashed_BTD.dtype)).detach().double()
        for sign in (1, -1)
    )
    expected = float((grad_BTD.double() * (ahead - behind)).sum()) / 2
    found = float((back * along).sum())
    apart = abs(expected - found) / max(abs(expected), abs(found), 1e-30)
    return Check(
        "gradient fits the answers",
        apart <= tolerance,
        apart,
        tolerance,
        f"the gradient that came down predicts a change of {found:.3g} where the answers change by "
        f"{expected:.3g}",
    )


def hijack_score(
    regular: Sequence[Tensor],
    fake: Sequence[Tensor],
    *,
    alpha: float = 7.0,
    beta: float = 1.0,
) -> float:
    """Return SplitGuard's score of a run: near 1 is honest, near a half or less is hijacked.

    Now and then a batch is sent with shuffled labels and its gradient thrown away. An honest
    server's gradients of such batches differ, in angle and size, from those of regular batches more
    than regular ones do among themselves.

    Args:
        regular: Gradients of regular batches, all of one shape (average those of texts over their
            positions), at least two.
        fake: Those of batches with shuffled labels, at least one.
        alpha: Steepness of the squashing.
        beta: Its power.

    Raises:
        DataError: If there are too few of either.

    References:
        Erdogan et al., SplitGuard, WPES 2022, equation 6, https://arxiv.org/abs/2108.09052.
        A server that recognises fake batches passes it (SplitSpy): Fu et al., Focusing on
        Pinocchio's Nose, NDSS 2023.
    """
    if len(regular) < 2 or not fake:
        raise DataError(
            f"{len(regular)} regular and {len(fake)} fake gradients are too few for a score: it "
            "needs two and one"
        )
    halves = regular[::2], regular[1::2]

    def mean(gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([g.detach().double().flatten() for g in gradients]).mean(0)

    def size(gradients: Sequence[Tensor]) -> float:
        return sum(float(g.detach().double().norm()) for g in gradients) / len(gradients)

    from_fake = abs(size(fake) - size(regular))
    among = abs(size(halves[0]) - size(halves[1]))
    angle_from_fake = angle_between(mean(fake), mean(regular))
    angle_among = angle_between(mean(halves[0]), mean(halves[1]))
    score = angle_from_fake * from_fake - angle_among * among
    score /= from_fake + among or 1.0
    return float((1 / (1 + math.exp(-alpha * score))) ** beta)
