"""Which tokens a forward search tries first, and what each would send after a given prefix."""

# Shapes:  N candidates   T tokens   D model width   V vocabulary

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cutlayer.audit.public import PublicModel
from cutlayer.errors import ConfigError

__all__ = ["CandidateTable", "Prefix", "require_causal"]

_FLOATS = 48_000_000  # about what one call of the bottom may hold
_ROWS = 4096  # of the table, at a time
_FITTED = 2048  # tokens, at least
_RIDGE = 1e-3


class Prefix:
    """Tokens that are recovered, with the bottom's memory of them.

    Attributes:
        ids: The tokens.
    """

    def __init__(self, public: PublicModel, ids: tuple[int, ...] = (), cache: Any = None) -> None:
        self.ids = ids
        self._public = public
        # A bottom of embeddings alone writes nothing into a cache, so positions would stand still.
        self._cache = public.new_cache() if cache is None and public.cut.lower else cache

    @torch.no_grad()
    def after(self, tokens_N: Tensor) -> Tensor:
        """Return what each token would send if it came next, (N, D)."""
        width = self._public.config.get_text_config().hidden_size
        per_row = width * (16 + 3 * (len(self.ids) + 1) * max(self._public.cut.lower, 1))
        rows = min(max(_FLOATS // per_row, 16), _ROWS)
        return torch.cat([self._call(chunk_N)[0] for chunk_N in tokens_N.split(rows)])

    @torch.no_grad()
    def grown(self, token: int) -> tuple[Prefix, Tensor]:
        """Return the prefix with a token more, and what that token sends, (D,)."""
        sent_1D, cache = self._call(torch.tensor([token], device=self._public.device))
        return Prefix(self._public, (*self.ids, token), cache), sent_1D[0]

    def _call(self, tokens_N: Tensor) -> tuple[Tensor, Any]:
        if self._cache is None:
            before_T = torch.tensor(self.ids, dtype=torch.long, device=tokens_N.device)
            ids_NT = torch.cat([before_T.expand(len(tokens_N), -1), tokens_N[:, None]], 1)
            return self._public.bottom(ids_NT)[:, -1], None
        # What a cache holds is replaced when it grows, never written into: a shallow copy is one.
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        cache.batch_repeat_interleave(len(tokens_N))
        return self._public.bottom(tokens_N[:, None], cache=cache)[:, -1], cache


class CandidateTable:
    """A guess at what every token would send after a prefix, to try the likeliest ones first.

    What a token sends is nearly linear in its embedding, and what a prefix adds to it is much the
    same for all tokens. So a ridge regression on some thousand tokens after one public prefix,
    moved by what a few probes send after the prefix in question, ranks the right token among
    the first in most cases. It is made once a model and cut, in seconds. A few tokens are not
    linear at all: the first time that a search has to try the whole vocabulary, it leaves here
    what every token really sent, and the better of the two guesses counts from then on.

    Attributes:
        seconds: What it took to make so far.
        probes_N: The tokens on which another prefix is measured.
        vocabulary: How many tokens there are.
        device: Where the table is.
    """

    def __init__(
        self, public: PublicModel, *, prefix: Sequence[int] | None = None, probes: int = 32
    ) -> None:
        """Prepare a table; it is made when it is first needed.

        Args:
            public: The model.
            prefix: The public prefix; four tokens that are drawn by a fixed seed if none.
            probes: How many tokens each other prefix is measured on.
        """
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(public.vocabulary, (4 + probes,), generator=generator)
        self.seconds = 0.0
        self.vocabulary = public.vocabulary
        self.device = public.device
        self.probes_N = drawn[4:].to(public.device)
        self._public = public
        self._prefix = tuple(int(i) for i in (drawn[:4] if prefix is None else prefix))
        self._tables: dict[bool, list[Tensor]] = {}

    def rows(self, prefix: Prefix) -> list[Tensor]:
        """Return the guesses to start from, (V, D) each; the first position has its own."""
        first = not prefix.ids
        if first not in self._tables:
            began = time.perf_counter()
            self._tables[first] = [self._fitted(self._base(first))]
            self.seconds += time.perf_counter() - began
        return self._tables[first]

    def learn(self, prefix: Prefix, sent_VD: Tensor) -> None:
        """Take down what every token really sent after `prefix`, if nothing is yet."""
        rows = self.rows(prefix)
        if len(rows) == 1:
            rows.append(sent_VD)

    def learn_all(self) -> None:
        """Run every token after nothing and after the public prefix, if that was not done yet."""
        every_V = torch.arange(self.vocabulary, device=self.device)
        for first in (True, False):
            base = self._base(first)
            if len(self.rows(base)) == 1:
                began = time.perf_counter()
                self.learn(base, base.after(every_V))
                self.seconds += time.perf_counter() - began

    def _base(self, first: bool) -> Prefix:
        base = Prefix(self._public)
        for token in () if first else self._prefix:
            base, _ = base.grown(token)
        return base

    @torch.no_grad()
    def _fitted(self, base: Prefix) -> Tensor:
        # A property of the public model like `head_VD`, but one that it does not name.
        embedding_VE = self._public._ends.get_input_embeddings().weight
        count = max(_FITTED, 3 * embedding_VE.shape[1])
        generator = torch.Generator().manual_seed(2)
        chosen_N = torch.randperm(self.vocabulary, generator=generator)[:count].to(self.device)
        known_NE, sent_ND = embedding_VE[chosen_N].double(), base.after(chosen_N).double()
        mean_E, mean_D = known_NE.mean(0), sent_ND.mean(0)
        known_NE, sent_ND = known_NE - mean_E, sent_ND - mean_D
        gram_EE = known_NE.T @ known_NE
        gram_EE.diagonal().add_(_RIDGE * gram_EE.diagonal().mean())
        map_ED = torch.linalg.solve(gram_EE, known_NE.T @ sent_ND)
        return (embedding_VE - mean_E.float()) @ map_ED.float() + mean_D.float()

    def shifts(self, prefix: Prefix) -> list[Tensor]:
        """Return by how much the probes send something else after `prefix`, (D,) a guess."""
        return self.moved(prefix, self.probes_N, prefix.after(self.probes_N))

    def moved(self, prefix: Prefix, tokens_N: Tensor, sent_ND: Tensor) -> list[Tensor]:
        """Return by how much these tokens send something else on average, (D,) a guess."""
        return [sent_ND.mean(0) - rows_VD[tokens_N].mean(0) for rows_VD in self.rows(prefix)]

    def by_rows(
        self, prefix: Prefix, shifts: list[Tensor], measure: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the least that `measure` says of a token's guesses, (V,) or (V, any)."""
        found = [
            torch.cat([measure(chunk_ND + shift_D) for chunk_ND in rows_VD.split(_ROWS)])
            for rows_VD, shift_D in zip(self.rows(prefix), shifts, strict=True)
        ]
        return torch.stack(found).amin(0)


@torch.no_grad()
def require_causal(public: PublicModel) -> None:
    """Refuse a bottom in which later tokens change what earlier ones send.

    Raises:
        ConfigError: If it does.
    """
    ids_BT = torch.arange(12, device=public.device).reshape(2, 6) % public.vocabulary
    ids_BT[1, :-1] = ids_BT[0, :-1]
    one_TD, other_TD = public.bottom(ids_BT)[:, :-1]
    if not torch.allclose(one_TD, other_TD, rtol=1e-3, atol=1e-5):
        raise ConfigError(
            "forward search reads a text from left to right, but in models of type "
            f"'{public.config.model_type}' each token's activation depends on the later ones "
            "as well: audit it with the learned inverter (A2) instead"
        )
