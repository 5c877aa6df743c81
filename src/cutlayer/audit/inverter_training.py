"""How the learned inversion (A2) is taught: public texts, what they look like when sent, epochs.

References:
    Chen et al., CCS 2024, https://arxiv.org/abs/2409.00960
"""

# Shapes:  B batch   T tokens   D width of what is sent   K tokens that are known   N rows
#          V vocabulary   M embedding's width

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from cutlayer.audit.embedding import embedding_table
from cutlayer.audit.inverter_networks import (
    EmbeddingHead,
    GruInverter,
    Head,
    LinearHead,
    MixtureInverter,
)
from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError, DataError, NotFinite

__all__ = ["PUBLISHED_INVERTER", "Batch", "Defend", "InverterSettings", "Lesson", "mask_of"]

Defend = Callable[[Tensor], Tensor]
"""What a client does to the activations of one text: (1, T, D) to (1, T, any width)."""

_IGNORED, _UNKNOWN = -100, -1
_AT_ONCE = 32
_HELD_AT_MOST = 32
_POSITIONS_AT_ONCE = 512
_FEWEST_TEXTS = 8
_ROWS_TO_MEASURE = 20_000


@dataclass(frozen=True)
class InverterSettings:
    """How an inverter is trained; `PUBLISHED_INVERTER` has the settings of the paper's code."""

    width: int = 64
    """Of each GRU."""
    dropout: float = 0.1
    epochs: int = 4
    """Of the GRU, or of the mixture's experts."""
    gate_epochs: int = 3
    joint_epochs: int = 2
    least_steps: int = 75
    """Of the GRU or the experts: with few texts, epochs are added."""
    batch: int = 32
    """Texts a step."""
    lr: float = 3e-3
    """Of Adam."""
    weight_decay: float = 1e-5
    standardise: bool = True
    """Bring each coordinate to mean 0 and deviation 1 first. The published code does not; where
    the first token's activations are far larger than all others, that costs some points."""
    head: Literal["embedding", "linear"] = "embedding"
    """What reads the GRU: as published a linear layer, which can answer only with the tokens of the
    public text, or a comparison with the public embedding, which can answer with any."""
    held_out: float = 0.05
    """Share of the public texts on which the best epoch is chosen."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        counts = ("width", "epochs", "gate_epochs", "joint_epochs", "batch")
        faults = [f"{n} = {getattr(self, n)} (at least 1)" for n in counts if getattr(self, n) < 1]
        faults += [f"width = {self.width} (a multiple of 4)"] if self.width % 4 else []
        faults += [] if self.lr > 0 else [f"lr = {self.lr} (above 0)"]
        faults += [] if self.head in ("embedding", "linear") else [f"head = '{self.head}'"]
        faults += [] if 0 < self.held_out < 1 else [f"held_out = {self.held_out} (within 0 and 1)"]
        if faults:
            raise ConfigError(f"no inverter can be trained with {', '.join(faults)}")


PUBLISHED_INVERTER = InverterSettings(
    width=256,
    epochs=20,
    gate_epochs=15,
    joint_epochs=4,
    least_steps=0,
    batch=6,
    lr=1e-3,
    standardise=False,
    head="linear",
)
"""For comparison with papers."""


@dataclass(frozen=True)
class Batch:
    """A few texts: what is sent for them, and what is to be answered."""

    smashed: list[Tensor]
    target_BT: Tensor
    mask_BT: Tensor

    def seen(self, defend: Defend | None) -> Tensor:
        """Return what the server would get, (B, T, D).

        One text at a time, as a defense may clip or scale a text by its own norm.
        """
        seen = self.smashed if defend is None else [defend(s_TD[None])[0] for s_TD in self.smashed]
        return pad_sequence([s_TD.float() for s_TD in seen], batch_first=True)

    def loss(self, logits_BTK: Tensor) -> Tensor:
        """Return the cross-entropy of each position with its own token."""
        return cross_entropy(
            logits_BTK.flatten(0, 1), self.target_BT.flatten(), ignore_index=_IGNORED
        )


@dataclass(frozen=True)
class Lesson:
    """Public texts with their activations, to learn from and to choose the best epoch on.

    The activations are kept, as running the bottom costs more than a step of training does; that
    is 4 x D bytes a token.
    """

    smashed: list[Tensor]
    labels: list[Tensor]
    """What each position of them is to be read as."""
    targets: list[Tensor]
    """The same as indices into `tokens_K`."""
    held: range
    """Which of the texts are held out: the last ones."""
    tokens_K: Tensor
    vocabulary: int
    sent_width: int
    settings: InverterSettings
    seed: int

    @classmethod
    def of(
        cls,
        public: PublicModel,
        texts: Sequence[Tensor],
        labels: Sequence[Tensor],
        defend: Defend | None,
        settings: InverterSettings,
        seed: int,
    ) -> Lesson:
        """Run the public bottom on all texts, in an order drawn by the seed."""
        _refuse_bad_text(public, texts, labels)
        order = _shuffled(len(texts), seed)
        smashed = _activations(public, [texts[i] for i in order])
        labels = [labels[i].to(public.device) for i in order]
        held = range(len(texts) - max(1, round(len(texts) * settings.held_out)), len(texts))
        tokens_K = torch.cat(labels[: held.start]).unique()
        index_V = torch.full((public.vocabulary,), _UNKNOWN, device=public.device)
        index_V[tokens_K] = torch.arange(len(tokens_K), device=public.device)
        first_TD = smashed[0] if defend is None else defend(smashed[0][None])[0]
        if len(first_TD) != len(smashed[0]):
            raise ConfigError(
                f"the defense makes {len(first_TD)} vectors of {len(smashed[0])} tokens, and a "
                "learned inversion reads one token from each vector: attack it otherwise"
            )
        targets = [index_V[label_T] for label_T in labels]
        return cls(
            smashed,
            labels,
            targets,
            held,
            tokens_K,
            public.vocabulary,
            first_TD.shape[-1],
            settings,
            seed,
        )

    def head(self, public: PublicModel) -> Head:
        """Return an untrained head for the tokens of these texts."""
        if self.settings.head == "linear":
            return LinearHead(self.settings.width, self.tokens_K)
        table_VM = embedding_table(public)
        return EmbeddingHead(self.settings.width, self.sent_width, self.tokens_K, table_VM)

    @property
    def epochs(self) -> int:
        """How many epochs the GRU or the experts are taught."""
        steps = -(-self.held.start // self.settings.batch)
        return max(self.settings.epochs, -(-self.settings.least_steps // steps))

    def teach(
        self,
        network: nn.Module,
        parameters: Sequence[nn.Parameter],
        loss_of: Callable[[Batch], Tensor],
        epochs: int,
        score: Callable[[], float] | None = None,
    ) -> float:
        """Train these parameters, keep the epoch of the best score, and return that score.

        Raises:
            NotFinite: If the loss is.
        """
        settings = self.settings
        optimizer = torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        best, best_state = -1.0, None
        for epoch in range(epochs):
            network.train()
            for batch in self.batches(epoch):
                loss = loss_of(batch)
                if not loss.isfinite():
                    raise NotFinite(
                        f"the inverter's loss became {float(loss)} in epoch {epoch}: lower lr, "
                        f"which is {settings.lr}, or look for infinite activations"
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            network.eval()
            if score is not None and (found := score()) > best:
                best, best_state = found, copy.deepcopy(network.state_dict())
        if best_state is not None:
            network.load_state_dict(best_state)
        return best

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield all texts but the held-out ones, once, in an order of this epoch.

        Texts of about one length share a batch, which halves what is computed for padding.
        """
        size, seed = self.settings.batch, self.seed + epoch + 1
        order = _shuffled(self.held.start, seed)
        nearby = [order[start : start + 16 * size] for start in range(0, len(order), 16 * size)]
        sorted_rows = [
            i for rows in nearby for i in sorted(rows, key=lambda i: len(self.targets[i]))
        ]
        batches = [sorted_rows[start : start + size] for start in range(0, len(order), size)]
        for i in _shuffled(len(batches), seed):
            yield self._batch(batches[i])

    def _batch(self, rows: Sequence[int]) -> Batch:
        targets = [self.targets[i] for i in rows]
        padded_BT = pad_sequence(targets, batch_first=True, padding_value=_IGNORED)
        return Batch([self.smashed[i] for i in rows], padded_BT, mask_of(targets))

    def rows(self, defend: Defend | None) -> Tensor:
        """Return activations of some texts as the server would get them, (N, D)."""
        rows, count = [], 0
        for smashed_TD in self.smashed[: self.held.start]:
            rows.append(smashed_TD if defend is None else defend(smashed_TD[None])[0])
            count += len(smashed_TD)
            if count > _ROWS_TO_MEASURE:
                break
        return torch.cat(rows).float()

    @torch.no_grad()
    def held_out_recovery(
        self, network: GruInverter | MixtureInverter, defends: Sequence[Defend | None]
    ) -> float:
        """Return the share of held-out tokens that are read right, on average over defenses."""
        texts = self.held[:_HELD_AT_MOST]
        # A row of logits has up to V numbers, so a few texts at a time.
        size = max(1, _POSITIONS_AT_ONCE // max(len(self.labels[i]) for i in texts))
        right = total = 0
        network.head.open(True)
        for start in range(0, len(texts), size):
            rows = texts[start : start + size]
            batch = self._batch(rows)
            truth_N = torch.cat([self.labels[i] for i in rows])
            for defend in defends:
                best_BT = network(batch.seen(defend), batch.mask_BT).argmax(-1)
                found_N = network.head.tokens_K[best_BT[batch.mask_BT]]
                right += int((found_N == truth_N).sum())
                total += len(truth_N)
        network.head.open(False)
        return right / total


def mask_of(texts: Sequence[Tensor]) -> Tensor:
    """Return True where these texts, padded at the right, have a token; (B, T)."""
    ones = [torch.ones(len(text_T), dtype=torch.bool, device=text_T.device) for text_T in texts]
    return pad_sequence(ones, batch_first=True)


def _shuffled(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


@torch.no_grad()
def _activations(public: PublicModel, texts: Sequence[Tensor]) -> list[Tensor]:
    """Return what the public bottom sends for each text, (T, D)."""
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(texts), _AT_ONCE):
        rows = by_length[start : start + _AT_ONCE]
        chosen = [texts[i].to(public.device) for i in rows]
        padded_BT, mask_BT = pad_sequence(chosen, batch_first=True), mask_of(chosen)
        # A mask is given only where it says something, as by a client without padding.
        masked = {} if bool(mask_BT.all()) else {"attention_mask": mask_BT.long()}
        smashed_BTD = public.bottom(padded_BT, **masked)
        for i, smashed_TD, text_T in zip(rows, smashed_BTD, chosen, strict=True):
            found[i] = smashed_TD[: len(text_T)].clone()
    return [found[i] for i in range(len(texts))]


def _refuse_bad_text(
    public: PublicModel, texts: Sequence[Tensor], labels: Sequence[Tensor]
) -> None:
    if len(texts) < _FEWEST_TEXTS:
        raise DataError(
            f"an inverter learns from public text and {len(texts)} texts were given: give "
            f"{_FEWEST_TEXTS} or more, thousands for a fair attack, of the client's kind"
        )
    if [len(t) for t in texts] != [len(t) for t in labels] or min(map(len, texts)) < 1:
        raise DataError(
            "each public text needs one token or more, and as many labels: leave empty texts out"
        )
    low, high = min(int(t.min()) for t in texts), max(int(t.max()) for t in texts)
    if low < 0 or high >= public.vocabulary:
        raise DataError(
            f"the public texts have token ids from {low} to {high} and the model has "
            f"{public.vocabulary} tokens: encode them with the model's own tokenizer"
        )
