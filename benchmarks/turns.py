"""Contestants that take turns at training steps in one run, and what their steps took."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.common import median
from benchmarks.processes import Child, Server
from benchmarks.relay import Link

__all__ = ["Contestant", "take_turns"]

CLIENT_CORE, SERVER_CORE = 1, 0


@dataclass
class Contestant:
    """One way to do the step: what it is asked with, and what was found by round."""

    worker: Child
    asked: dict[str, int] = field(default_factory=dict)
    server: Server | Child | None = None
    link: Link | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)

    def turn(self, *, warm: int, steps: int) -> None:
        """Do steps to warm up, and then so many that count, without a pause between them."""
        given = {"warm": warm, "steps": steps, **self.asked}
        given["server"] = self.server.pid if self.server else 0
        self.rounds.append(self.worker.ask("run", **given))

    def of(self, name: str) -> float:
        """Return the median over the rounds of something per step."""
        return median([found.get(name, 0.0) for found in self.rounds])

    def parts(self) -> dict[str, float]:
        """Return C, S, U, D and T of a step, seconds, and how busy the busiest of the four is.

        C is what the client computes, S what the trunk computes; U and D are the time that the
        bytes take at the link's rate, 0 where it has none.
        """
        rate = self.link.mbit_s * 1e6 / 8 if self.link else 0.0
        seconds = {
            "C": self.of("compute_s"),
            "S": self.of("trunk_s"),
            "U": self.of("sent_bytes") / rate if rate else 0.0,
            "D": self.of("received_bytes") / rate if rate else 0.0,
        }
        step_s = self.of("seconds")
        return {**seconds, "T": step_s, "utilisation": max(seconds.values()) / step_s}


def take_turns(contestants: Mapping[str, Contestant], *, rounds: int, steps: int) -> None:
    """Have each do its turn, round by round, so that a busy moment of the machine meets all.

    A turn begins with a step that does not count. The first round, a step each, warms everything
    up and is dropped. Every other round goes backwards, so that
    nobody always follows the same one.
    """
    for number in range(rounds + 1):
        for name, contestant in list(contestants.items())[:: -1 if number % 2 else 1]:
            contestant.turn(warm=bool(number), steps=steps if number else 1)
            took_s = contestant.rounds[-1]["seconds"]
            print(f"round {number} {name:24s} {took_s:8.3f} s", file=sys.stderr, flush=True)
    for contestant in contestants.values():
        del contestant.rounds[0]
