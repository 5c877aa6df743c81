"""A model with texts, what it sends at a cut, and what each attack reads of that."""

# Shapes:  B batch   T tokens   D model width   N rows

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cutlayer.audit.candidates import CandidateTable
from cutlayer.audit.finding import Finding
from cutlayer.audit.forward_search import SearchSettings, forward_search
from cutlayer.audit.inverter import Defend, Inverter, learned_inversion, train_inverter
from cutlayer.audit.labels import label_inversion
from cutlayer.audit.public import PublicModel
from cutlayer.audit.traffic import made_here, texts_of
from cutlayer.privacy.mechanisms import Defense
from cutlayer.split.cut import Cut, Trunk
from cutlayer.split.loading import load_trunk, open_checkpoint, skeleton_of

__all__ = ["Victim", "rounded", "write_gpt2"]

Change = Callable[[Tensor], Tensor]


def write_gpt2(folder: Path) -> str:
    """Write a GPT-2 in shape, of random weights, and return its folder."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_positions=256, n_embd=192, n_layer=8, n_head=6)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def rounded(rows_ND: Tensor, bits: int) -> Tensor:
    """Return each row rounded to `bits` bits over its own range."""
    step_N1 = rows_ND.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return (rows_ND / step_N1).round() * step_N1


@dataclasses.dataclass(frozen=True)
class Victim:
    """A model folder."""

    model: str

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a victim lives as long as the run)
    def public(self, bottom_layers: int, top_layers: int) -> PublicModel:
        """Return its public ends."""
        return PublicModel.load(self.model, bottom_layers=bottom_layers, top_layers=top_layers)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def table(self, bottom_layers: int) -> CandidateTable:
        """Return the candidates at a cut, shared by searches."""
        return CandidateTable(self.public(bottom_layers, 0))

    def search(
        self,
        texts: Sequence[Tensor],
        *,
        bottom_layers: int = 2,
        change: Change | None = None,
        settings: SearchSettings | None = None,
    ) -> Finding:
        """Search what these texts send (A1)."""
        public = self.public(bottom_layers, 0)
        sent = texts_of(made_here(public, [(ids_T, ids_T) for ids_T in texts], gradients=False))
        smashed = [text.smashed_TD for text in sent]
        commonest = int(torch.cat([*texts]).mode().values)
        return forward_search(
            public,
            smashed if change is None else [change(rows_TD) for rows_TD in smashed],
            [text.ids_T for text in sent],
            settings or SearchSettings(),
            baseline=[torch.full_like(ids_T, commonest) for ids_T in texts],
            table=self.table(bottom_layers),
        )

    def taught(
        self, aux: Sequence[Tensor], *, bottom_layers: int = 2, defend: Defend | None = None
    ) -> Inverter:
        """Return an inverter that learned from public texts (A2)."""
        return train_inverter(self.public(bottom_layers, 0), aux, defend=defend)

    def learned(
        self, inverter: Inverter, texts: Sequence[Tensor], *, bottom_layers: int = 2
    ) -> Finding:
        """Read texts with it."""
        public = self.public(bottom_layers, 0)
        with torch.no_grad():
            smashed = [public.bottom(ids_T[None])[0] for ids_T in texts]
        return learned_inversion(inverter, smashed, texts)

    def labels(
        self,
        rows: Sequence[Tensor],
        *,
        bottom_layers: int = 2,
        top_layers: int = 2,
        answers: int | None = None,
        defenses: Sequence[Defense] = (),
        codec: str = "raw",
        change: Change | None = None,
        iterations: int = 300,
        ridge: float = 1e-6,
    ) -> Finding:
        """Invert the labels of rows of one length, in batches of 8 (A4).

        Args:
            rows: Token ids, each its predecessor's label.
            bottom_layers: Of the client.
            top_layers: Of the client.
            answers: Only so many tokens at the end carry a loss.
            defenses: At the upper cut.
            codec: Of both channels.
            change: What else is done to each gradient.
            iterations: As `label_inversion` has it.
            ridge: As `label_inversion` has it.
        """
        public = self.public(bottom_layers, top_layers)
        pairs = [(ids_T, ids_T.clone()) for ids_T in rows]
        if answers is not None:
            for _ids, labels_T in pairs:
                labels_T[:-answers] = -100
        sent = made_here(
            public, pairs, trunk=self._trunk(public.cut), defenses=defenses, codec=codec
        )
        if change is not None:
            sent = [
                dataclasses.replace(d, gradient_BTD=change(d.gradient_BTD))
                for d in sent
                if d.gradient_BTD is not None
            ]
        outs = [d.trunk_out_BTD for d in sent if d.trunk_out_BTD is not None]
        return label_inversion(public, sent, outs, iterations=iterations, ridge=ridge)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _trunk(self, cut: Cut) -> Trunk:
        checkpoint = open_checkpoint(self.model)
        skeleton = skeleton_of(checkpoint.config, "causal-lm")
        loaded = load_trunk(checkpoint, skeleton, cut, dtype=torch.float32)
        return Trunk(loaded.eval().requires_grad_(False), skeleton.anatomy, cut)
