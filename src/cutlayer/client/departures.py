"""Everything that leaves the client in a step passes here: defended, booked, recorded.

Two tensors leave: the smashed activations at the lower cut, and the gradient at the upper cut. A
defense on the first is part of the graph, so that autograd differentiates it; one on the second
runs in the backward of `_Receive`. A release is booked before its tensor is sent: where the budget
is spent nothing leaves. What is recorded is what the server will have after the codec.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from cutlayer.client.send_once import Batch
from cutlayer.errors import ConfigError
from cutlayer.privacy.adversarial import AdversarialBottom
from cutlayer.privacy.defenses import Defense
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.transcript import TranscriptWriter
from cutlayer.split.entry import Entry
from cutlayer.wire.tensors import bytes_of

__all__ = ["Departures"]


@dataclass
class Departures:
    """The defenses of a run, its ledger and its transcript; none of them by default.

    Attributes:
        defenses: At most one a channel.
        ledger: Where releases of formal defenses are booked.
        transcript: Where some of what leaves is kept for the audit.
        as_it_arrives: What the server has of a tensor, by its name and forward, after the codec.
    """

    defenses: Sequence[Defense] = ()
    ledger: Ledger | None = None
    transcript: TranscriptWriter | None = None
    as_it_arrives: Callable[[str, Tensor, int], Tensor] = lambda _name, tensor, _forward: tensor

    def defended(self, hidden_BTD: Tensor, entry: Entry, past_tokens: int = 0) -> Tensor:
        """Return the activations that may leave; differentiable.

        Args:
            hidden_BTD: The activations.
            entry: What the model was called with.
            past_tokens: How many tokens left before, which these go on from by a KV cache.

        Raises:
            BudgetExhausted: If a release would cost more than what is left; nothing was sent.
            ConfigError: If the defense learns from tokens and there are none.
        """
        defense = self.defense("lower cut")
        if defense is None:
            return hidden_BTD
        mask_BT = _mask_of(entry, hidden_BTD.shape[1])
        ids_BT = entry.truth.get("input_ids")
        if isinstance(defense, AdversarialBottom) and hidden_BTD.requires_grad:
            if ids_BT is None or ids_BT.shape != hidden_BTD.shape[:2]:
                raise ConfigError(
                    f"'{defense.name}' learns from the tokens and the model was called without "
                    "them: call it with input_ids"
                )
            hidden_BTD = defense.pulled(hidden_BTD, ids_BT, mask_BT)
        defended_BTD = defense.apply(hidden_BTD, mask_BT)
        # What goes on from a cache depends on all that is in it, and its own tokens name no record.
        records = [] if past_tokens else self._records_of(entry, len(hidden_BTD))
        self._book(defense, records, defended_BTD)
        return defended_BTD

    def sent(
        self, number: int, step: int, smashed_BTD: Tensor, entry: Entry, rows: Batch | None = None
    ) -> list[str]:
        """Take note of activations that have left; return the names of their sequences.

        Args:
            number: The number of the forward.
            step: Optimizer steps done.
            smashed_BTD: The activations; those of rows that are sent once are in `rows`.
            entry: What the model was called with.
            rows: The rows, some of which had left before.
        """
        if self.transcript and self.transcript.wants(step):
            if rows:
                arrived_BTD = rows.as_the_server_has_it()
            else:
                arrived_BTD = self.as_it_arrives("smashed", smashed_BTD.detach(), number)
            self.transcript.activations(
                number,
                step,
                arrived_BTD,
                entry.carried,
                entry.truth,
                referenced=rows.referenced if rows else (),
            )
        return self._records_of(entry, len(smashed_BTD)) if self.defense("upper cut") else []

    def received(self, number: int, step: int, trunk_out_BTD: Tensor) -> None:
        """Take note of what the server computed, which it knows too."""
        if self.transcript:
            self.transcript.trunk_out(number, step, trunk_out_BTD)

    def gradient(self, number: int, step: int, grad_BTD: Tensor, records: list[str]) -> Tensor:
        """Return the gradient that may leave.

        Args:
            number: The number of the forward.
            step: Optimizer steps done.
            grad_BTD: The gradient of its output.
            records: What `sent` returned for it.

        Raises:
            BudgetExhausted: If a release would cost more than what is left; nothing was sent.
        """
        defense = self.defense("upper cut")
        if defense is not None:
            grad_BTD = defense.apply(grad_BTD, None)
            self._book(defense, records, grad_BTD)
        if self.transcript:
            arrived_BTD = self.as_it_arrives("gradient", grad_BTD.detach(), number)
            self.transcript.gradient(number, step, arrived_BTD)
        return grad_BTD

    def defense(self, site: str) -> Defense | None:
        """Return the defense of a channel."""
        return next((defense for defense in self.defenses if defense.site == site), None)

    def _book(self, defense: Defense, records: list[str], leaving: Tensor) -> None:
        if self.ledger is not None:
            digest = hashlib.sha256(bytes_of(leaving))
            self.ledger.book(defense.releases(len(leaving), records), digest.hexdigest())

    def _records_of(self, entry: Entry, rows: int) -> list[str]:
        """Return a name for each sequence, by which the ledger counts how often it has left."""
        ids_BT = entry.truth.get("input_ids")
        if self.ledger is None or ids_BT is None or len(ids_BT) != rows:
            return []  # counts for every record
        mask_BT = _mask_of(entry, ids_BT.shape[1])
        if mask_BT is None or mask_BT.shape != ids_BT.shape:
            return [self.ledger.record_of(row_T.tolist()) for row_T in ids_BT]
        # A sequence is padded to the longest of its batch, so to another length in each epoch.
        kept_BT = mask_BT.to(ids_BT.device) != 0
        return [
            self.ledger.record_of(row_T[kept_T].tolist())
            for row_T, kept_T in zip(ids_BT, kept_BT, strict=True)
        ]


def _mask_of(entry: Entry, tokens: int) -> Tensor | None:
    """Return the mask of the newest `tokens`, (B, T); that of a KV cache is of older ones too."""
    mask_BT = entry.carried.get("attention_mask")
    if mask_BT is None or mask_BT.dim() != 2 or mask_BT.shape[1] < tokens:
        return None
    return mask_BT[:, -tokens:]


def defend_embedding(ends: PreTrainedModel, defenses: Sequence[Defense]) -> None:
    """Put the defense that belongs there behind the embedding, where a token is still alone."""
    for defense in defenses:
        if defense.site == "embedding":

            def defended(
                _module: Any, _args: Any, output: Tensor, _apply: Any = defense.apply
            ) -> Tensor:
                return _apply(output)

            ends.get_input_embeddings().register_forward_hook(defended)
