"""The public model's embedding: what it gives for each token, and the bottom behind it."""

# Shapes:  T tokens   D width   V vocabulary

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cutlayer.audit.public import PublicModel

__all__ = ["defended_embedding", "embedding_table", "replay"]


@torch.no_grad()
def embedding_table(public: PublicModel) -> Tensor:
    """Return what the embedding gives for each token, with a family's own factor, (V, D)."""
    every_V = torch.arange(public.vocabulary, device=public.device)
    table_VD: Tensor = _embedding_of(public)(every_V)
    return table_VD


def replay(public: PublicModel, embedded_TD: Tensor) -> Tensor:
    """Return what the bottom sends if the embedding gives these rows, (T, D); differentiable.

    The family's own forward runs, so position tables and factors behind the embedding hold.
    """
    ids_BT = torch.zeros(1, len(embedded_TD), dtype=torch.long, device=public.device)
    handle = _embedding_of(public).register_forward_hook(lambda *_: embedded_TD[None])
    try:
        return public.bottom(ids_BT)[0]
    finally:
        handle.remove()


@contextlib.contextmanager
def defended_embedding(
    public: PublicModel, apply: Callable[[Tensor], Tensor] | None
) -> Iterator[None]:
    """While open, the bottom goes on from what a defense makes of each embedding, if there is one.

    It stands where `connect` puts it: behind the embedding, the family's own factor included.
    """
    if apply is None:
        yield
        return
    handle = _embedding_of(public).register_forward_hook(lambda _m, _a, given: apply(given))
    try:
        yield
    finally:
        handle.remove()


def _embedding_of(public: PublicModel) -> Any:
    return public._ends.get_input_embeddings()
