"""D6: a bottom whose LoRA learns to say less to an inverter that learns to read it.

While a run trains, a small inverter is taught at each step to read the tokens off what leaves, and
the bottom is pulled the other way: the gradient of `weight` times the mean log-probability that the
inverter gives the truth is added to the gradient that comes back for the activations. The bottom's
LoRA is what learns, so the adapter that comes out is an ordinary one.

It is measured and never promised. A bottom easily learns to fool the inverter at hand while it
tells a new one as much as before, or more. So a run with it ends by an attack on the frozen bottom
by those who know it (`cli/reattack.py`); without that no finished adapter is saved.

References:
    Adversarial and mutual-information objectives for split models: Singh et al., 2021,
        https://arxiv.org/abs/2102.08504 ; the inverter is that of Chen et al., 2024,
        https://arxiv.org/abs/2409.00960
"""

# Shapes:  B sequences   T tokens   D model width   V vocabulary   H width of the inverter

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cutlayer.privacy.mechanisms import (
    GaussianNoise,
    described,
    per_sequence,
    positive,
    raise_faults,
)
from cutlayer.privacy.release import Release

__all__ = ["AdversarialBottom"]

_IGNORED = -100


@dataclass
class AdversarialBottom:
    """The defense: noise in proportion on what leaves, and a pull on the bottom behind it.

    Raises:
        ConfigError: If a parameter makes no sense.
    """

    vocabulary: int
    """How many tokens the model has."""
    weight: float = 1.0
    """How much the pull counts, in each forward that is trained on."""
    nsr: float = 0.5
    """Standard deviation of the noise over the root mean square of what leaves: without noise what
    a bottom does could be undone. In proportion, so that growing does not drown it."""
    steps: int = 5
    """How often the inverter learns from each batch."""
    lr: float = 3e-3
    """The inverter's learning rate."""
    width: int = 64
    """Of its GRU."""

    name: ClassVar[str] = "adv_mi_bottom"
    channel: ClassVar[str] = "activations"
    site: ClassVar[str] = "lower cut"
    formal: ClassVar[bool] = False

    inverter: _Inverter | None = field(default=None, init=False, repr=False)
    loss: float = field(default=math.nan, init=False, repr=False)
    """What the inverter lost at the last step, in nats a token."""

    def __post_init__(self) -> None:
        faults: list[str] = []
        positive(faults, weight=self.weight, nsr=self.nsr, lr=self.lr)
        positive(faults, vocabulary=self.vocabulary, steps=self.steps, width=self.width)
        raise_faults(self.name, faults)
        self._noise = GaussianNoise(self.nsr)

    def describe(self) -> dict[str, Any]:
        """Return its name and parameters."""
        return described(self)

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return one release a sequence, none of them formal."""
        release = Release(self.name, self.channel, "none", 0.0, self.nsr, 0.0, formal=False)
        return per_sequence(release, batch_size, records)

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return what leaves: the activations with noise, (B, T, D)."""
        return self._noise.apply(tensor_BTD, mask_BT)

    def pulled(self, hidden_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Return the activations as they are, with the pull in the gradient that they will get.

        The inverter learns first. Where it is no better than guessing there is no pull: being
        worse than that would tell the tokens too.
        """
        known_BT = ids_BT.to(hidden_BTD.device)
        if mask_BT is not None and mask_BT.shape == ids_BT.shape:
            known_BT = known_BT.masked_fill(mask_BT.to(known_BT.device) == 0, _IGNORED)
        with torch.enable_grad(), torch.autocast(hidden_BTD.device.type, enabled=False):
            inverter = self._inverter_for(hidden_BTD)
            still_BTD = hidden_BTD.detach().float()
            for _ in range(self.steps):
                inverter.learn(self.apply(still_BTD, mask_BT), known_BT)
            point_BTD = still_BTD.clone().requires_grad_(True)
            loss = inverter.loss(self.apply(point_BTD, mask_BT), known_BT)
            self.loss = float(loss.detach())
            (gradient_BTD,) = torch.autograd.grad(-self.weight * loss, point_BTD)
        if not self.loss < math.log(self.vocabulary):
            return hidden_BTD
        pulled: Tensor = _Pull.apply(hidden_BTD, gradient_BTD.to(hidden_BTD.dtype))
        return pulled

    def _inverter_for(self, hidden_BTD: Tensor) -> _Inverter:
        if self.inverter is None:
            # A generator of its own, so that the run draws what it would draw without it.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made = _Inverter(hidden_BTD.shape[-1], self.width, self.vocabulary, self.lr)
            self.inverter = made.to(hidden_BTD.device)
        return self.inverter


class _Pull(torch.autograd.Function):
    """Hand on, and add something to the gradient on its way back."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, gradient_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_BTD)
        return hidden_BTD.view_as(hidden_BTD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient_BTD,) = ctx.saved_tensors
        return grads[0] + gradient_BTD, None


class _Inverter(nn.Module):
    """Activations to logits of tokens: a GRU, as the published learned inverter has it."""

    def __init__(self, width: int, hidden: int, vocabulary: int, lr: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)
        self._optimizer = torch.optim.Adam(self.parameters(), lr=lr)

    def forward(self, left_BTD: Tensor) -> Tensor:
        """Return the logits, (B, T, V)."""
        states_BTH, _last = self.gru(self.norm(left_BTD))
        logits_BTV: Tensor = self.head(states_BTH)
        return logits_BTV

    def loss(self, left_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy of the tokens, in nats."""
        logits_BTV = self(left_BTD)
        return nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), ids_BT.flatten(), ignore_index=_IGNORED
        )

    def learn(self, left_BTD: Tensor, ids_BT: Tensor) -> None:
        """Do one step."""
        self._optimizer.zero_grad()
        self.loss(left_BTD, ids_BT).backward()
        self._optimizer.step()
