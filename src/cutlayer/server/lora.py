"""The LoRA that a client asks for: plain names and numbers, checked."""

from __future__ import annotations

import math

from cutlayer.errors import ConfigError
from cutlayer.server.trunk import SharedTrunk
from cutlayer.split.adapters import LoraTarget, TrunkLora
from cutlayer.split.cut import Cut
from cutlayer.wire import cutlayer_pb2 as pb

__all__ = ["lora_of"]


def lora_of(asked: pb.LoraSpec, trunk: SharedTrunk, cut: Cut) -> TrunkLora:
    """Return the LoRA that a client asks for, checked against the trunk's modules.

    Raises:
        ConfigError: If a target is no module of the layers of `cut`, or a number is out of bounds.
    """
    layers = dict(trunk.anatomy.layers(trunk.model).named_modules())
    prefix = trunk.anatomy.layers_path + "."
    for module in asked.modules:
        inner = module.name.removeprefix(prefix)
        number = inner.partition(".")[0]
        in_trunk = inner != module.name and number.isdigit() and int(number) in cut
        if not in_trunk or inner not in layers:
            raise ConfigError(
                f"LoRA target '{module.name}' is no module of layers {cut}: the client and the "
                "server disagree about the model"
            )
        if not (math.isfinite(module.alpha) and module.alpha > 0):
            raise ConfigError(f"LoRA alpha {module.alpha} of '{module.name}' must be above 0")
    if not 0 <= asked.dropout < 1:
        raise ConfigError(f"LoRA dropout {asked.dropout} must be at least 0 and below 1")
    return TrunkLora(
        tuple(LoraTarget(m.name, m.rank, m.alpha) for m in asked.modules),
        dropout=asked.dropout,
        use_rslora=asked.use_rslora,
        use_dora=asked.use_dora,
        gaussian_init=asked.gaussian_init,
        fan_in_fan_out=asked.fan_in_fan_out,
        seed=asked.seed,
    )
