"""The parts of the table of attacks, each with the source whose change makes its figures old."""

# Shapes:  B batch   T tokens   D model width   N rows

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.attacks import texts as real
from benchmarks.attacks.conditions import (
    NOISES,
    Noisy,
    embedding_reading,
    lossy_codecs,
    noise_at_the_embedding,
    through,
    unclipped,
)
from benchmarks.attacks.victim import Change, Victim, rounded, write_gpt2
from cutlayer.audit.finding import Finding
from cutlayer.audit.forward_search import SearchSettings
from cutlayer.audit.inverter import Defend, learned_inversion, train_inverter
from cutlayer.audit.public import PublicModel
from cutlayer.privacy.defenses import defense_of
from cutlayer.privacy.two_server import shares

__all__ = ["Part", "Parts"]

ATTACKS = (
    "src/cutlayer/audit",
    "src/cutlayer/split/cut.py",
    "src/cutlayer/split/loading.py",
    "benchmarks/attacks/victim.py",
    "benchmarks/attacks/texts.py",
)
DEFENSES = (*ATTACKS, "src/cutlayer/privacy", "benchmarks/attacks/conditions.py")
CODECS = (*ATTACKS, "src/cutlayer/wire", "benchmarks/attacks/conditions.py")

CUTS = (2, 8, 16)


class Part(NamedTuple):
    """Some figures of the table, kept from an earlier commit for as long as they are true."""

    name: str
    measure: Callable[[], dict[str, float]]
    reads: tuple[str, ...] = ATTACKS
    """What it runs, from the root: unchanged since a commit, its figures of that commit hold."""


def rated(name: str, found: Finding, *, measure: str = "") -> dict[str, float]:
    """Return a rate with its interval and its n."""
    low, high = found.trr_ci
    return {
        f"{name}{measure}": found.trr,
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_prior": found.prior_trr,
        f"{name}_sequences": found.sequences,
        f"{name}_tokens": found.tokens,
    }


def at_cut(attack: str, bottom: int, condition: str = "") -> str:
    """Return a figure's name: at cut 2, which most figures are of, the cut is left out."""
    words = [attack] + ([f"cut_{bottom}"] if bottom != CUTS[0] else []) + [condition]
    return "_".join(word for word in words if word)


def _top_tenth(grad_BTD: Tensor) -> Tensor:
    least = grad_BTD.abs().flatten().kthvalue(int(0.9 * grad_BTD.numel())).values
    return grad_BTD * (grad_BTD.abs() > least)


def _clipped(grad_BTD: Tensor) -> Tensor:
    norms_BT1 = grad_BTD.norm(dim=-1, keepdim=True)
    middle = norms_BT1[norms_BT1 > 0].median()
    return grad_BTD * (middle / norms_BT1.clamp_min(1e-30)).clamp_max(1)


class Parts:
    """The attacks, one after the other: what decides first."""

    def __init__(self, model: str, text: Path, scratch_folder: Path, data: Path, quick: bool):
        """Begin with a model, the file of diagnosis wordings, and where fetched texts are kept."""
        self.quick, self.skipped = quick, dict[str, str]()
        self.smollm, self._text, self._data = Victim(model), text, data
        self._gpt2 = scratch_folder / "gpt2"
        self.many, self.some, self.few = (4, 2, 2) if quick else (64, 16, 8)
        self.tokens, self.length = (4, 12) if quick else (8, 32)
        self.cuts = CUTS[:1] if quick else CUTS

    # ------------------------------------------------------------------ the texts

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Return token ids; of the quick form's tiny model, bytes."""
        if self.quick:
            return [torch.tensor(list(text.encode()[:64])) for text in texts]
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.smollm.model)
        return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]

    def wordings(self, name: str, count: int) -> list[Tensor]:
        """Return diagnosis wordings of `train.jsonl` or `test.jsonl`, of 3 tokens or more."""
        if self.quick:
            license_text = Path(__file__).resolve().parents[2] / "LICENSE"
            texts = license_text.read_text().split("\n\n")[:count]
        else:
            texts = real.wordings(self._text.with_name(name), count)
        return [ids_T for ids_T in self.encode(texts) if len(ids_T) > 2]

    def begun(self, count: int, tokens: int) -> list[Tensor]:
        """Return the beginnings of held-out wordings."""
        longer = [ids_T for ids_T in self.wordings("test.jsonl", 200) if len(ids_T) >= 4]
        return [ids_T[:tokens] for ids_T in longer[:count]]

    def joined(self, count: int, tokens: int) -> list[Tensor]:
        """Return pieces of one length of wordings that are joined to a text."""
        return _cut_up(self.wordings("train.jsonl", 4000), count, tokens)

    # ------------------------------------------------------------------ the table

    def all(self) -> Iterator[Part]:
        """Yield all parts."""
        yield from self._undefended()
        yield from self._gradients_defended(2)
        for bits in (8, 4):
            yield Part(f"a1 int{bits}", partial(self._a1_rounded, bits))
        yield Part("a1 permutation", self._a1_permutation)
        yield Part("a1 rotation", self._a1_rotation)
        yield Part("a1 embedding noise", self._a1_embedding_noise, DEFENSES)
        yield from self._activations_defended(self.cuts[0])
        for top in (1, 0):
            yield from self._gradients_defended(top)
        for bottom in self.cuts[1:]:
            yield from self._activations_defended(bottom)

    def _undefended(self) -> Iterator[Part]:
        yield Part("a1 clean", self._a1_clean)
        for top in (0, 1, 2):
            yield Part(f"a4 m{top}", partial(self._a4, f"a4_m{top}", self.many, top_layers=top))
        yield Part("a4 answers", partial(self._a4, "a4_answers_m2", self.many, answers=6))
        yield Part("a2 cut 2", partial(self._a2, 2))
        yield Part("gpt2", self._gpt2_shaped)
        if self.quick:
            return
        for longer in (128, 256):
            name = f"a4_length_{longer}_m2"
            yield Part(f"a4 {longer}", partial(self._a4, name, self.few, longer))
        for top in (4, 8):
            yield Part(f"a4 m{top}", partial(self._a4, f"a4_m{top}", self.some, top_layers=top))
        for bottom, count in zip(CUTS[1:], (self.some, self.few), strict=True):
            yield Part(f"a2 cut {bottom}", partial(self._a2, bottom))
            yield Part(f"a1 cut {bottom}", partial(self._a1_cut, bottom, count))
        for name, fetch in (("emails", real.emails), ("reviews", real.reviews)):
            yield Part(name, partial(self._fetched, name, fetch))

    def _gradients_defended(self, top: int) -> Iterator[Part]:
        for name in lossy_codecs("gradients"):
            yield Part(f"a4 codec {name} m{top}", partial(self._a4_codec, name, top), CODECS)
        yield Part(f"a4 noise m{top}", partial(self._a4_noise, top), DEFENSES)
        if top == 2:
            yield Part("a4 refused", self._a4_refused)
            yield Part("a4 two servers", self._a4_two_servers, DEFENSES)
            yield Part("a4 noisy activations", self._a4_noisy_activations, DEFENSES)

    def _activations_defended(self, bottom: int) -> Iterator[Part]:
        """Yield what is of one cut together, for its table of candidates is made once."""
        for name in lossy_codecs("activations"):
            measure = partial(self._a1_codec, name, bottom)
            yield Part(f"a1 codec {name} cut {bottom}", measure, CODECS)
            measure = partial(self._a2_codec, name, bottom)
            yield Part(f"a2 codec {name} cut {bottom}", measure, CODECS)
        for name in NOISES:
            measure = partial(self._a2_noise, name, bottom)
            yield Part(f"a2 {name} cut {bottom}", measure, DEFENSES)
            measure = partial(self._a1_noise, name, bottom)
            yield Part(f"a1 {name} cut {bottom}", measure, DEFENSES)
        measure = partial(self._a2_embedding_noise, bottom)
        yield Part(f"a2 embedding noise cut {bottom}", measure, DEFENSES)

    # ------------------------------------------------------------------ A1

    def _a1_clean(self) -> dict[str, float]:
        found = self.smollm.search(self.begun(self.many, self.tokens))
        return rated("a1_clean", found, measure="_trr") | {
            "a1_exact": found.exact,
            "prior_trr": found.prior_trr,
            "a1_seconds_per_token": found.extra["seconds_per_token"],
            "a1_candidates_median": found.extra["candidates_median"],
        }

    def _a1_cut(self, bottom: int, count: int) -> dict[str, float]:
        # Deep down some tokens are told apart only by trying the whole vocabulary.
        texts = self.begun(count, 6 if count > self.few else 4)
        return rated(f"a1_cut_{bottom}", self.smollm.search(texts, bottom_layers=bottom))

    def _a1_codec(self, name: str, bottom: int) -> dict[str, float]:
        known = through(name, self.smollm.public(bottom, 0), self.wordings("train.jsonl", 200))
        found = self.smollm.search(
            self.begun(self.some if bottom == CUTS[0] else self.few, 4),
            bottom_layers=bottom,
            change=known,
            settings=SearchSettings(score="quant", release=known),
        )
        return rated(at_cut("a1", bottom, f"codec_{name}"), found)

    def _a1_rounded(self, bits: int) -> dict[str, float]:
        known = partial(rounded, bits=bits)
        settings = SearchSettings(score="quant", release=known)
        texts = self.begun(self.some, min(self.tokens, 6))
        return rated(f"a1_int{bits}", self.smollm.search(texts, change=known, settings=settings))

    def _a1_permutation(self) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)

        def permuted(rows_TD: Tensor) -> Tensor:
            return torch.stack(
                [row_D[torch.randperm(len(row_D), generator=generator)] for row_D in rows_TD]
            )

        return self._a1_secret("permutation", permuted, "sorted_l1")

    def _a1_rotation(self) -> dict[str, float]:
        def turned(rows_TD: Tensor) -> Tensor:
            width = rows_TD.shape[1]
            secret = torch.Generator().manual_seed(1)
            return rows_TD @ torch.linalg.qr(torch.randn(width, width, generator=secret))[0]

        return self._a1_secret("rotation", turned, "gram")

    def _a1_secret(self, name: str, change: Change, score: str) -> dict[str, float]:
        # A token takes many seconds: every row that may be the right one is sorted, or multiplied.
        texts = self.begun(self.few, 4)
        found = self.smollm.search(texts, change=change, settings=SearchSettings(score=score))
        return rated(f"a1_{name}", found)

    def _a1_noise(self, name: str, bottom: int) -> dict[str, float]:
        defended = unclipped(NOISES[name]())
        # One call of a deep bottom is dear, and without a match every candidate is called.
        rungs, tokens = ((256, 2048), 6) if bottom == 2 else ((256, 768), 4)
        found = self.smollm.search(
            self.begun(self.few, min(self.tokens, tokens)),
            bottom_layers=bottom,
            change=defended,
            settings=SearchSettings(rungs=rungs, eps=0.0),
        )
        return rated(at_cut("a1", bottom, name), found)

    def _a1_embedding_noise(self) -> dict[str, float]:
        public = self.smollm.public(CUTS[0], 0)
        texts, figures = self.begun(self.many, self.tokens), dict[str, float]()
        for ratio in (2.0, 4.0, 8.0):
            found = embedding_reading(public, texts, noise_at_the_embedding(public, ratio))
            figures |= rated(f"a1_metric_dp_embed_{ratio:g}", found)
        return figures

    # ------------------------------------------------------------------ A2

    def _a2(self, bottom: int) -> dict[str, float]:
        name = "a2_in_domain" if bottom == CUTS[0] else f"a2_cut_{bottom}"
        return self._taught(name, self.smollm.public(bottom, 0))

    def _a2_codec(self, name: str, bottom: int) -> dict[str, float]:
        public = self.smollm.public(bottom, 0)
        known = through(name, public, self.wordings("train.jsonl", 200))
        return self._taught(at_cut("a2", bottom, f"codec_{name}"), public, known)

    def _a2_noise(self, name: str, bottom: int) -> dict[str, float]:
        noise = NOISES[name]()
        public = self.smollm.public(bottom, 0)
        return self._taught(at_cut("a2", bottom, name), public, noise.apply)

    def _a2_embedding_noise(self, bottom: int) -> dict[str, float]:
        public, ratio = self.smollm.public(bottom, 0), 4.0
        noisy = Noisy(public, noise_at_the_embedding(public, ratio))
        return self._taught(at_cut("a2", bottom, f"metric_dp_embed_{ratio:g}"), noisy)

    def _taught(
        self, name: str, public: PublicModel | Noisy, defend: Defend | None = None
    ) -> dict[str, float]:
        """Train an inverter on wordings of other codes, defended alike, and read held-out ones."""
        aux = self.wordings("train.jsonl", 2100)
        inverter = train_inverter(public, aux, defend=defend)  # type: ignore[arg-type]
        victims = self.wordings("test.jsonl", self.many if not self.quick else 8)
        with torch.no_grad():
            sent = [public.bottom(ids_T[None]) for ids_T in victims]
            smashed = [(sent_BTD if defend is None else defend(sent_BTD))[0] for sent_BTD in sent]
        found = learned_inversion(inverter, smashed, victims)
        return rated(name, found, measure="_trr") | {f"{name}_rouge_l": found.rouge["L"]}

    # ------------------------------------------------------------------ A4

    def _a4(self, name: str, count: int, tokens: int = 0, **more: Any) -> dict[str, float]:
        return rated(name, self.smollm.labels(self.joined(count, tokens or self.length), **more))

    def _a4_codec(self, name: str, top: int) -> dict[str, float]:
        both = name in lossy_codecs("activations")
        codec = name if both else {"gradients_up": name}
        # Where rounding leaves no proof an inversion goes on to its end.
        count = self.many if name == "bf16" else self.some
        return self._a4(f"a4_codec_{name}_m{top}", count, codec=codec, top_layers=top)

    def _a4_refused(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        changes = {"int8": partial(rounded, bits=8), "top_tenth": _top_tenth, "clip": _clipped}
        for name, change in changes.items():
            figures |= self._a4(f"a4_{name}_m2", self.some, change=change, iterations=40)
        return figures

    def _a4_noise(self, top: int) -> dict[str, float]:
        defenses = {
            f"gaussian_{nsr}": defense_of("gaussian", nsr=nsr, channel="gradients")
            for nsr in (0.3, 1.0, 10.0)
        }
        defenses["noisy_grad_8"] = defense_of("noisy_grad", clip=0.01, epsilon=8.0, delta=1e-6)
        figures: dict[str, float] = {}
        for name, defense in defenses.items():
            # More iterations than these fit the noise.
            named, given = f"a4_{name}_m{top}", {"defenses": [defense], "iterations": 15}
            count = self.many if top == 2 else self.some  # no proof ends these early
            figures |= self._a4(named, count, top_layers=top, **given)
        return figures

    def _a4_two_servers(self) -> dict[str, float]:
        def of_one(grad_BTD: Tensor) -> Tensor:
            return shares(grad_BTD)[1]

        return self._a4("a4_two_server_m2", self.some, change=of_one, iterations=15)

    def _a4_noisy_activations(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, make in NOISES.items():
            figures |= self._a4(f"a4_activations_{name}_m2", self.some, defenses=[make()])
        return figures

    # ------------------------------------------------------------------ other models and texts

    def _gpt2_shaped(self) -> dict[str, float]:
        victim = Victim(write_gpt2(self._gpt2))
        rows = [ids_T % 4096 for ids_T in self.joined(self.many, 16)]
        figures: dict[str, float] = {}
        for bottom, top in ((1, 0), (2, 1), (4, 2)):
            found = victim.search([ids_T[:8] for ids_T in rows], bottom_layers=bottom)
            figures |= rated(f"gpt2_a1_cut_{bottom}", found)
            found = victim.labels(rows, bottom_layers=bottom, top_layers=top)
            figures |= rated(f"gpt2_a4_m{top}", found)
        return figures

    def _fetched(self, name: str, fetch: Callable[[Path, int], list[str]]) -> dict[str, float]:
        try:
            ids = self.encode([text[:400] for text in fetch(self._data, 120)])
        except real.Missing as error:
            self.skipped[name] = f"{name} were left out: {error}"
            return {}
        short = [ids_T[:8] for ids_T in ids if len(ids_T) >= 8][: self.some]
        figures = rated(f"a1_{name}", self.smollm.search(short))
        rows = _cut_up(ids, self.many, 32)
        return figures | rated(f"a4_{name}_m2", self.smollm.labels(rows))


def _cut_up(texts: Sequence[Tensor], count: int, tokens: int) -> list[Tensor]:
    ids = torch.cat([*texts])
    return list(ids[: len(ids) // tokens * tokens].view(-1, tokens)[:count])
