"""The optimizers that a client may name, and how it names their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["OPTIMIZERS", "Group"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    cls.__name__: cls
    for cls in (
        torch.optim.AdamW,
        torch.optim.Adam,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adafactor,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.SGD,
    )
}


@dataclass(frozen=True)
class Group:
    """One parameter group of an optimizer, as the client's optimizer has it at this step."""

    numbers: Mapping[str, float]
    flags: Mapping[str, bool]
    betas: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    """The trunk's parameters in this group; given at an optimizer's first step only."""
