"""D3b: no gradient leaves, only one noisy number a step (DP-ZO).

The two sides agree on a seed. The server runs its adapter moved by +scale and by -scale along the
direction that the seed gives; the client answers with how much the losses differ, clipped a
sequence at a time, summed, with noise. Both then know the step (SPSA: Spall, 1992; DP-ZO: Tang et
al., 2024, https://arxiv.org/abs/2401.04343).
"""

# Shapes:  B sequences

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cutlayer.privacy.mechanisms import ClippedGaussian, described
from cutlayer.privacy.noise import secure_normal
from cutlayer.privacy.release import Release

__all__ = ["LossScalar", "move_along", "step_along"]


@dataclass(frozen=True)
class LossScalar(ClippedGaussian):
    """D3b: sum of clip(loss at + minus loss at -, C) over the batch, plus sigma C N(0, 1).

    Replacing one sequence moves the sum by up to 2C. The server knows who is in the batch, since it
    sees the activations: no amplification by sampling. One release touches all of the batch.

    Raises:
        ConfigError: If a parameter makes no sense.
    """

    name: ClassVar[str] = "loss_scalar"
    channel: ClassVar[str] = "scalars"
    site: ClassVar[str] = "loss"

    def describe(self) -> dict[str, Any]:
        """Return its name and parameters."""
        return {**described(self), "sigma": self.sigma}

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return the one release of this batch."""
        unit = "one sequence, replaced by any other"
        release = Release(self.name, self.channel, unit, self.clip, self.sigma, self.sigma / 2)
        return [release.of(*records)]

    def signal(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the sum of the clipped differences, ()."""
        return tensor_BTD.double().clamp(-self.clip, self.clip).sum()

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the number that may leave, ().

        Args:
            tensor_BTD: Each sequence's loss at +scale minus that at -scale, (B,).
            mask_BT: Not used.
        """
        signal = self.signal(tensor_BTD.detach())
        return signal + self.sigma * self.clip * secure_normal(()).to(signal.device)


def move_along(parameters: Iterable[Tensor], seed: int, by: float) -> None:
    """Add `by` times the seed's direction to the parameters, in place.

    The direction is N(0, I), drawn on the CPU, the same on every machine with this torch.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(drawn.to(parameter), alpha=by)


def step_along(
    parameters: Iterable[Tensor],
    seed: int,
    released: float,
    *,
    scale: float,
    batch_size: int,
    lr: float,
) -> None:
    """Do the step that a released number stands for: -lr * released / (2 scale B) * direction."""
    move_along(parameters, seed, -lr * released / (2 * scale * batch_size))
