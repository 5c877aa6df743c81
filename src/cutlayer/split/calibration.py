"""How fast this machine is at what a split run does: a few seconds of layers and of a head.

Two layers with LoRA run forward and backward as a trunk does, and a head with its loss as a client
does it; weights are random. A model whose layers are large is stood for by a smaller one: what
counts is operations per second.
"""

# Shapes:  B batch   T tokens   D model width   V vocabulary

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig

from cutlayer.split.adapters import ADAPTER
from cutlayer.split.cut import Cut, Trunk, keep_trunk
from cutlayer.split.loading import Skeleton, skeleton_of
from cutlayer.split.prediction import Speed
from cutlayer.split.trace import trace

__all__ = ["measured_speed"]

_LARGEST = 24_000_000
"""Numbers in a layer that is measured itself; also in the head."""
_LAYERS = 2


def measured_speed(
    skeleton: Skeleton,
    config: LoraConfig,
    *,
    tokens: int = 256,
    dtype: torch.dtype = torch.float32,
    repeats: int = 3,
) -> Speed:
    """Measure this machine, with as many threads as torch has now.

    Args:
        skeleton: The model on `meta`; it is not loaded.
        config: The LoRA.
        tokens: In the one row that is computed.
        dtype: Of the base weights.
        repeats: Of each measurement, after one that does not count; the fastest is taken.
    """
    layers = skeleton.anatomy.layers(skeleton.model)
    if sum(p.numel() for p in layers[0].parameters()) > _LARGEST or len(layers) < _LAYERS:
        config = LoraConfig(r=config.r, target_modules="all-linear")
        skeleton = skeleton_of(_stand_in(), "causal-lm")
    pieces = trace(skeleton, config, columns=tokens, dtype=dtype)
    flops = sum(p.forward_flops + p.backward_flops for p in pieces.layers[:_LAYERS])
    layers_s = _fastest(_layers_step(skeleton, config, tokens, dtype), repeats)
    head_flops, head_step = _head_step(pieces.width, pieces.vocabulary, tokens, dtype)
    return Speed(flops / layers_s, head_flops / _fastest(head_step, repeats))


def _stand_in() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=16384,
        tie_word_embeddings=True,
    )


def _fastest(step: Callable[[], None], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        started_s = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds[1:])


def _layers_step(
    skeleton: Skeleton, config: LoraConfig, tokens: int, dtype: torch.dtype
) -> Callable[[], None]:
    model = copy.deepcopy(skeleton.model)
    cut = Cut(0, _LAYERS)
    keep_trunk(model, skeleton.anatomy, cut)
    called = PeftModel(model, copy.deepcopy(config), ADAPTER, low_cpu_mem_usage=True)
    for module in called.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kind = torch.float32 if parameter.requires_grad else dtype
                drawn = torch.randn(parameter.shape).to(kind) * 0.02
                module._parameters[name] = nn.Parameter(drawn, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    called.train()
    trunk = Trunk(model, skeleton.anatomy, cut)
    width = model.config.get_text_config().hidden_size
    smashed_BTD = torch.randn(1, tokens, width, dtype=dtype)

    def step() -> None:
        out_BTD = trunk(smashed_BTD.clone().requires_grad_(True), {})
        out_BTD.backward(torch.ones_like(out_BTD))

    return step


def _head_step(
    width: int, vocabulary: int, tokens: int, dtype: torch.dtype
) -> tuple[float, Callable[[], None]]:
    """Return the operations of a head with its loss, and what runs it."""
    width = max(min(width, _LARGEST // vocabulary), 16)
    weight_VD = torch.randn(vocabulary, width, dtype=dtype) * 0.02
    hidden_TD = torch.randn(tokens, width, dtype=dtype)
    labels_T = torch.zeros(tokens, dtype=torch.long)

    def step() -> None:
        leaf_TD = hidden_TD.clone().requires_grad_(True)
        functional.cross_entropy((leaf_TD @ weight_VD.T).float(), labels_T).backward()

    return 4.0 * tokens * width * vocabulary, step
