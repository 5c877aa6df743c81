"""Find, position by position, the tokens that would have sent what was received of one text."""

# Shapes:  N candidates   R rows   P positions before   T tokens   D width   V vocabulary

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cutlayer.audit.candidates import CandidateTable, Prefix
from cutlayer.audit.public import PublicModel
from cutlayer.audit.scores import GRAM_POSITIONS, SCORES
from cutlayer.errors import ConfigError

__all__ = ["Prior", "SearchSettings", "Searched", "calibrated", "run_search"]

Prior = Callable[[Tensor], Tensor]
"""From the tokens before, (T,), none at first, to the log-probability of every next one, (V,)."""

_APART = 100  # times farther than the right token is the next best, at least
_ROUNDING = 1e-5  # of the typical distance between tokens, at most


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Raises:
        ConfigError: If the settings make no sense.
    """

    score: str = "l2"
    """One of `SCORES`."""
    beams: int = 1
    """How many texts to keep in mind at a time; 4 to 8 where noise is on."""
    rungs: tuple[int | None, ...] = (256, 4096, None)
    """How many tokens are tried before the next best are; None for the whole vocabulary."""
    eps: float | None = None
    """A candidate this near is right; found on public samples if None, none is if 0."""
    sigma: float | None = None
    """The noise's standard deviation for `map`; estimated from the traffic if None."""
    release: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    """What is known to be done to each row, (N, D) to (N, any): a quantiser, a projection."""

    def __post_init__(self) -> None:
        """Check them."""
        if self.score not in SCORES:
            raise ConfigError(f"score '{self.score}' is unknown: use one of {', '.join(SCORES)}")
        if self.score == "quant" and self.release is None:
            raise ConfigError("score 'quant' compares after a known quantiser: give it as release")
        if self.beams < 1:
            raise ConfigError(f"beams={self.beams} keeps no text in mind: use 1 or more")
        sizes = [float("inf") if rung is None else rung for rung in self.rungs]
        if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
            raise ConfigError(
                f"rungs={self.rungs} are no growing numbers of candidates: use for example "
                "(256, 4096, None)"
            )
        for name in ("sigma", "eps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value} is no distance: use a number of 0 or more")

    def released(self, rows_ND: Tensor) -> Tensor:
        """Return rows as they leave, (N, any)."""
        return rows_ND if self.release is None else self.release(rows_ND)


@dataclass(frozen=True)
class Searched:
    """What a search made of one text; each field has an entry per token.

    Attributes:
        ids: The tokens.
        distances: From the best candidate to what was received, in the units of the score.
        margins: How many times farther the second best was.
        candidates: How many tokens went through the bottom.
        exact: Whether each had one within `eps`. If not, something was done to the activations,
            or another bottom sent them.
    """

    ids: tuple[int, ...]
    distances: tuple[float, ...]
    margins: tuple[float, ...]
    candidates: tuple[int, ...]
    exact: bool = True


class _View:
    """What was received of one text, and how to compare with it."""

    def __init__(self, smashed_TD: Tensor, settings: SearchSettings) -> None:
        self.smashed_TD = smashed_TD
        self.settings = settings
        self.eps = settings.eps or 0.0
        self._measure = SCORES[settings.score]

    def distances(self, sent_ND: Tensor, path: _Path) -> Tensor:
        """Return how far each candidate is from each row that may be the next one's, (N, R)."""
        seen_RD = self.smashed_TD[self.open_rows(path)]
        seen_PD = self.smashed_TD[list(path.rows[-GRAM_POSITIONS:])]
        released_ND = self.settings.released(sent_ND)
        found_NR = self._measure(released_ND, seen_RD, path.released_PD, seen_PD)
        if self.settings.score == "quant" and released_ND.shape == sent_ND.shape:
            # Of those that are rounded to the same, the one that was nearest before.
            found_NR = found_NR + 1e-3 * self._measure(sent_ND, seen_RD, seen_PD, seen_PD)
        return found_NR

    def apart(self, one_ND: Tensor, other_ND: Tensor, path: _Path) -> Tensor:
        """Return how far the first rows are from the second ones, (N,), if both are public."""
        last_PD, released = path.released_PD, self.settings.released
        return self._measure(released(one_ND), released(other_ND), last_PD, last_PD).diagonal()

    def open_rows(self, path: _Path) -> list[int]:
        """Return the rows among which that of the path's next token is."""
        if self.settings.score != "any_row":
            return [len(path.rows)]
        return [row for row in range(len(self.smashed_TD)) if row not in path.rows]

    def totals(self, distances_N: Tensor, log_prior_N: Tensor | None) -> Tensor:
        """Return what is minimised, (N,): for `map` the negative log-posterior."""
        if self.settings.score != "map":
            return distances_N.square()
        assert self.settings.sigma is not None
        likelihood_N = distances_N.square() / (2 * max(self.settings.sigma, 1e-9) ** 2)
        return likelihood_N if log_prior_N is None else likelihood_N - log_prior_N


@dataclass(frozen=True)
class _Path:
    """A text that is kept in mind."""

    prefix: Prefix
    released_PD: Tensor
    """What its last tokens release by the public bottom."""
    rows: tuple[int, ...] = ()
    """The row in which each token was found."""
    total: float = 0.0

    def grown(self, token: int, view: _View, total: float = 0.0) -> _Path:
        """Return the path with a token more."""
        prefix, sent_D = self.prefix.grown(token)
        row = view.open_rows(self)[int(view.distances(sent_D[None], self)[0].argmin())]
        released_PD = torch.cat([self.released_PD, view.settings.released(sent_D[None])])
        return _Path(prefix, released_PD[-GRAM_POSITIONS:], (*self.rows, row), total)


class _Trial:
    """The candidates after one path: tried from the likeliest on until none can be better."""

    def __init__(
        self, path: _Path, view: _View, table: CandidateTable, log_prior_V: Tensor | None
    ) -> None:
        self._path, self._view, self._table = path, view, table
        self._log_prior_V = log_prior_V
        vocabulary = table.vocabulary
        self.distances_V = torch.full((vocabulary,), float("inf"), device=table.device)
        self.totals_V = self.distances_V.clone()
        self.tried_V = torch.zeros_like(self.distances_V, dtype=torch.bool)
        self.evaluated = 0
        self.proven = self.refuted = False
        self._run()
        self.order = self.totals_V.argsort()

    def _run(self) -> None:
        view, table, prefix = self._view, self._table, self._path.prefix
        every_V = torch.arange(len(self.tried_V), device=self.tried_V.device)
        shifts: list[Tensor] = []
        for rung in view.settings.rungs:
            if rung is None or rung >= len(every_V):
                sent_VD = self._try(every_V)
                if len(view.settings.rungs) > 1:
                    table.learn(prefix, sent_VD)
                self.refuted = float(self.distances_V.amin()) > view.eps
                return
            if not shifts:
                shifts = table.shifts(prefix)
                self.evaluated += len(table.probes_N)
            roughly_V = table.by_rows(prefix, shifts, self._distances)
            waiting_V = self._totals(roughly_V, every_V).masked_fill(self.tried_V, float("inf"))
            order_N = waiting_V.argsort()[: rung - int(self.tried_V.sum())]
            sent_ND = self._try(order_N)
            rest = waiting_V[~self.tried_V].amin() - self._error(order_N, sent_ND, shifts)
            if self.proven or (not view.eps and rest > self.totals_V.amin()):
                return
            shifts = table.moved(prefix, order_N, sent_ND)

    def _try(self, tokens_N: Tensor) -> Tensor:
        """Compare what these send with what was received, and return it, (N, D)."""
        blocks = []
        for block_N in tokens_N.split(4096):
            blocks.append(self._path.prefix.after(block_N))
            self.distances_V[block_N] = self._distances(blocks[-1])
        self.totals_V[tokens_N] = self._totals(self.distances_V[tokens_N], tokens_N)
        self.tried_V[tokens_N] = True
        self.evaluated += len(tokens_N)
        nearest, next_best = self.distances_V.topk(2, largest=False).values.tolist()
        # A score of few digits, such as a norm, has chance hits: they are not alone.
        self.proven = nearest <= self._view.eps and next_best >= _APART * nearest
        return torch.cat(blocks)

    def _error(self, tokens_N: Tensor, sent_ND: Tensor, shifts: list[Tensor]) -> Tensor:
        """Return by how much a token that was not tried may be better than it was guessed to be.

        It is at most as far from its guess as those that were tried, the worst fiftieth left out,
        and noise is at right angles to that: squares add up.
        """
        tokens_N, sent_ND = tokens_N[:256], sent_ND[:256]
        errors = [
            self._view.apart(sent_ND, rows_VD[tokens_N] + shift_D, self._path)
            for rows_VD, shift_D in zip(self._table.rows(self._path.prefix), shifts, strict=True)
        ]
        return self._view.totals(torch.stack(errors).amin(0).quantile(0.98), None)

    def _distances(self, sent_ND: Tensor) -> Tensor:
        return self._view.distances(sent_ND, self._path).amin(1)

    def _totals(self, distances_N: Tensor, which: Tensor) -> Tensor:
        prior_V = self._log_prior_V
        return self._view.totals(distances_N, None if prior_V is None else prior_V[which])

    def best(self, count: int) -> list[tuple[float, int]]:
        """Return the totals and tokens of the best ones."""
        return [(float(self.totals_V[token]), int(token)) for token in self.order[:count]]

    def margin(self) -> float:
        """Return how many times farther the second best is than the best."""
        first, second = self.distances_V[self.order[:2]].tolist()
        return float(second / max(first, 1e-30))


@torch.no_grad()
def run_search(
    public: PublicModel,
    smashed_TD: Tensor,
    settings: SearchSettings,
    *,
    truth: Tensor | None,
    prior: Prior | None,
    table: CandidateTable,
) -> Searched:
    """Search one text with settings that `calibrated` has completed."""
    view = _View(smashed_TD.to(public.device, torch.float32), settings)
    paths = [_Path(Prefix(public), view.smashed_TD[:0])]
    if not view.eps and settings.rungs != (None,):
        table.learn_all()  # no match will end the doubt, so the guesses have to be good
    guesses, distances, margins, candidates = [], [], [], []
    keep = settings.beams if truth is None else 1
    for position in range(len(smashed_TD)):
        trials = []
        for path in paths:
            before_T = torch.tensor(path.prefix.ids, dtype=torch.long, device=public.device)
            log_prior_V = prior(before_T) if prior and settings.score == "map" else None
            trials.append(_Trial(path, view, table, log_prior_V))
            if trials[-1].proven:
                paths, trials = [path], trials[-1:]
                break
        if all(trial.refuted for trial in trials):
            view.eps = 0.0  # the right token was among them: no distance is a proof here
        found = sorted(
            (path.total + total, number, token)
            for number, (path, trial) in enumerate(zip(paths, trials, strict=True))
            for total, token in trial.best(keep)
        )[:keep]
        best = trials[found[0][1]]
        guesses.append(found[0][2])
        distances.append(float(best.distances_V[found[0][2]]))
        margins.append(best.margin())
        candidates.append(sum(trial.evaluated for trial in trials))
        if truth is None:
            if best.proven:
                found = found[:1]
            paths = [paths[number].grown(token, view, total) for total, number, token in found]
        else:
            paths = [paths[0].grown(int(truth[position]), view)]
    # A beam may find only later which of its texts was the better one from the beginning.
    ids = paths[0].prefix.ids if truth is None else tuple(guesses)
    exact = view.eps == (settings.eps or 0.0)
    return Searched(ids, tuple(distances), tuple(margins), tuple(candidates), exact)


@torch.no_grad()
def calibrated(
    public: PublicModel, settings: SearchSettings, samples: Sequence[Tensor] = ()
) -> SearchSettings:
    """Return settings with the `eps` that tells right tokens from wrong ones on known texts.

    The right ones' distance is rounding only: the client runs a text at once, the search a token
    at a time. Where noise is on there is no such distance, and `eps` is 0.

    Args:
        public: The model.
        settings: How to search.
        samples: Public texts, (T,) each, of which the beginning of four is used; random tokens if
            none.
    """
    if settings.eps is not None:
        return settings
    if settings.score == "map":
        return replace(settings, eps=0.0)
    generator = torch.Generator().manual_seed(1)
    if not len(samples):
        samples = list(torch.randint(public.vocabulary, (2, 12), generator=generator))
    samples = [ids_T[:24] for ids_T in samples[:4]]
    others_N = torch.randint(public.vocabulary, (32,), generator=generator).to(public.device)
    right, wrong = [], []
    for ids_T in samples:
        released_TD = settings.released(public.bottom(ids_T[None].to(public.device))[0])
        view = _View(released_TD, settings)
        path = _Path(Prefix(public), released_TD[:0])
        for token in ids_T.tolist():
            tokens_N = torch.cat([others_N.new_tensor([token]), others_N[others_N != token]])
            distances_N = view.distances(path.prefix.after(tokens_N), path).amin(1)
            right.append(float(distances_N[0]))
            wrong.extend(distances_N[1:].tolist())
            path = path.grown(token, view)
    eps = max(3 * max(right), _ROUNDING * statistics.median(wrong))
    return replace(settings, eps=eps if eps < min(wrong) else 0.0)
