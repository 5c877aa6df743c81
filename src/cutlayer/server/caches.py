"""The KV caches that a tenant's generations go on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedConfig

from cutlayer.errors import Refused

__all__ = ["KVCaches", "Slot"]


@dataclass
class Slot:
    """A cache, and how many tokens it holds."""

    cache: DynamicCache
    past_tokens: int = 0


class KVCaches:
    """The caches, by the number that the client gave each."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._slots: dict[int, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def all(self) -> list[DynamicCache]:
        """What is held."""
        return [slot.cache for slot in list(self._slots.values())]

    def slot(self, number: int, past_tokens: int, rows: Sequence[int]) -> Slot:
        """Return a cache to read and extend; a new one if it must hold nothing yet.

        Args:
            number: The cache's.
            past_tokens: How many tokens it must hold.
            rows: Which of its rows are continued, when they moved.

        Raises:
            Refused: If the cache is not as the client believes it is.
        """
        if past_tokens == 0:
            self._slots[number] = Slot(DynamicCache(config=self._config))
        slot = self._slots.get(number)
        if slot is None:
            raise Refused(
                f"KV cache {number} is not held here any more: start the generation again"
            )
        if past_tokens != slot.past_tokens:
            raise Refused(
                f"KV cache {number} holds {slot.past_tokens} tokens and {past_tokens} were "
                "expected: a cache that was copied or filled elsewhere cannot be continued"
            )
        if rows:
            slot.cache.reorder_cache(torch.tensor(list(rows)))
        return slot

    def drop(self, number: int) -> None:
        """Free a cache."""
        self._slots.pop(number, None)
