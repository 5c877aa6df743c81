"""The next batch's bottom, run while this batch's last gradients are waited for.

At the end of every step the client waits for the trunk's last backward, and at its beginning the
trunk waits for the client's first bottom. Where the bottom trains nothing it can be run in the
first wait, which takes the second away. What it gives is kept only if it cannot depend on what
happens in between: nothing below the cut is trained, nothing is drawn at random, and no defense
acts on the embedding.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutlayer.client.chunks import NOT_FOR_THE_BOTTOM
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.split.cut import with_hidden

__all__ = ["Ahead", "generators", "look_ahead"]

_Bypass = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class _Kept:
    """What one chunk's bottom gave, and for what."""

    inputs: dict[str, Tensor]
    circumstances: tuple[Any, ...]
    hidden_BTD: Tensor

    def is_for(self, inputs: Mapping[str, Tensor], circumstances: tuple[Any, ...]) -> bool:
        return (
            self.circumstances == circumstances
            and self.inputs.keys() == inputs.keys()
            and all(torch.equal(self.inputs[name], tensor) for name, tensor in inputs.items())
        )


class Ahead:
    """Bottoms that are run before their batch comes.

    Attributes:
        used: How many chunks have left with a bottom that was run before.
    """

    def __init__(self, remote: RemoteTrunk) -> None:
        self.used = 0
        self._remote = remote
        self._now: deque[_Kept] = deque()
        self._next: deque[_Kept] = deque()
        self._to_run: deque[Mapping[str, Any]] = deque()
        self._is_constant = True

    def begin(self, coming: Sequence[Mapping[str, Any]]) -> None:
        """Begin a batch.

        Args:
            coming: The chunks of the batch after it, as far as that is known.
        """
        self._now, self._next, self._to_run = self._next, deque(), deque(coming)

    def run_one(self, run: Callable[..., Any]) -> bool:
        """Run one more bottom of the coming batch; return whether there was one to be run."""
        if not (self._to_run and self._is_constant) or self._remote.departures.defenses:
            return False
        part = self._to_run.popleft()
        with torch.random.fork_rng():
            before = generators()
            hidden_BTD = self._remote.at_the_cut(functools.partial(run, **part))
            is_drawn = any(not torch.equal(a, b) for a, b in zip(before, generators(), strict=True))
        if hidden_BTD.requires_grad or is_drawn:
            self._is_constant = False  # the bottom trains or has dropout: never run it early
            return False
        self._next.append(_Kept(_inputs_of(part), self._circumstances(), hidden_BTD))
        return True

    def bottom_of(
        self, part: Mapping[str, Any], run: Callable[..., Any], bypass: _Bypass
    ) -> Callable[[], Any]:
        """Return a call of the model that hands this chunk's bottom to the trunk.

        Args:
            part: The chunk.
            run: The model's forward.
            bypass: While open, a forward leaves the bottom's layers out.
        """
        kept = self._now.popleft() if self._now else None
        if kept is None or not kept.is_for(_inputs_of(part), self._circumstances()):
            self._now.clear()
            return lambda: run(**part)
        self.used += 1
        hidden_BTD = kept.hidden_BTD

        def hand_over() -> Any:
            def put(_module: Any, args: Any, kwargs: Any) -> Any:
                return with_hidden(args, kwargs, hidden_BTD)

            with bypass(), _before(self._remote, put):
                return run(**part)

        return hand_over

    def _circumstances(self) -> tuple[Any, ...]:
        """Return what else decides what a bottom gives."""
        autocast = [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ]
        return (self._remote.training, self._remote.adapter_disabled, *autocast)


@contextlib.contextmanager
def _before(module: torch.nn.Module, hook: Callable[..., Any]) -> Any:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def generators() -> list[Tensor]:
    """Return the states of the global generators, of the GPUs in use too."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _has_gpu() else ())]


def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _inputs_of(part: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in part.items()
        if isinstance(value, Tensor) and name not in NOT_FOR_THE_BOTTOM
    }


def look_ahead(trainer: Any, tell: Callable[[Mapping[str, Any]], None]) -> None:
    """Have a trainer fetch each batch one step early, and tell which comes next.

    Only where that changes nothing: a step has one batch, and nothing is drawn to make it.
    """
    fetch = trainer.get_batch_samples
    held: dict[str, Any] = {"of": None, "samples": None}

    def fetched(iterator: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.args.gradient_accumulation_steps != 1 or not _draws_nothing(trainer):
            return fetch(iterator, *args, **kwargs)
        is_held = held["of"] is iterator
        now = held["samples"] if is_held else fetch(iterator, *args, **kwargs)
        held["of"], held["samples"] = iterator, fetch(iterator, *args, **kwargs)
        batches, _items = held["samples"]
        if batches:
            tell(trainer._prepare_inputs(batches[0]))
        return now

    trainer.get_batch_samples = fetched


_DRAW_NOTHING = (
    ("trl.trainer.sft_trainer", "DataCollatorForLanguageModeling"),
    ("transformers.data.data_collator", "DataCollatorWithPadding"),
)


def _draws_nothing(trainer: Any) -> bool:
    kind = type(trainer.data_collator)
    # Of `datasets`, and without a transform that may draw: any other may draw what it likes.
    form = getattr(trainer.train_dataset, "format", None)
    is_as_stored = isinstance(form, dict) and form.get("type") != "custom"
    return (kind.__module__, kind.__name__) in _DRAW_NOTHING and is_as_stored
