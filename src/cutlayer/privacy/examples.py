"""Examples one by one: how they are drawn, what each one's loss is, what would mix them."""

# Shapes:  B examples   T tokens   V vocabulary   C classes

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Sampler

from cutlayer.errors import ConfigError

__all__ = [
    "CollateOrEmpty",
    "PoissonBatches",
    "check_model",
    "example_losses",
    "refuse_left_padding",
    "rows_in",
]


class PoissonBatches(Sampler[list[int]]):
    """Draw every example into a batch with the same probability, batch after batch."""

    def __init__(
        self, examples: int, rate: float, batches: int, draw: Callable[[Sequence[int]], Tensor]
    ) -> None:
        self._examples = examples
        self._rate = rate
        self._batches = batches
        self._draw = draw

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._batches):
            drawn = self._draw((self._examples,)) < self._rate
            yield drawn.nonzero().flatten().tolist()


class CollateOrEmpty:
    """Collate a batch; one without examples is an empty dict."""

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self._inner = inner

    def __call__(self, examples: list[Any]) -> Any:
        """Do so."""
        return self._inner(examples) if examples else {}


def example_losses(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return each example's own loss, (B,): its mean over supervised tokens, or over its class.

    Args:
        output: What the model returned, with `logits` (B, T, V) or (B, C).
        batch: With `labels` (B, T), -100 where a token is not supervised, or (B,).

    Raises:
        ConfigError: If logits and labels are of neither form.
    """
    logits, labels = output.logits.float(), batch["labels"]
    if logits.dim() == 3 and labels.dim() == 2:
        logits_BTV, labels_BT = logits[:, :-1], labels[:, 1:]
        losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none")
        return losses_BT.sum(1) / (labels_BT != -100).sum(1).clamp(min=1)
    if logits.dim() == 2 and labels.dim() == 1 and not labels.is_floating_point():
        return F.cross_entropy(logits, labels, reduction="none")
    raise ConfigError(
        f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} are "
        "neither next tokens nor classes: give example_loss=, which returns one loss an example"
    )


def rows_in(batch: Mapping[str, Tensor]) -> int:
    """Return how many examples a batch has."""
    return len(next(iter(batch.values()))) if batch else 0


def refuse_left_padding(batch: Mapping[str, Tensor]) -> None:
    """Refuse a batch in which one example's positions depend on the others' lengths.

    Raises:
        ConfigError: If an example begins with padding.
    """
    mask_BT = batch.get("attention_mask")
    if mask_BT is not None and mask_BT.dim() == 2 and not bool(mask_BT[:, 0].all()):
        raise ConfigError(
            "examples are padded at the left, which makes one depend on how long the others are: "
            "set tokenizer.padding_side to 'right'"
        )


def check_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a model whose per-example gradients cannot be had, or are not all of what it trains.

    Raises:
        ConfigError: Naming all that is in the way.
    """
    faults = []
    remote = getattr(model, "remote_trunk", None)
    if remote is not None and remote.trains:
        faults.append(
            "the trunk's adapter is trained at the server without noise: connect with "
            "train=('bottom', 'top')"
        )
    if getattr(model, "chunks", 1) != 1:
        faults.append("a batch in chunks has no per-example gradients: set split_chunks to 1")
    if getattr(model, "is_gradient_checkpointing", False):
        faults.append("gradient checkpointing runs layers twice: turn it off")
    trained: list[Tensor] = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        trained += own
        if own and type(module) is not nn.Linear:
            faults.append(f"'{name}' ({type(module).__name__}) is trained and no plain nn.Linear")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            faults.append(f"'{name}' normalises over the batch, so examples are not independent")
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if not trained:
        faults.append("it trains nothing here")
    if {id(p) for p in trained} != {id(p) for p in stepped if p.requires_grad}:
        faults.append("the optimizer's parameters are not those that the model trains")
    if len({id(p) for p in trained}) != len(trained):
        faults.append("two layers share a trained parameter")
    if faults:
        raise ConfigError("this model cannot be trained by DP-SGD: " + "; ".join(faults))
