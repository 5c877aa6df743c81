"""The frozen trunk in 8 bits: half or a quarter of its memory, and other numbers.

Its linear layers' weights are stored in 8 bits with a scale for each row and widened in every
product, by torchao; adapters, gradients and activations keep their dtype. That buys room, not
speed. A run over such a trunk is the run over these weights and no other's, so both sides must name
it in the handshake; the adapter was trained beside rounded weights and is served best beside them.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from cutlayer.errors import ConfigError
from cutlayer.split.cut import Anatomy, Cut

__all__ = ["QUANTIZATIONS", "quantize_trunk"]

QUANTIZATIONS = ("", "int8", "float8")
"""None; 8-bit integers; 8-bit floats (e4m3)."""


def quantize_trunk(model: PreTrainedModel, anatomy: Anatomy, cut: Cut, kind: str) -> None:
    """Store the linear weights of layers[lower:upper] in 8 bits, in place.

    Raises:
        ConfigError: If the kind is unknown, or torchao is not installed.
    """
    if kind not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS[1:])
        raise ConfigError(f"quantization '{kind}' is unknown: one of {known}")
    if not kind:
        return
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ConfigError(
            f"quantization '{kind}' needs torchao, which is not installed: "
            "pip install 'cutlayer[quantized]'"
        ) from error
    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    for layer in list(anatomy.layers(model))[cut.lower : cut.upper]:
        quantize_(layer, config)
