"""D2: what is done to embeddings."""

# Shapes:  B sequences   T tokens   D model width   V vocabulary   N tokens in all

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from cutlayer.privacy.mechanisms import described, per_sequence, positive, raise_faults
from cutlayer.privacy.noise import secure_normal, secure_uniform
from cutlayer.privacy.release import Release

__all__ = ["MetricDpEmbed", "distance_quantiles"]

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
