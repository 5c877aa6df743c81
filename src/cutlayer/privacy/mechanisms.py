"""The mechanisms through which whole tensors leave, and what each can say of itself."""

# Shapes:  B sequences   T tokens   D model width   P pooled width

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.accountant import check_target, sigma_for
from cutlayer.privacy.noise import secure_normal
from cutlayer.privacy.release import CHANNELS, Release

__all__ = [
    "MAX_POOL",
    "SITES",
    "ClippedGaussian",
    "Defense",
    "GaussianNoise",
    "LdpSequence",
    "NoBackward",
    "NoisyGrad",
    "clip_sequences",
    "described",
    "per_sequence",
    "positive",
    "raise_faults",
]

SITES = ("embedding", "lower cut", "upper cut", "loss")
"""Where a defense stands, in the order of the forward."""
MAX_POOL = 16
"""Beyond this width a pooled release takes more noise than a head can bear (see `noise_table`)."""

SEQUENCE = "one sequence, replaced by any other of the same padded length"


class Defense(Protocol):
    """What stands between a tensor and the wire.

    Attributes:
        name: Its name in `DEFENSES`.
    """

    name: ClassVar[str]

    @property
    def formal(self) -> bool:
        """Whether it has an (epsilon, delta)."""

    @property
    def channel(self) -> str:
        """The one of `CHANNELS` that it defends."""

    @property
    def site(self) -> str:
        """The one of `SITES` where it stands."""

    def describe(self) -> dict[str, Any]:
        """Return its name and parameters, for the report; an attacker is given the same."""

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return what `apply` to a batch releases.

        Args:
            batch_size: How many sequences.
            records: Their ids, as many; without them each release counts for every record.
        """

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return what may leave in the tensor's place, with fresh noise; differentiable.

        Args:
            tensor_BTD: What would have left.
            mask_BT: 0 at padding.
        """


def positive(faults: list[str], **values: float | None) -> None:
    """Add a fault for each value that is not a finite number above 0."""
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            faults.append(f"{name} = {value!r} must be a number above 0")


def raise_faults(where: str, faults: Sequence[str]) -> None:
    """Raise if there are faults.

    Raises:
        ConfigError: With all of them.
    """
    if faults:
        raise ConfigError(f"{where}: " + "; ".join(faults))


def described(defense: Any) -> dict[str, Any]:
    """Return a dataclass defense's facts."""
    params = {f.name: getattr(defense, f.name) for f in dataclasses.fields(defense) if f.repr}
    facts = {"name": defense.name, "channel": defense.channel, "site": defense.site}
    return {**facts, "formal": defense.formal, **params}


def per_sequence(release: Release, batch_size: int, records: Sequence[str]) -> list[Release]:
    """Return one release a sequence."""
    if records and len(records) != batch_size:
        raise ConfigError(
            f"{len(records)} record ids were given for a batch of {batch_size} sequences: give one "
            "each, or none"
        )
    return [release.of(*([records[row]] if records else [])) for row in range(batch_size)]


def clip_sequences(tensor_BTD: Tensor, clip: float) -> Tensor:
    """Return each sequence scaled down to a Frobenius norm of at most `clip`; differentiable."""
    flat_BN = tensor_BTD.flatten(1)
    # In float64, so that a half-precision sum of squares neither overflows nor rounds below the
    # true norm, which would let a sequence be longer than the clip that the noise was made for.
    norm_B = torch.linalg.vector_norm(flat_BN, dim=1, dtype=torch.float64)
    scale_B = clip / norm_B.clamp_min(clip)
    return tensor_BTD.double() * scale_B.reshape(-1, *[1] * (tensor_BTD.dim() - 1))


def _check_clipped(
    where: str, clip: float, epsilon: float, delta: float, planned: int, records: int | None
) -> None:
    faults: list[str] = []
    positive(faults, clip=clip)
    if planned < 1:
        faults.append(f"planned = {planned!r} must be at least 1")
    try:
        check_target(epsilon, delta, records=records)
    except ConfigError as error:
        faults.append(str(error))
    raise_faults(where, faults)


@dataclass(frozen=True)
class ClippedGaussian:
    """Clip each sequence to norm C, add noise of standard deviation sigma * C everywhere."""

    clip: float
    """C, a Frobenius norm."""
    epsilon: float
    """What all planned releases of one sequence may come to."""
    delta: float
    """Below 1 / records."""
    planned: int = 1
    """How often one sequence will be released, on both channels, retries and inference included."""
    records: int | None = None
    """How many sequences the data set has, if known."""

    name: ClassVar[str]
    formal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_clipped(self.name, self.clip, self.epsilon, self.delta, self.planned, self.records)

    @functools.cached_property
    def sigma(self) -> float:
        """Standard deviation of the noise in units of the clip."""
        return sigma_for(self.epsilon, self.delta, self.planned)

    def signal(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return what the noise is added to, in float64: norm at most C."""
        if mask_BT is not None:
            tensor_BTD = tensor_BTD * mask_BT.to(tensor_BTD)[..., None]
        return clip_sequences(tensor_BTD, self.clip)

    def _noisy(self, signal: Tensor, dtype: torch.dtype) -> Tensor:
        noise = secure_normal(signal.shape).to(signal.device)
        return (signal + self.sigma * self.clip * noise).to(dtype)


@dataclass(frozen=True)
class LdpSequence(ClippedGaussian):
    """D1: s = min(1, C / |H|), sH + sigma C N(0, I), local differential privacy per sequence.

    Replacing a sequence moves sH by up to 2C. Sigma is calibrated analytically (Balle and Wang,
    2018, https://arxiv.org/abs/1805.06530) for all planned releases together. Positions of padding
    are set to 0 before clipping, and get noise as all others do. At a sequence of T x D the noise
    is larger than the signal by sigma sqrt(T D): print `noise_table` before anybody uses it, and
    for classification use `pool`.

    Raises:
        ConfigError: If a parameter makes no sense.
    """

    pool: int | None = None
    """Release the mean over tokens in this many dimensions, at most 16, in place of each token."""
    spread: bool = False
    """With `pool`: take the released vector back to the model's width and repeat it at each token,
    so that the trunk sees (B, T, D). It is computed from what is released, so it costs nothing."""
    projection_seed: int = 0
    """Seed of the projection to `pool` dimensions, which is public."""

    name: ClassVar[str] = "ldp_sequence"
    channel: ClassVar[str] = "activations"
    site: ClassVar[str] = "lower cut"

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = []
        if self.pool is not None and not 1 <= self.pool <= MAX_POOL:
            faults.append(f"pool = {self.pool!r} must be from 1 to {MAX_POOL}")
        if self.pool is None and self.spread:
            faults.append("spread = True needs pool")
        raise_faults(self.name, faults)

    def describe(self) -> dict[str, Any]:
        """Return its name and parameters."""
        return {**described(self), "sigma": self.sigma}

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return one release a sequence."""
        release = Release(self.name, self.channel, SEQUENCE, self.clip, self.sigma, self.sigma / 2)
        return per_sequence(release, batch_size, records)

    def signal(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return what the noise is added to, (B, T, D) or (B, 1, P), in float64: norm at most C."""
        if self.pool is None:
            return super().signal(tensor_BTD, mask_BT)
        weights_BT = tensor_BTD.new_ones(tensor_BTD.shape[:2]) if mask_BT is None else mask_BT
        weights_BT1 = weights_BT.to(tensor_BTD.device, torch.float64)[..., None]
        count_B1 = weights_BT1.sum(1).clamp_min(1)
        mean_B1D = ((tensor_BTD.double() * weights_BT1).sum(1) / count_B1)[:, None]
        return clip_sequences(mean_B1D @ self.projection_for(tensor_BTD), self.clip)

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return (B, T, D); with `pool`, (B, 1, P) unless it is spread."""
        out = self._noisy(self.signal(tensor_BTD, mask_BT), tensor_BTD.dtype)
        if self.pool is None or not self.spread:
            return out
        lifted_B1D = out @ self.projection_for(tensor_BTD).T.to(out.dtype)
        return lifted_B1D.expand(-1, tensor_BTD.shape[1], -1)

    def projection_for(self, like_BTD: Tensor) -> Tensor:
        """Return the public projection to `pool` dimensions, (D, P).

        Raises:
            ConfigError: If the model is narrower than that.
        """
        assert self.pool is not None
        width = like_BTD.shape[-1]
        if width < self.pool:
            raise ConfigError(
                f"{self.name}: pool = {self.pool} is more than the model's width of {width}: name "
                "a smaller one"
            )
        return _projection(width, self.pool, self.projection_seed).to(like_BTD.device)


@functools.lru_cache(maxsize=8)
def _projection(width: int, pool: int, seed: int) -> Tensor:
    """Return a fixed random projection with orthonormal columns, (D, P). Everybody may know it."""
    generator = torch.Generator().manual_seed(seed)
    drawn_DP = torch.randn(width, pool, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn_DP).Q


@dataclass(frozen=True)
class NoisyGrad(ClippedGaussian):
    """D3c: the same for the gradient at the upper cut.

    The gradient of a mean over all labels of a batch depends on how many labels the other
    sequences have, so the number of labels is part of the neighbour relation. So is the top: where
    it is trained on the records, every gradient depends on all of them.

    Raises:
        ConfigError: If a parameter makes no sense.
    """

    name: ClassVar[str] = "noisy_grad"
    channel: ClassVar[str] = "gradients"
    site: ClassVar[str] = "upper cut"

    def describe(self) -> dict[str, Any]:
        """Return its name and parameters."""
        return {**described(self), "sigma": self.sigma}

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return one release a sequence."""
        unit = f"{SEQUENCE} and number of labels"
        release = Release(self.name, self.channel, unit, self.clip, self.sigma, self.sigma / 2)
        return per_sequence(release, batch_size, records)

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the gradient to send, (B, T, D)."""
        return self._noisy(self.signal(tensor_BTD, mask_BT), tensor_BTD.dtype)


@dataclass(frozen=True)
class GaussianNoise:
    """Noise in proportion to the tensor's own size, without a clip: an obstacle, no guarantee.

    Raises:
        ConfigError: If a parameter makes no sense.
    """

    nsr: float
    """Standard deviation of the noise over the root mean square of the tensor."""
    channel: str = "activations"

    name: ClassVar[str] = "gaussian"
    formal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        faults: list[str] = []
        positive(faults, nsr=self.nsr)
        if self.channel not in CHANNELS[:2]:
            faults.append(f"channel = {self.channel!r} must be one of activations, gradients")
        raise_faults(self.name, faults)

    @property
    def site(self) -> str:
        """The cut of its channel."""
        return "lower cut" if self.channel == "activations" else "upper cut"

    def describe(self) -> dict[str, Any]:
        """Return its name and parameters."""
        return described(self)

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return one release a sequence, none of them formal."""
        release = Release(self.name, self.channel, "none", 0.0, self.nsr, 0.0, formal=False)
        return per_sequence(release, batch_size, records)

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the tensor with noise, (B, T, D)."""
        with torch.no_grad():
            kept_BTD = tensor_BTD.detach().double()
            if mask_BT is not None:
                kept_BTD = kept_BTD[mask_BT.to(kept_BTD.device) != 0]
            rms = kept_BTD.square().mean().sqrt().nan_to_num()
            noise_BTD = secure_normal(tensor_BTD.shape).to(rms.device) * (self.nsr * rms)
        return tensor_BTD + noise_BTD.to(tensor_BTD.dtype)


class NoBackward:
    """D3a: no gradient leaves, so the labels do not. A mode of the client rather than a filter."""

    name: ClassVar[str] = "no_backward"
    channel: ClassVar[str] = "gradients"
    site: ClassVar[str] = "upper cut"
    formal: ClassVar[bool] = False

    def describe(self) -> dict[str, Any]:
        """Return its name."""
        facts = {"name": self.name, "channel": self.channel, "site": self.site}
        return {**facts, "formal": self.formal}

    def releases(self, batch_size: int, records: Sequence[str] = ()) -> list[Release]:
        """Return nothing: nothing leaves."""
        return []

    def apply(self, tensor_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Raise: a gradient was about to leave.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "no_backward lets no gradient leave, and one was about to: train the top only"
        )
