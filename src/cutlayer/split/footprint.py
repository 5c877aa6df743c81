"""What a cut costs before anything is run: weights, bytes on the wire, floating-point operations.

Numbers come from the model without memory (`Skeleton`), so they are those of the real shapes.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from cutlayer.split.adapters import AdapterPlan
from cutlayer.split.cut import Cut
from cutlayer.split.loading import Skeleton

__all__ = ["Footprint", "footprint"]

FLOAT32_BYTES = 4
_DEPARTURES = ("activations_up", "activations_down", "gradients_up", "gradients_down")
_ADAM_STATES = 4  # parameter, gradient and two moments


@dataclass(frozen=True)
class Footprint:
    """The cost of one run at one cut."""

    client_weight_bytes: int
    trunk_weight_bytes: int
    client_state_bytes: int
    """Adapter, gradients and two moments of the client's half."""
    trunk_state_bytes: int
    """The same of the trunk's half: what one more tenant costs the server."""
    up_bytes: int
    """Sent per step: activations and the gradient at the upper cut."""
    activations_up_bytes: int
    """The activations among them, which `split_send_once` leaves out in later epochs."""
    down_bytes: int
    """Received per step."""
    client_flops: float
    """Per step, forward and backward."""
    trunk_flops: float


def footprint(
    skeleton: Skeleton,
    plan: AdapterPlan,
    cut: Cut,
    *,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    wire_bytes: Mapping[str, float] | None = None,
) -> Footprint:
    """Return what a step of so many tokens costs at this cut.

    A step computes 2 operations per weight and token forward, and as many backward where a
    gradient must pass; frozen weights get no gradient of their own.

    Args:
        skeleton: The whole model on `meta`.
        plan: Its adapter.
        cut: Where it is cut.
        tokens: Tokens in one step, padding included.
        dtype: Of the base weights.
        wire_bytes: Of a token, for each of `activations_up`, `activations_down`, `gradients_up` and
            `gradients_down`; those of `dtype` by default.
    """
    layers = skeleton.anatomy.layers(skeleton.model)
    trunk = sum(_numel(layers[n]) for n in range(cut.lower, cut.upper))
    bottom = sum(_numel(layers[n]) for n in range(cut.lower))
    top = sum(_numel(layers[n]) for n in range(cut.upper, skeleton.anatomy.num_layers))
    whole = _numel(skeleton.model)
    head = skeleton.model.get_output_embeddings()
    head_numel = _numel(head) if isinstance(head, nn.Module) else 0
    width = skeleton.model.config.get_text_config().hidden_size
    plain = dict.fromkeys(_DEPARTURES, width * dtype.itemsize)
    each = {name: round(tokens * size) for name, size in (plain | dict(wire_bytes or {})).items()}
    bottom_trains = any(_layer_below(name, skeleton, cut) for name in plan.client_parameters)
    return Footprint(
        client_weight_bytes=(whole - trunk) * dtype.itemsize,
        trunk_weight_bytes=trunk * dtype.itemsize,
        client_state_bytes=_state_bytes(plan.client_parameters),
        trunk_state_bytes=_state_bytes(plan.trunk_parameters),
        up_bytes=each["activations_up"] + each["gradients_up"],
        activations_up_bytes=each["activations_up"],
        down_bytes=each["activations_down"] + (each["gradients_down"] if bottom_trains else 0),
        client_flops=tokens
        * (2.0 * bottom * (2 if bottom_trains else 1) + 4.0 * (top + head_numel)),
        trunk_flops=tokens * 4.0 * trunk,
    )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _state_bytes(parameters: dict[str, tuple[int, ...]]) -> int:
    count = sum(torch.Size(shape).numel() for shape in parameters.values())
    return _ADAM_STATES * FLOAT32_BYTES * count


def _layer_below(name: str, skeleton: Skeleton, cut: Cut) -> bool:
    _, found, rest = name.partition(f"{skeleton.anatomy.layers_path}.")
    number = rest.partition(".")[0]
    # What stands before the list of layers (an embedding) is below every cut.
    return int(number) < cut.lower if found and number.isdigit() else "embed" in name
