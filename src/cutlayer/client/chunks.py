"""Cut the arguments of a forward into micro-chunks, and join what came out of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

__all__ = ["NOT_FOR_THE_BOTTOM", "joined", "rows_in", "rows_of", "spans", "weight_of"]

IGNORED_LABEL = -100
NOT_FOR_THE_BOTTOM = frozenset(
    {"labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "completion_mask"}
)
"""Arguments of a forward on which no activation at the lower cut depends."""


def rows_in(kwargs: Mapping[str, Any]) -> int:
    """Return how many rows a forward is called with, 0 if it is not called with tensors."""
    given = kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
    return given.shape[0] if isinstance(given, Tensor) else 0


def spans(rows: int, chunks: int) -> list[slice]:
    """Return the rows of each chunk, as even as can be and none empty."""
    edges = [round(rows * i / min(chunks, rows)) for i in range(min(chunks, rows) + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def rows_of(kwargs: Mapping[str, Any], rows: int, span: slice) -> dict[str, Any]:
    """Return the arguments of a forward for one chunk: what has a row per sample is cut."""

    def take(value: Any) -> Any:
        in_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
        return value[span] if in_rows else value

    return {name: take(value) for name, value in kwargs.items()}


def weight_of(part: Mapping[str, Any]) -> int:
    """Return over how many items the loss of this chunk is a mean: tokens, or rows."""
    labels = part.get("shift_labels")
    if labels is None:
        labels = part.get("labels")
        if not isinstance(labels, Tensor):
            return rows_in(part)
        # A class a row may stand in a column of its own.
        if labels.dim() != 2 or labels.is_floating_point() or labels.shape[1] == 1:
            return labels.shape[0]
        labels = labels[:, 1:]
    return int((labels != IGNORED_LABEL).sum())


def joined(outputs: list[Any], weights: list[int], *, loss_is_mean: bool) -> Any:
    """Return the output of the whole batch from those of its chunks."""
    total = max(sum(weights), 1)

    def join(name: str) -> Any:
        values = [output[name] for output in outputs]
        if not isinstance(values[0], Tensor):
            return None
        if values[0].dim() > 0:
            if values[0].requires_grad:
                return torch.cat(values)
            for output in outputs:
                output[name] = None
            return _cat_and_free(values)
        if name == "loss" and not loss_is_mean:
            return torch.stack(values).sum()
        # A chunk without a supervised token has a mean of nothing, which is NaN: leave it out.
        shares = [v * (w / total) for v, w in zip(values, weights, strict=True) if w]
        return torch.stack(shares).sum() if shares else values[0]

    kind: type[ModelOutput] = type(outputs[0])
    return kind(**{name: join(name) for name in outputs[0]})


def _cat_and_free(values: list[Tensor]) -> Tensor:
    """Return `torch.cat(values)`, freeing each piece once it is copied: logits are large."""
    shape = (sum(map(len, values)), *values[0].shape[1:])
    whole = values[0].new_empty(shape)
    row = 0
    while values:
        piece = values.pop(0)
        whole[row : row + len(piece)] = piece
        row += len(piece)
    return whole
