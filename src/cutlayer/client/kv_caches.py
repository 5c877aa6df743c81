"""Which KV cache of the trunk's own belongs to which cache of the client's, and how rows moved.

Our slot of the client's cache holds each row's number. Beam search moves rows about; what stands
in the slot then tells which of the trunk's rows continue.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from cutlayer.errors import CannotCut
from cutlayer.split.cut import note_in_cache

__all__ = ["CacheNumbers"]


class CacheNumbers:
    """The numbers of the trunk's caches, by the client's cache."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._numbers = itertools.count(1)
        self._caches: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()

    def fields(
        self,
        cache: Cache | None,
        hidden_BTD: Tensor,
        drop: Callable[[int], None],
        *,
        grad: bool,
    ) -> dict[str, Any]:
        """Return what a forward says of its cache.

        Args:
            cache: The client's, if there is one.
            hidden_BTD: The activations.
            drop: Frees the trunk's; called once the client's is gone.
            grad: Whether this forward will have a backward.

        Raises:
            CannotCut: If the cache was filled elsewhere, or is of a fixed length.
        """
        if cache is None:
            return {}
        if getattr(cache, "is_compileable", False):
            raise CannotCut(
                "a static KV cache cannot be split, since its masks are as long as it: leave out "
                "cache_implementation, or set it to 'dynamic'"
            )
        rows, tokens = hidden_BTD.shape[:2]
        past_tokens = self.past_tokens(cache)
        note_BT = torch.arange(rows, dtype=torch.float32, device=hidden_BTD.device)[:, None]
        slot_BT = note_in_cache(cache, self._layer, note_BT.expand(rows, tokens))
        if grad and past_tokens == 0:
            # A training forward builds a cache by default and never reads it. The trunk builds one
            # too and drops it at once: the keys' memory layout decides the last bit of attention.
            return {"cache": next(self._numbers)}
        if past_tokens == 0:
            number = self._caches[cache] = next(self._numbers)
            weakref.finalize(cache, drop, number)
        elif cache not in self._caches or slot_BT is None:
            raise CannotCut(
                "this KV cache was filled elsewhere or copied: its other half is at the server; "
                "start the generation from the prompt"
            )
        moved: tuple[int, ...] = ()
        if past_tokens and slot_BT is not None:
            # The newest token before this call is the last before the `tokens` just written.
            stood = slot_BT[:, -tokens - 1].long().tolist()
            moved = () if stood == list(range(rows)) else tuple(stood)
            if moved:
                slot_BT[:, :] = note_BT
        return {"cache": self._caches[cache], "past_tokens": past_tokens, "cache_rows": moved}

    def past_tokens(self, cache: Cache | None) -> int:
        """Return how many tokens a cache holds before this call; none if there is no cache."""
        if cache is None:
            return 0
        try:
            return int(cache.get_seq_length(self._layer))
        except (TypeError, ValueError):
            return int(cache.get_seq_length())
