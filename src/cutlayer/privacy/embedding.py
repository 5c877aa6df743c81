"""D2 and D6: what is done to embeddings, and to a bottom that learns to say less."""

# Shapes:  B sequences   T tokens   D model width   V vocabulary   N tokens in all

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cutlayer.privacy.mechanisms import described, per_sequence, positive, raise_faults
from cutlayer.privacy.noise import secure_normal, secure_uniform
from cutlayer.privacy.release import Release

__all__ = ["AdversarialBottom", "MetricDpEmbed", "distance_quantiles"]

_ROWS = 256  # tokens whose distances to the whole vocabulary are held at once


@dataclass(frozen=True)
class MetricDpEmbed:
    """D2: each token's embedding moves r in a random direction, r drawn from Gamma(D, 1 / eta).

    Two tokens at a distance of t become indistinguishable up to eta * t (metric privacy; Feyisetan
    et al., 2020, https://arxiv.org/abs/1910.08902). Valid at the embedding only: after attention a
    token moves every later position. Print `token_epsilon`: with eta in the hundreds, as published
    runs have it, it promises nothing.

    Raises:
        ConfigError: If a parameter makes no sense.
    """

    eta: float
    """Per unit of distance in the embedding."""
    embedding_VD: Tensor | None = field(default=None, repr=False)
    """The embedding's rows, for `snap`."""
    snap: bool = False
    """Go on with the row that is nearest; its gradient passes as if it had not been done."""

    name: ClassVar[str] = "metric_dp_embed"
    channel: ClassVar[str] = "activations"
    site: ClassVar[str] = "embedding"
    formal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        faults: list[str] = []
        positive(faults, eta=self.eta)
        if self.snap and self.embedding_VD is None:
            faults.append("snap = True needs embedding_VD, the rows to snap to")
        raise_faults(self.name, faults)

    def describe(self) -> dict[str, Any]:
        """Return its name and parameters."""
        return described(self)

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return one release a sequence; they have no (epsilon, delta) of a sequence."""
        unit = "one token, replaced by another: eta times their distance"
        release = Release(self.name, self.channel, unit, 0.0, 0.0, 0.0, formal=False)
        return per_sequence(release, batch_size, records)

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the embeddings to go on with, (B, T, D)."""
        direction_BTD = secure_normal(tensor_BTD.shape)
        direction_BTD /= direction_BTD.norm(dim=-1, keepdim=True)
        # For a whole number of dimensions a Gamma is a sum of as many exponentials.
        radius_BT1 = -secure_uniform(tensor_BTD.shape).log_().sum(-1, keepdim=True) / self.eta
        noise_BTD = (direction_BTD * radius_BT1).to(tensor_BTD.device)
        moved_BTD = (tensor_BTD.double() + noise_BTD).to(tensor_BTD.dtype)
        if not self.snap:
            return moved_BTD
        return moved_BTD + (self._nearest(moved_BTD.detach()) - moved_BTD).detach()

    def token_epsilon(
        self,
        embedding_VD: Tensor,
        *,
        releases: int = 1,
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    ) -> dict[float, float]:
        """Return what `releases` releases promise for pairs of tokens, by quantile of distance."""
        found = distance_quantiles(embedding_VD, quantiles)
        return {q: self.eta * releases * distance for q, distance in found.items()}

    def _nearest(self, moved_BTD: Tensor) -> Tensor:
        assert self.embedding_VD is not None
        rows_VD = self.embedding_VD.to(moved_BTD)
        nearest_N = torch.cat(
            [
                torch.cdist(part, rows_VD).argmin(-1)
                for part in moved_BTD.flatten(0, -2).split(_ROWS)
            ]
        )
        return rows_VD[nearest_N].reshape(moved_BTD.shape)


def distance_quantiles(
    embedding_VD: Tensor, quantiles: Sequence[float] = (0.05, 0.5, 0.95), *, pairs: int = 20_000
) -> dict[float, float]:
    """Return quantiles of the distance between the embeddings of two different tokens.

    Args:
        embedding_VD: The embedding, or rows of it that matter.
        quantiles: Which.
        pairs: How many pairs are drawn; the same ones each time.
    """
    vocabulary = len(embedding_VD)
    generator = torch.Generator().manual_seed(0)
    one_N = torch.randint(vocabulary, (pairs,), generator=generator)
    other_N = (one_N + torch.randint(1, vocabulary, (pairs,), generator=generator)) % vocabulary
    rows_VD = embedding_VD.detach().cpu().double()
    distance_N = (rows_VD[one_N] - rows_VD[other_N]).norm(dim=-1)
    return {q: float(torch.quantile(distance_N, q)) for q in quantiles}


class AdversarialBottom:
    """D6: an adapter after the bottom, trained against an inverter that is trained against it.

    The hook only: `apply` is what leaves, and the training loop adds `penalty` to its loss after a
    few steps of `train_inverter`. It is measured, never promised: an adapter easily learns to fool
    the inverter at hand while it tells a new one as much as before, or more. So attack it with an
    inverter trained anew on the frozen adapter, and with forward search by one who has the adapter.

    Args:
        adapter: (B, T, D) to (B, T, D), on the client, trained with the task.
        inverter: (B, T, D) to logits (B, T, V): guesses the tokens from what leaves.
        weight: How much the penalty counts.
        sigma: Standard deviation of noise on what leaves, so that the adapter cannot be undone.
        lr: Learning rate of the inverter.

    Raises:
        ConfigError: If a parameter makes no sense.
    """

    name: ClassVar[str] = "adv_mi_bottom"
    channel: ClassVar[str] = "activations"
    site: ClassVar[str] = "lower cut"
    formal: ClassVar[bool] = False

    def __init__(
        self,
        adapter: nn.Module,
        inverter: nn.Module,
        *,
        weight: float = 1.0,
        sigma: float = 0.0,
        lr: float = 1e-3,
    ) -> None:
        faults: list[str] = []
        positive(faults, weight=weight, lr=lr, sigma=sigma or None)
        raise_faults(self.name, faults)
        self.adapter, self.inverter = adapter, inverter
        self.weight, self.sigma = weight, sigma
        self._optimizer = torch.optim.Adam(inverter.parameters(), lr=lr)

    def describe(self) -> dict[str, Any]:
        """Return its name and parameters."""
        facts = {"name": self.name, "channel": self.channel, "site": self.site}
        return {**facts, "formal": self.formal, "weight": self.weight, "sigma": self.sigma}

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return one release a sequence, none of them formal."""
        release = Release(self.name, self.channel, "none", 0.0, self.sigma, 0.0, formal=False)
        return per_sequence(release, batch_size, records)

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the adapter's output, with noise, (B, T, D)."""
        said_BTD: Tensor = self.adapter(tensor_BTD)
        noise_BTD = secure_normal(said_BTD.shape).to(said_BTD.device) * self.sigma
        return said_BTD + noise_BTD.to(said_BTD.dtype)

    def penalty(self, left_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """Return the weight times the mean log-probability that the inverter gives the truth."""
        for parameter in self.inverter.parameters():
            parameter.requires_grad_(False)
        try:
            loss = self._log_loss(left_BTD, ids_BT)
        finally:
            for parameter in self.inverter.parameters():
                parameter.requires_grad_(True)
        return -self.weight * loss

    def train_inverter(self, left_BTD: Tensor, ids_BT: Tensor, *, steps: int = 5) -> float:
        """Let the inverter learn from what left; return its last loss, in nats a token."""
        loss = torch.zeros(())
        for _ in range(steps):
            self._optimizer.zero_grad()
            loss = self._log_loss(left_BTD.detach(), ids_BT)
            loss.backward()
            self._optimizer.step()
        return float(loss.detach())

    def _log_loss(self, left_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        logits_BTV = self.inverter(left_BTD)
        return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten())
