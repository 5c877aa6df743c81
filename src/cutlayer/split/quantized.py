"""The frozen trunk in 8 or 4 bits: less memory, and other numbers.

Its linear layers' weights are stored in 8 bits with a scale for each row, by torchao, or in 4 bits
with a scale for each 64 of them, by bitsandbytes, and widened in every product; adapters, gradients
and activations keep their dtype. That buys room, not speed. A run over such a trunk is the run over
these weights and no other's, so both sides must name it in the handshake; the adapter was trained
beside rounded weights and is served best beside them.

References:
    NF4 and double quantization: Dettmers et al., 2023, https://arxiv.org/abs/2305.14314
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from cutlayer.errors import ConfigError
from cutlayer.split.cut import Anatomy, Cut

__all__ = ["QUANTIZATIONS", "quantize_trunk"]

QUANTIZATIONS = ("", "int8", "float8", "nf4")
"""None; 8-bit integers; 8-bit floats (e4m3); 4-bit floats, their scales in 8 bits themselves."""


def quantize_trunk(model: PreTrainedModel, anatomy: Anatomy, cut: Cut, kind: str) -> None:
    """Store the linear weights of layers[lower:upper] in 8 or 4 bits, in place.

    Raises:
        ConfigError: If the kind is unknown, its package is not installed, or these layers have
            nothing to store so.
    """
    if kind not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS[1:])
        raise ConfigError(f"quantization '{kind}' is unknown: one of {known}")
    if not kind:
        return
    layers = list(anatomy.layers(model))[cut.lower : cut.upper]
    if not any(_can_store(module, kind) for layer in layers for module in layer.modules()):
        raise ConfigError(
            f"quantization '{kind}' finds no linear layer that it can store in layers {cut} of "
            f"this model ('{model.config.model_type}'): leave it out"
        )
    package = "bitsandbytes" if kind == "nf4" else "torchao"
    try:
        _quantize(layers, kind)
    except ImportError as error:
        raise ConfigError(
            f"quantization '{kind}' needs {package}, which is not installed: "
            "pip install 'cutlayer[quantized]'"
        ) from error
    # By this peft knows that a LoRA here may lie beside 4 bits.
    model.is_loaded_in_4bit = kind == "nf4"


def _can_store(module: nn.Module, kind: str) -> bool:
    # With AVX512, bitsandbytes 0.50 widens rows of 48 or 80 by scales of other rows: it writes
    # blocks of 64 across rows and reads them within. Layers of such rows stay as they are.
    return isinstance(module, nn.Linear) and (kind != "nf4" or module.in_features % 64 == 0)


def _quantize(layers: Sequence[nn.Module], kind: str) -> None:
    if kind == "nf4":
        for layer in layers:
            for name, module in list(layer.named_modules()):
                if _can_store(module, kind):
                    assert isinstance(module, nn.Linear)
                    layer.set_submodule(name, _nf4(module))
        return
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    for layer in layers:
        quantize_(layer, config)


def _nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight.detach()
    sizes = (linear.in_features, linear.out_features)
    # The dtype of products is told, or the first input's would be kept for all that follow.
    stored = Linear4bit(*sizes, bias=False, compute_dtype=weight.dtype, device="meta")
    # Without `module`: a tenant's copy of the layer would hold a copy of the scales too.
    packed = Params4bit(weight, quant_type="nf4", compress_statistics=True)
    stored.weight = packed.to(weight.device)
    stored.bias = linear.bias
    # On CPUs with AVX512-BF16 an evaluation would rewrite the weights, which tenants share, for a
    # kernel that rounds to bfloat16 and has no backward; every later step would go through it.
    stored.support_avx512bf16_for_cpu = False
    return stored.train(linear.training)
