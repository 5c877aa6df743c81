"""D8: the gradient in two shares, for two servers that do not talk to each other.

A backward pass is linear in the gradient that it begins with. So two copies of the trunk can each
do it on one share, and the two results add up to what one would have got.
"""

# Shapes:  B sequences   T tokens   D model width   S shares

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cutlayer.privacy.mechanisms import described, per_sequence, positive, raise_faults
from cutlayer.privacy.noise import secure_normal
from cutlayer.privacy.release import Release

__all__ = ["KAPPA", "TwoServer", "shares"]

KAPPA = 2.0**10


def shares(grad_BTD: Tensor, kappa: float = KAPPA) -> tuple[Tensor, Tensor]:
    """Return two tensors that add up to the gradient and of which neither tells it.

    The first is pure noise of `kappa` times the gradient's root mean square, which is what it gives
    away; the second is the gradient below as much noise.

    Args:
        grad_BTD: The gradient at the upper cut.
        kappa: Larger hides more and loses more digits. In float32 the sum is off by kappa * 2^-25
            of the gradient, and what two backwards through it add up to by far more: by kappa *
            2e-6 with 26 layers of SmolLM2, where each backward rounds at the size of its share.

    Raises:
        ConfigError: If kappa is not above 0.
    """
    faults: list[str] = []
    positive(faults, kappa=kappa)
    raise_faults("two_server", faults)
    scale = kappa * grad_BTD.double().square().mean().sqrt().nan_to_num()
    first_BTD = (secure_normal(grad_BTD.shape).to(scale.device) * scale).to(grad_BTD.dtype)
    return first_BTD, (grad_BTD.double() - first_BTD.double()).to(grad_BTD.dtype)


@dataclass(frozen=True)
class TwoServer:
    """D8 as a defense: hides the gradient from each of two servers, the activations from neither.

    Raises:
        ConfigError: If kappa is not above 0.
    """

    kappa: float = KAPPA

    name: ClassVar[str] = "two_server"
    channel: ClassVar[str] = "gradients"
    site: ClassVar[str] = "upper cut"
    formal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        faults: list[str] = []
        positive(faults, kappa=self.kappa)
        raise_faults(self.name, faults)

    def describe(self) -> dict[str, Any]:
        """Return its name and parameters."""
        return described(self)

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return one release a sequence: statistical hiding between two servers, no epsilon."""
        unit = "one share, for a server that never sees the other"
        release = Release(self.name, self.channel, unit, 0.0, self.kappa, 0.0, formal=False)
        return per_sequence(release, batch_size, records)

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return both shares, (2, B, T, D): one for each server."""
        return torch.stack(shares(tensor_BTD, self.kappa))
