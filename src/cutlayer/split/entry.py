"""What a model was entered with: the part of it that the trunk needs too."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cutlayer.errors import CannotCut
from cutlayer.split.cut import Anatomy

__all__ = ["CARRIED", "Entry", "watch_entry"]

# What the trunk needs besides the activations. Both are taken where the model is entered, because
# below that point a family has already turned them into masks and angles of its own kind.
CARRIED = ("attention_mask", "position_ids")
# What must not reach the server; the client's own audit compares with it.
_TRUTH = ("input_ids", "labels", "shift_labels")
# What a model collects from its layers.
_OF_ALL_LAYERS = ("output_attentions", "output_hidden_states", "output_router_logits")


@dataclass
class Entry:
    """What was handed to a model when it was entered, as far as the trunk needs it."""

    carried: dict[str, Tensor] = field(default_factory=dict)
    truth: dict[str, Tensor] = field(default_factory=dict)
    """Tokens and labels as the model was called with them; they stay at the client."""
    withheld: dict[str, Tensor] = field(default_factory=dict)
    """What belongs to the truth though the model is now called without it."""
    depth: int = 0


def watch_entry(model: PreTrainedModel, anatomy: Anatomy) -> Entry:
    """Return a record that holds what `model` was last called with, while it runs.

    The outermost module around the layers that is called decides: trainers and PEFT call a model
    at different depths, and OPT bypasses its base model.

    Raises (in the model's forward):
        CannotCut: If attentions, hidden states or router logits of all layers are asked for.
    """
    entry = Entry()
    for module in anatomy.ancestors(model):
        signature = inspect.signature(module.forward)

        def enter(
            _module: nn.Module, args: Any, kwargs: Any, _signature: inspect.Signature = signature
        ) -> None:
            entry.depth += 1
            if entry.depth > 1:
                return
            bound = _signature.bind_partial(*args, **kwargs).arguments
            given = {**bound, **bound.get("kwargs", {}), **kwargs}
            _refuse_of_all_layers(model.config.get_text_config(), given)
            entry.carried = {k: given[k] for k in CARRIED if isinstance(given.get(k), Tensor)}
            truth = {k: given[k] for k in _TRUTH if isinstance(given.get(k), Tensor)}
            entry.truth = {**entry.withheld, **truth}

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            entry.depth -= 1

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)
    return entry


def _refuse_of_all_layers(config: PreTrainedConfig, given: Mapping[str, Any]) -> None:
    has_loss = any(given.get(name) is not None for name in ("labels", "shift_labels"))
    for name in _OF_ALL_LAYERS:
        asked = given.get(name)
        # Of what routers say nothing but the loss is made.
        if asked is None and (has_loss or name != "output_router_logits"):
            asked = getattr(config, name, False)
        if asked:
            raise CannotCut(
                f"{name}=True cannot be answered: the trunk's layers are remote; leave it out, "
                "also of the model's config"
            )
