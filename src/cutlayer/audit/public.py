"""What an attacker has before anything is sent: the public base model, cut where the run is.

Everybody can download the base weights, so everybody can run the client's bottom and top. The
server can therefore compute what any text would look like on the wire, and what any label would
send back. All attacks of this room are built on the three calls of `PublicModel`.
"""

# Shapes:  B batch   T tokens   D model width   V vocabulary   N candidates

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from cutlayer.errors import ConfigError
from cutlayer.split.cut import Anatomy, Cut, bottom_bypassed, hidden_of
from cutlayer.split.loading import load_ends, open_checkpoint, skeleton_of

__all__ = ["PublicModel"]


class _Reached(Exception):
    """Raised to leave a model's forward once what was wanted is there."""


class _Seam(nn.Module):
    """Stand where the trunk would be: catch what comes up, or put in what is said to come down."""

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        self._anatomy = anatomy
        self.given_BTD: Tensor | None = None
        self.caught_BTD: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do so."""
        if self.given_BTD is not None:
            return self._anatomy.as_returned(self.given_BTD)
        self.caught_BTD = hidden_of(args, kwargs)
        raise _Reached


class PublicModel:
    """Bottom and top of a public model at a cut, as anybody can run them.

    Attributes:
        config: The model's config.
        cut: The cut.
        head_VD: The weights of the head, (V, D) or (classes, D).
        head_bias: Its bias, (V,), if it has one.
    """

    def __init__(self, ends: PreTrainedModel, seam: _Seam, anatomy: Anatomy, cut: Cut) -> None:
        self.config = ends.config
        self.cut = cut
        self._ends = ends.eval().requires_grad_(False)
        self._seam = seam
        self._anatomy = anatomy
        head = _head_of(ends)
        self._head = head
        self.head_VD: Tensor = head.weight
        self.head_bias: Tensor | None = getattr(head, "bias", None)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        bottom_layers: int,
        top_layers: int,
        task: str = "causal-lm",
        revision: str | None = None,
        **settings: Any,
    ) -> PublicModel:
        """Load a model's ends from a folder or the hub, in float32 unless `dtype` says otherwise.

        Raises:
            ModelError: If the model cannot be found or loaded.
            CannotCut: If it cannot be cut there.
        """
        checkpoint = open_checkpoint(model, revision=revision)
        skeleton = skeleton_of(checkpoint.config, task)
        cut = Cut.leaving(
            bottom_layers=bottom_layers,
            top_layers=top_layers,
            num_layers=skeleton.anatomy.num_layers,
        )
        seam = _Seam(skeleton.anatomy)
        # Derivatives of derivatives, which label inversion needs, exist for plain attention only.
        asked = {"dtype": torch.float32, "attn_implementation": "eager", **settings}
        ends = load_ends(checkpoint, skeleton, cut, seam, **asked)
        return cls(ends, seam, skeleton.anatomy, cut)

    def take_adapter(self, config: LoraConfig, adapter: Mapping[str, Tensor]) -> None:
        """Run with a client's adapter from now on, as one who has got hold of it can."""
        wrapped = get_peft_model(self._ends, config)
        set_peft_model_state_dict(wrapped, dict(adapter))
        self._ends.eval().requires_grad_(False)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self._ends.get_input_embeddings().num_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head_VD.device

    def bottom(
        self,
        ids_BT: Tensor,
        *,
        cache: DynamicCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the activations that these tokens send up, (B, T, D).

        Args:
            ids_BT: The tokens; with `cache`, those that follow the ones that it holds.
            cache: The bottom's KV cache of what came before, which is extended.
            attention_mask: As the client's model is given it.
            position_ids: As the client's model is given them.
        """
        carried = {"attention_mask": attention_mask, "position_ids": position_ids}
        given: dict[str, Any] = {name: v for name, v in carried.items() if v is not None}
        if cache is not None:
            given |= {"past_key_values": cache, "use_cache": True}
        else:
            given["use_cache"] = False
        if "use_cache" in given and not hasattr(self.config, "use_cache"):
            del given["use_cache"]
        self._seam.given_BTD = None
        with contextlib.suppress(_Reached):
            self._ends(input_ids=ids_BT, **given)
        caught_BTD, self._seam.caught_BTD = self._seam.caught_BTD, None
        assert caught_BTD is not None
        return caught_BTD

    def inputs_to(
        self,
        modules: Sequence[str],
        ids_BT: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> list[Tensor]:
        """Return what these modules of the bottom are given for these tokens, (B, T, D) each.

        Raises:
            ConfigError: If the bottom has no such module.
        """
        caught: dict[str, Tensor] = {}

        def catcher(name: str) -> Callable[..., None]:
            def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                caught[name] = hidden_of(args, kwargs)

            return catch

        held = dict(self._ends.named_modules())
        handles = [
            held[name].register_forward_pre_hook(catcher(name), with_kwargs=True)
            for name in modules
            if name in held
        ]
        try:
            self.bottom(ids_BT, attention_mask=attention_mask, position_ids=position_ids)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in modules if name not in caught]
        if missing:
            raise ConfigError(
                f"the bottom of {self.cut.lower} layers has no module '{missing[0]}' that is run: "
                "name one of its layers' modules as the model does"
            )
        return [caught[name] for name in modules]

    def new_cache(self) -> DynamicCache:
        """Return an empty KV cache for `bottom`."""
        return DynamicCache(config=self.config)

    @property
    def pools(self) -> bool:
        """Whether there is one label a row, of a class, and not one a position."""
        return type(self._ends).__name__.endswith("ForSequenceClassification")

    def top(
        self,
        trunk_out_BTD: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return what the head is applied to, (B, T, D): the top's layers and the norm.

        Classifiers that pool before their head (BERT) give (B, D); those that apply it everywhere
        and then pick one position (Llama, GPT-2) give (B, T, D). It is differentiable, twice and
        forward too.
        """
        caught: list[Tensor] = []

        def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught.append(args[0])
            raise _Reached

        handle = self._head.register_forward_pre_hook(catch)
        rows, tokens = trunk_out_BTD.shape[:2]
        ids_BT = torch.zeros(rows, tokens, dtype=torch.long, device=self.device)
        carried = {"attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: v for name, v in carried.items() if v is not None}
        self._seam.given_BTD = trunk_out_BTD
        try:
            with (
                bottom_bypassed(self._ends, self._anatomy, self.cut),
                contextlib.suppress(_Reached),
            ):
                self._ends(input_ids=ids_BT, **given)
        finally:
            self._seam.given_BTD = None
            handle.remove()
        return caught[0]

    def head(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits, (B, T, V): the head, and what the family does behind it."""
        raw_BTV: Tensor = self._head(hidden_BTD)
        return raw_BTV if self._head_is_last else self._behind_head(raw_BTV)

    def slopes(self, hidden_BTD: Tensor) -> Tensor | None:
        """Return how steeply each logit follows what the head gives, (B, T, V).

        `None` where that is 1: no soft cap and no scale stands behind the head.
        """
        if self._head_is_last:
            return None
        with torch.enable_grad():
            raw_BTV = self._head(hidden_BTD).detach().requires_grad_()
            (slopes_BTV,) = torch.autograd.grad(self._behind_head(raw_BTV).sum(), raw_BTV)
        return slopes_BTV

    @functools.cached_property
    def _head_is_last(self) -> bool:
        if self.pools:
            return True
        raw_BTV = torch.linspace(-9, 9, 2 * len(self.head_VD), device=self.device)
        raw_BTV = raw_BTV.to(self.head_VD.dtype).view(1, 2, -1)
        return torch.equal(self._behind_head(raw_BTV).detach(), raw_BTV)

    def _behind_head(self, raw_BTV: Tensor) -> Tensor:
        """Return the model's logits where its head gives `raw_BTV`."""
        if raw_BTV.dim() == 2:
            return self._behind_head(raw_BTV.unsqueeze(0)).squeeze(0)
        handle = self._head.register_forward_hook(lambda _module, _args, _output: raw_BTV)
        rows, tokens = raw_BTV.shape[:2]
        ids_BT = torch.zeros(rows, tokens, dtype=torch.long, device=self.device)
        self._seam.given_BTD = self.head_VD.new_ones(
            rows, tokens, self.config.get_text_config().hidden_size
        )
        try:
            with bottom_bypassed(self._ends, self._anatomy, self.cut):
                logits: Tensor = self._ends(input_ids=ids_BT).logits
        finally:
            self._seam.given_BTD = None
            handle.remove()
        return logits

    @contextlib.contextmanager
    def weights_changed(self, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """While open, run with other weights: those of a client who keeps its own secret.

        Args:
            change: Given a parameter's name and value, return the value to use.
        """
        kept = {name: p.data for name, p in self._ends.named_parameters()}
        try:
            for name, parameter in self._ends.named_parameters():
                parameter.data = change(name, parameter.data)
            yield
        finally:
            for name, parameter in self._ends.named_parameters():
                parameter.data = kept[name]


def _head_of(model: PreTrainedModel) -> Any:
    head = model.get_output_embeddings()
    if head is None:
        heads = ("score", "classifier", "classification_head")
        head = next(getattr(model, name) for name in heads if hasattr(model, name))
    if not hasattr(head, "weight"):
        *_, head = (module for module in head.modules() if isinstance(module, nn.Linear))
    return head
