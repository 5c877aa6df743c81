"""Learn what codecs must know of this run's activations, from its first batches.

Until enough tokens have passed, activations go in a codec of more bits; then what was learnt is
sent once (docs/decisions/0014). Nothing is learnt of gradients: they have no mean.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cutlayer.client.remote_trunk import Question
from cutlayer.client.replies import Named, Pending
from cutlayer.client.send_once import Batch
from cutlayer.wire.codecs import CODECS
from cutlayer.wire.statics import Learner, Statics

__all__ = ["Calibration", "Watched"]

_TOKENS_FOR_A_MEAN = 512
_TOKENS_A_COORDINATE = 2
"""A basis of D coordinates is learnt from so many times D tokens."""


class Calibration:
    """What is learnt of the activations, up and down, while they pass."""

    def __init__(self, codecs: Mapping[str, str]) -> None:
        named = {"smashed": "activations_up", "trunk_out": "activations_down"}
        self._codecs = {
            name: CODECS[codecs[departure]]
            for name, departure in named.items()
            if CODECS[codecs[departure]].learns
        }
        self._learners: dict[str, Learner] = {}
        self._width = 0

    @property
    def learns(self) -> bool:
        """Whether there is something left to learn."""
        return bool(self._codecs)

    def watched(self, smashed_BTD: Tensor, question: Question, output: Named) -> Watched:
        """Learn of activations that leave; return the trunk's output, learnt of when it comes."""
        self._width = smashed_BTD.shape[-1]
        if question.rows is None:
            self._see("smashed", smashed_BTD, question.carried)
        else:
            self.rows_left(question.rows, question.carried)
        return Watched(self, question, output)

    def rows_left(self, rows: Batch, carried: Mapping[str, Tensor]) -> None:
        """Learn of rows that leave for the first time."""
        if rows.hidden_BTD is not None:
            self._width = rows.hidden_BTD.shape[-1]
            own = {n: t[rows.new] if len(t) == len(rows.ids) else t for n, t in carried.items()}
            self._see("smashed", rows.hidden_BTD, own)

    def known(self, name: str) -> None:
        """Learn nothing of a direction: its statics are there."""
        self._codecs.pop(name, None)

    def arrived(self, out_BTD: Tensor, question: Question) -> None:
        """Learn of what the trunk sent back."""
        self._see("trunk_out", out_BTD, question.carried, question.wanted_N)

    def _see(
        self,
        name: str,
        x_BTD: Tensor,
        carried: Mapping[str, Tensor],
        wanted_N: Tensor | None = None,
    ) -> None:
        codec = self._codecs.get(name)
        if codec is not None:
            if name not in self._learners:
                self._learners[name] = Learner(self._width, basis=codec.learns == "basis")
            self._learners[name].see(x_BTD, carried, wanted_N)

    def finished(self) -> dict[str, Statics]:
        """Return what was learnt from enough tokens by now, each direction once."""
        found = {}
        for name, learner in list(self._learners.items()):
            codec = self._codecs[name]
            is_basis = codec.learns == "basis"
            wanted = _TOKENS_A_COORDINATE * self._width if is_basis else _TOKENS_FOR_A_MEAN
            if learner.tokens >= wanted:
                found[name] = learner.learnt(codec.budget)
                del self._codecs[name], self._learners[name]
        return found


@dataclass
class Watched:
    """A tensor that is on its way, of which something will be learnt."""

    calibration: Calibration | None
    question: Question
    answer: Named

    @property
    def pending(self) -> Pending:
        """The reply."""
        return self.answer.pending

    def arrived(self) -> bool:
        """Say whether the reply is there."""
        return self.answer.arrived()

    def wait(self) -> Tensor | None:
        """Return the tensor."""
        tensor = self.answer.wait()
        if self.calibration is not None and tensor is not None:
            self.calibration.arrived(tensor, self.question)
            self.calibration = None
        return tensor
