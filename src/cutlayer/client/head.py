"""The LM head, run where there is a loss only.

Of a small client's work the head is the most: its vocabulary is wide and the layers are few. But
only positions with a label have a loss. The states there are scored in tiles by the family's own
head, and the derivative of each token's log-probability by its state is found in the same pass: so
no more logits than a tile's are ever held, and nothing is computed twice. Where the client keeps no
layer above the cut, the trunk's output is asked for at these positions alone, and only their
gradients leave.

Equal to the whole head up to rounding: a matrix product of fewer rows may round otherwise.
"""

# Shapes:  B batch   T tokens   D model width   V vocabulary   N positions with a label

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from cutlayer.client.chunks import IGNORED_LABEL
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.errors import ConfigError
from cutlayer.split.cut import Anatomy, Cut

__all__ = ["LeanHead"]

_TILE_BYTES = 16 << 20
"""Of a tile's logits; a few times as much is held while a tile is scored."""


class LeanHead:
    """Runs a causal LM whose head and loss see the labelled positions only."""

    def __init__(
        self, ends: PreTrainedModel, remote: RemoteTrunk, anatomy: Anatomy, cut: Cut
    ) -> None:
        """Take a model whose adapter is in place.

        Args:
            ends: The client's parts.
            remote: What stands for the trunk, its departures arranged.
            anatomy: Where the model keeps its layers.
            cut: Where it is cut.

        Raises:
            ConfigError: If what scores the states is trained, whose own gradient needs every
                logit, or if the model's loss is not the usual one of its labels alone.
        """
        head = ends.get_output_embeddings()
        self._ends, self._remote = ends, remote
        # Whichever of these the model's forward calls: OPT's passes over the outermost.
        self._backbones = anatomy.ancestors(ends)[1:]
        if head is None or not self._backbones:
            raise ConfigError(
                f"lean_head is not for a {type(ends).__name__}, whose head is not a module apart "
                "from its layers: leave it out"
            )
        trained = self._trained_in_head(head)
        if trained:
            raise ConfigError(
                f"lean_head is for an LM head that is not trained, and '{trained[0]}' is: leave "
                "lean_head out, or the head out of the adapter"
            )
        if not _shifts_labels(ends):
            raise ConfigError(
                f"lean_head gives transformers' loss of a causal LM, and a {type(ends).__name__} "
                "has another: leave it out"
            )
        if _wants_router_logits(ends):
            raise ConfigError(
                "lean_head gives the labels' loss alone, and output_router_logits=True in the "
                "model's config adds the router's: leave one of them out"
            )
        self._tile = max(1, _TILE_BYTES // (4 * len(head.weight)))
        # A layer above mixes positions; a defense of the gradient hides which of them have a label.
        is_all = cut.upper == anatomy.num_layers
        self._asks_labelled_only = is_all and remote.departures.defense("upper cut") is None

    def _trained_in_head(self, head: nn.Module) -> list[str]:
        """Return the names of what is trained of the head, or between it and the last layer."""
        # A head that is tied has the embedding's weight, which is named within the backbone.
        own = {id(parameter) for parameter in head.parameters()}
        inside = {id(parameter) for parameter in self._backbones[0].parameters()} - own
        return [
            name
            for name, parameter in self._ends.named_parameters()
            if parameter.requires_grad and id(parameter) not in inside
        ]

    def scores(self, kwargs: Mapping[str, Any], *, training: bool, by_trl: bool) -> bool:
        """Say whether a call's loss is all that is asked of it.

        Args:
            kwargs: What the model is called with.
            training: Whether it is in training; in evaluation, logits are wanted.
            by_trl: Whether TRL's SFT loss is made of log-probabilities, at temperature 1.
        """
        labels = kwargs.get("labels", kwargs.get("shift_labels"))
        is_asked = by_trl if kwargs.get("fused_lm_head") else training
        more = kwargs.get("output_hidden_states") or kwargs.get("output_router_logits")
        more = more or _wants_router_logits(self._ends)
        return isinstance(labels, Tensor) and is_asked and not more

    def run(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward; what it returns has the shape that it has without us.

        Where the model makes the loss itself, the logits are `None`.
        """
        is_shifted = kwargs.get("shift_labels") is not None
        labels_BT, shifted_BT = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if not is_shifted:
            shifted_BT = pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
        items = kwargs.pop("num_items_in_batch", None)
        by_trl = kwargs.pop("fused_lm_head", False)
        scored_BT = shifted_BT != IGNORED_LABEL
        truth = {"shift_labels": shifted_BT} if is_shifted else {"labels": labels_BT}
        with self._calling(scored_BT, truth), self._without_head(scored_BT) as taken:
            run(*args, **kwargs)
        states_ND, logits_of = self._taken(taken)
        log_probs_N, entropy_N, is_top_N = _Scored.apply(
            states_ND, shifted_BT[scored_BT], logits_of, self._tile
        )
        loss = -log_probs_N.sum() / (max(len(log_probs_N), 1) if items is None else items)
        if not by_trl:
            return CausalLMOutputWithPast(loss=loss)
        from trl.trainer.utils import FusedCausalLMOutput

        end = None if is_shifted else -1
        rows = {"log_probs": log_probs_N, "entropy": entropy_N, "is_top1": is_top_N}
        placed = {name: _placed(value_N, scored_BT)[:, :end] for name, value_N in rows.items()}
        return FusedCausalLMOutput(loss=loss, label_mask=scored_BT[:, :end], **placed)

    @contextlib.contextmanager
    def _calling(self, scored_BT: Tensor, truth: dict[str, Tensor]) -> Iterator[None]:
        """While open, the trunk is asked for what is scored, and a transcript knows the labels."""
        self._remote.entry.withheld = truth
        if self._asks_labelled_only:
            positions_N = scored_BT.flatten().nonzero()[:, 0]
            # Something must come back, be it of no use.
            self._remote.wanted_N = positions_N if len(positions_N) else positions_N.new_zeros(1)
        try:
            yield
        finally:
            self._remote.wanted_N, self._remote.entry.withheld = None, {}

    @contextlib.contextmanager
    def _without_head(self, scored_BT: Tensor) -> Iterator[list[_Taken]]:
        """While open, a forward leaves the states to be scored here, and its head sees one row."""
        entered: list[nn.Module] = []
        taken: list[_Taken] = []

        def enter(module: nn.Module, _args: Any) -> None:
            entered.append(module)

        def take(module: nn.Module, _args: Any, output: Any) -> Any:
            # The outermost that is called has done all that there is but the head.
            if module is not entered[0]:
                return output
            states_BTD = getattr(output, "last_hidden_state", None)
            if states_BTD is None:
                return output
            taken.append(_Taken(module, type(output), states_BTD[scored_BT.to(states_BTD.device)]))
            return _with_states(output, states_BTD[:1, :1].detach())

        hooks = [module.register_forward_pre_hook(enter) for module in self._backbones]
        hooks += [module.register_forward_hook(take) for module in self._backbones]
        try:
            yield taken
        finally:
            for hook in hooks:
                hook.remove()

    def _taken(self, taken: list[_Taken]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the states to be scored, and what scores them."""
        if not taken:
            raise ConfigError(
                f"lean_head cannot find the states that the head of {type(self._ends).__name__} "
                "scores: leave it out"
            )
        (found,) = taken
        return found.states_ND, functools.partial(self._logits, found.backbone, found.kind)

    def _logits(self, backbone: nn.Module, kind: type[Any], states_ND: Tensor) -> Tensor:
        """Return the logits of states, scaled and capped as the family does it."""
        # In its family's kind, since the head reads fields that others have not.
        output = kind(last_hidden_state=states_ND[None])
        backbone.forward = lambda *_args, **_kwargs: output
        try:
            tokens_1N = torch.zeros(1, len(states_ND), dtype=torch.long, device=states_ND.device)
            # Not by a call, which would be taken for another entry into the model.
            logits_1NV: Tensor = self._ends.forward(input_ids=tokens_1N, use_cache=False).logits
        finally:
            del backbone.forward  # the class's own again
        return logits_1NV[0]


@dataclass(frozen=True)
class _Taken:
    """What a forward leaves to be scored."""

    backbone: nn.Module
    """What gave the states."""
    kind: type[Any]
    """What its output is."""
    states_ND: Tensor


def _with_states(output: Any, states_BTD: Tensor) -> Any:
    """Return a backbone's output with other states and all its other fields."""
    return type(output)(**{**output, "last_hidden_state": states_BTD})


def _shifts_labels(ends: PreTrainedModel) -> bool:
    """Say whether a model's loss is the usual one: TrOCR's, of its own making, shifts nothing."""
    names = inspect.unwrap(type(ends).forward).__code__.co_names
    return "loss_function" in names and ends.loss_function is ForCausalLMLoss


def _wants_router_logits(ends: PreTrainedModel) -> bool:
    return bool(getattr(ends.config.get_text_config(), "output_router_logits", False))


class _Scored(torch.autograd.Function):
    """Log-probability, entropy and being the likeliest, of each label given its state."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        labels_N: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        tile: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels_N = labels_N.to(states_ND.device)
        log_probs_N = states_ND.new_zeros(len(labels_N), dtype=torch.float32)
        entropy_N, is_top_N = torch.zeros_like(log_probs_N), torch.zeros_like(labels_N).bool()
        slope_ND = torch.zeros_like(states_ND)
        for start in range(0, len(labels_N), tile):
            span = slice(start, start + tile)
            with torch.enable_grad():
                states = states_ND[span].detach().requires_grad_()
                logits = logits_of(states)
            label, values = labels_N[span, None], logits.detach().float()
            log_z = values.logsumexp(-1, keepdim=True)
            chosen, likeliest = values.gather(1, label), values.amax(-1, keepdim=True)
            log_probs_N[span] = (chosen - log_z)[:, 0]
            is_top_N[span] = (chosen >= likeliest)[:, 0]
            probs = (values - log_z).exp_()
            entropy_N[span] = (log_z - (probs * values).sum(-1, keepdim=True))[:, 0]
            # The derivative of a label's log-probability by the logits: 1 at the label, less p.
            probs.neg_().scatter_add_(1, label, torch.ones_like(chosen))
            (slope_ND[span],) = torch.autograd.grad(logits, states, probs.to(logits.dtype))
        ctx.save_for_backward(slope_ND)
        ctx.mark_non_differentiable(entropy_N, is_top_N)
        return log_probs_N, entropy_N, is_top_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        (slope_ND,) = ctx.saved_tensors
        return slope_ND * grad_N[:, None].to(slope_ND.dtype), None, None, None


def _placed(values_N: Tensor, scored_BT: Tensor) -> Tensor:
    """Return the values at their positions, and zero elsewhere."""
    whole_BT = values_N.new_zeros(scored_BT.shape)
    return whole_BT.masked_scatter(scored_BT.to(values_N.device), values_N)
