"""Cut a Hugging Face model at two layers, with no line of code for any family.

A model of L layers is cut at `0 <= lower < upper <= L`:

    bottom   tokens_BT     -> smashed_BTD      everything before layers[lower]
    trunk    smashed_BTD   -> trunk_out_BTD    layers[lower:upper]
    top      trunk_out_BTD -> logits           layers[upper:L], norm, head and loss

The cut is surgery in place, never truncation: the family's own `forward` runs on both sides, and
what is elsewhere is replaced by a stand-in without memory. **Every layer keeps its number.** So
masks, rotary angles, position tables, embedding multipliers and alternating attention types stay
Hugging Face's business, and the parts' state dicts and adapters are disjoint with the ordinary
ones as their union (docs/decisions/0001).

References:
    U-shaped split: Vepakomma et al., 2018, https://arxiv.org/abs/1812.00564
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from cutlayer.errors import CannotCut

# Families whose own forward does something between the layers which a cut would lose. Each was
# found by the sweep of `make families`; docs/families.md is made from it.
_RECURRENT = "some of its layers keep a recurrent state, which a remote trunk cannot answer for"
_PER_LAYER_INPUTS = "its layers take inputs of their own that are computed from the tokens"
_SPREAD = "each of its layers is spread over several lists of modules"
_SHARED_TABLE = "its layers look positions up in a table outside them, which only one side can hold"
_STREAMS = "its layers hand on more than one tensor of hidden states"
_INSIDE = "its forward reaches into the layers instead of calling them"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba",
            "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h",
            "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text",
            "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm",
            "zamba", "zamba2",
        ),
        _RECURRENT,
    ),
    **dict.fromkeys(("gemma4", "gemma4_text"), _PER_LAYER_INPUTS),
    **dict.fromkeys(("flaubert", "xlm"), _SPREAD),
    **dict.fromkeys(("git", "inkling2_text", "xmod"), _INSIDE),
    **dict.fromkeys(("deberta", "deberta-v2", "layoutlmv3", "mpnet", "roformer"), _SHARED_TABLE),
    **dict.fromkeys(("ibert", "lilt", "reformer", "xlnet", "zaya"), _STREAMS),
    **dict.fromkeys(("emu3", "mllama"), "its text model has no checkpoint of its own"),
    "longformer": "its forward computes the global attention from the tokens",
    "canine": "its layers see a shortened sequence of characters",
    **dict.fromkeys(("cpmant", "esmc"), "its forward takes tokens only and no activations"),
}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """Where a model is cut, as counts of layers below each cut."""

    lower: int
    """Number of layers below the trunk."""
    upper: int
    """Number of layers below the top."""

    def __str__(self) -> str:
        return f"{self.lower}:{self.upper}"

    def __contains__(self, layer: int) -> bool:
        """Say whether the trunk has this layer."""
        return self.lower <= layer < self.upper

    def covers(self, other: Cut) -> bool:
        """Say whether every layer of the other's trunk is in this one."""
        return self.lower <= other.lower and other.upper <= self.upper

    @classmethod
    def leaving(cls, *, bottom_layers: int, top_layers: int, num_layers: int) -> Cut:
        """Return the cut that leaves these many layers to the client.

        Raises:
            CannotCut: If no layer is left for the trunk, or a count is negative.
        """
        cut = cls(bottom_layers, num_layers - top_layers)
        if bottom_layers < 0 or top_layers < 0 or cut.lower >= cut.upper:
            raise CannotCut(
                f"bottom_layers={bottom_layers} and top_layers={top_layers} leave no trunk in a "
                f"model of {num_layers} layers: their sum must be at least 0 and less than "
                f"{num_layers}"
            )
        return cut


@dataclass(frozen=True)
class Anatomy:
    """Where one model keeps its layers, and how it calls them."""

    layers_path: str
    """Dotted path of the list of layers, such as `model.layers` or `transformer.h`."""
    num_layers: int
    returns: int | None
    """`None` if a layer returns a tensor, else the length of the tuple that it returns."""

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Return the list of layers of `model`."""
        found = model.get_submodule(self.layers_path)
        assert isinstance(found, nn.ModuleList)
        return found

    def ancestors(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules around the list of layers, the outermost first."""
        parts = self.layers_path.split(".")
        return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]

    def as_returned(self, hidden_BTD: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """Return a layer's output in the form in which this family expects it."""
        return hidden_BTD if self.returns is None else (hidden_BTD, *[None] * (self.returns - 1))


def refuse_by_name(config: PreTrainedConfig) -> None:
    """Refuse a family that cannot be cut, before anything of it is built or loaded.

    Raises:
        CannotCut: With the family and the reason.
    """
    text = config.get_text_config()
    reason = REFUSED.get(config.model_type) or REFUSED.get(text.model_type)
    if config.is_encoder_decoder or getattr(text, "add_cross_attention", False):
        reason = "its decoder attends to an encoder (cross-attention)"
    if reason:
        raise CannotCut(
            f"models of type '{config.model_type}' cannot be cut: {reason}; docs/families.md "
            "lists those that can"
        )


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Return where `model` (on any device, `meta` included) keeps its layers.

    Raises:
        CannotCut: If there is no uniform list of layers, if layers share parameters, or if a
            layer does not take and return one (B, T, D) tensor.
    """
    refuse_by_name(model.config)
    text = model.config.get_text_config()
    num_layers = getattr(text, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and num_layers and len(module) == num_layers
    ]
    kind = model.config.model_type
    if not lists:
        raise CannotCut(f"models of type '{kind}' cannot be cut: no uniform list of layers")
    path, layers = min(lists, key=lambda item: item[0].count("."))
    seen: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            if seen.setdefault(id(parameter), number) != number:
                raise CannotCut(
                    f"models of type '{kind}' cannot be cut: layers {seen[id(parameter)]} and "
                    f"{number} share parameters"
                )
    return Anatomy(path, len(layers), _what_layers_return(model, layers))


class _Seen(Exception):
    """Raised to leave a model's forward once enough was seen."""


def _what_layers_return(model: PreTrainedModel, layers: nn.ModuleList) -> int | None:
    """Run up to the first layer on two made-up tokens and look at the form of its answer."""
    seen: list[Any] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output)
        raise _Seen

    handle = layers[0].register_forward_hook(look)
    hollow = dict(_hollow_state(model))
    tokens_BT = torch.ones(1, 2, dtype=torch.long)
    inputs = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
    try:
        with torch.no_grad(), contextlib.suppress(_Seen):
            torch.func.functional_call(model, hollow, (), {**inputs, "use_cache": False})
    finally:
        handle.remove()
    kind = model.config.model_type
    if not seen:
        raise CannotCut(
            f"models of type '{kind}' cannot be cut: its forward does not call the list of layers"
        )
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise CannotCut(
            f"models of type '{kind}' cannot be cut: its layers do not return one tensor of "
            "batch x tokens x width"
        )
    return len(seen[0]) if isinstance(seen[0], tuple) else None


def _hollow_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield zeros for what is on `meta`; the system lends the pages, so they take no memory."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            pages = np.zeros(max(tensor.nbytes, 1), dtype=np.uint8)
            flat = torch.from_numpy(pages)[: tensor.nbytes].view(tensor.dtype)
            yield name, flat.view(tensor.shape)


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a layer was called with, (B, T, D)."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden_BTD: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a layer's arguments with other hidden states in their place."""
    if args:
        return (hidden_BTD, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden_BTD}


def cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """Return the KV cache that a layer was called with, if any."""
    caches = [v for v in (*args, *kwargs.values()) if isinstance(v, Cache)]
    # Families that can attend to an encoder wrap the cache of a decoder alone in one for both.
    return getattr(caches[0], "self_attention_cache", caches[0]) if caches else None


def note_in_cache(cache: Cache | None, layer: int, note_BT: Tensor) -> Tensor | None:
    """Write one number per token into an absent layer's slot of a KV cache; return the slot.

    Masks and offsets are read from the first layer's slot, so an absent layer must grow as the
    others do. A slot of width 0 would be taken for empty, hence one number.
    """
    slots = getattr(cache, "layers", [])
    if cache is None or (layer < len(slots) and not hasattr(slots[layer], "keys")):
        return None
    note = note_BT[:, None, :, None]
    keys, _values = cache.update(note, note, layer)
    return keys[:, 0, :, 0]


class PassThrough(nn.Module):
    """Stand where a layer of the other side would be: no parameters, hands on what it is given."""

    def __init__(self, layer: nn.Module, number: int, anatomy: Anatomy) -> None:
        super().__init__()
        self._number = number
        self._anatomy = anatomy
        carry_attributes(layer, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states unchanged, in the family's form."""
        hidden_BTD = hidden_of(args, kwargs)
        note_in_cache(
            cache_of(args, kwargs), self._number, hidden_BTD.new_zeros(hidden_BTD.shape[:2])
        )
        return self._anatomy.as_returned(hidden_BTD)


def carry_attributes(source: nn.Module, target: nn.Module) -> None:
    """Copy the plain attributes that a family's loop may read (`attention_type`, `layer_idx`)."""
    for name, value in vars(source).items():
        if not name.startswith("_") and name != "training" and isinstance(value, int | str | None):
            setattr(target, name, value)


class _Organ(nn.Module):
    """Stand where the server lacks an organ (embedding, position table, norm, head)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first hidden states among the inputs, or a zero to add to them.

        Raises:
            CannotCut: If there is no input at all: the family looks up tokens that are elsewhere.
        """
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        for tensor in tensors:
            # A mask may be floating-point too: OPT makes one up and looks positions up by it.
            if tensor.is_floating_point() and tensor.dim() > 2:
                return tensor
        if not tensors:
            raise CannotCut("this model takes tokens only: it cannot be entered with activations")
        # As wide as a position, as long as any number of them: a mask is longer than its queries.
        return torch.zeros(1, 1, self._width, device=tensors[0].device)


def keep_ends(model: PreTrainedModel, anatomy: Anatomy, cut: Cut, remote: nn.Module) -> None:
    """Make `model` the client's part: `remote` stands for the trunk, the ends stay."""
    layers = anatomy.layers(model)
    for number in range(cut.lower + 1, cut.upper):
        layers[number] = PassThrough(layers[number], number, anatomy)
    carry_attributes(layers[cut.lower], remote)
    layers[cut.lower] = remote


def keep_trunk(model: PreTrainedModel, anatomy: Anatomy, cut: Cut) -> None:
    """Make `model` the server's part: the trunk stays, all else becomes stand-ins."""
    layers = anatomy.layers(model)
    for number in range(anatomy.num_layers):
        if number not in cut and not isinstance(layers[number], PassThrough):
            layers[number] = PassThrough(layers[number], number, anatomy)
    _replace_organs(model, layers, model.config.get_text_config().hidden_size)


def _replace_organs(module: nn.Module, layers: nn.ModuleList, width: int) -> None:
    for name, child in module.named_children():
        if child is layers:
            continue
        if any(inner is layers for inner in child.modules()):
            _replace_organs(child, layers, width)
        elif next(child.parameters(), None) is not None:
            setattr(module, name, _Organ(width))


class Trunk:
    """Call layers[lower:upper] of a model that `keep_trunk` has made.

    One `Trunk` serves one call at a time: it keeps the incoming activations while it runs.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, cut: Cut) -> None:
        self.model = model
        self._incoming_BTD: Tensor | None = None
        self._outgoing_BTD: Tensor | None = None
        layers = anatomy.layers(model)
        layers[cut.lower].register_forward_pre_hook(self._put, with_kwargs=True)
        layers[cut.upper - 1].register_forward_hook(self._take)

    def _put(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        assert self._incoming_BTD is not None
        return with_hidden(args, kwargs, self._incoming_BTD)

    def _take(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._outgoing_BTD = output[0] if isinstance(output, tuple) else output
        raise _Seen

    def __call__(
        self,
        smashed_BTD: Tensor,
        carried: dict[str, Tensor],
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the trunk's output, (B, T, D), for the activations that came up.

        Args:
            smashed_BTD: The activations before layer `lower`.
            carried: `attention_mask` and `position_ids` as the client's model was given them.
            cache: The trunk's own KV cache, which is extended.
        """
        # Families multiply this, add positions to it, and hand it to layers[lower], whose
        # pre-hook drops it: only its shape counts. Some write into it, so it has its own memory.
        placeholder_BTD = torch.zeros_like(smashed_BTD, requires_grad=False)
        self._incoming_BTD, self._outgoing_BTD = smashed_BTD, None
        try:
            with contextlib.suppress(_Seen):
                self.model(
                    inputs_embeds=placeholder_BTD,
                    past_key_values=cache,
                    use_cache=cache is not None,
                    **carried,
                )
            assert self._outgoing_BTD is not None
            return self._outgoing_BTD
        finally:
            self._incoming_BTD = self._outgoing_BTD = None


@contextlib.contextmanager
def bottom_bypassed(model: nn.Module, anatomy: Anatomy, cut: Cut) -> Iterator[None]:
    """While open, the bottom's layers hand on what they are given, so a forward is the top's."""
    below = list(anatomy.layers(model))[: cut.lower]
    stand_ins = [PassThrough(layer, number, anatomy) for number, layer in enumerate(below)]
    for layer, stand_in in zip(below, stand_ins, strict=True):
        layer.__dict__["forward"] = stand_in.forward
    try:
        yield
    finally:
        for layer in below:
            del layer.__dict__["forward"]
