"""The optimizers that a client may name, and how it names their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cutlayer.errors import Refused

__all__ = ["OPTIMIZERS", "Group", "make_optimizer"]

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


def make_optimizer(
    name: str, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Return an optimizer of the table over a trunk's parameters.

    Raises:
        Refused: If the optimizer is not in the table, its groups do not name each parameter once,
            or it refuses its settings.
    """
    if name not in OPTIMIZERS:
        raise Refused(f"optimizer '{name}' is unknown: one of {', '.join(OPTIMIZERS)}")
    named = [parameter for group in groups for parameter in group.names]
    if sorted(named) != sorted(parameters):
        raise Refused(
            f"the optimizer's groups name {len(named)} parameters and the trunk trains "
            f"{len(parameters)}: each must be in exactly one group"
        )
    try:
        return OPTIMIZERS[name](
            [
                {
                    "params": [parameters[n] for n in group.names],
                    **group.numbers,
                    **group.flags,
                    **({"betas": group.betas} if group.betas else {}),
                }
                for group in groups
            ]
        )
    except (TypeError, ValueError) as error:
        raise Refused(f"optimizer {name} refuses its settings: {error}") from None
