"""Numbers and names as the audit's report and the terminal write them: plain words, no rounding up.

A share that is not whole is never shown as 100%, and one that is not zero never as 0%.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

__all__ = [
    "ABSENT",
    "attack_words",
    "ceiled",
    "channel_words",
    "count",
    "interval",
    "measure_words",
    "measured",
    "number",
    "percent",
    "plain",
    "seconds",
    "spaced",
    "titled",
    "visible",
]

ABSENT = "not stated"

_CHANNELS = {
    "activations": ("Activations", "What each word becomes on its way to the server."),
    "gradients": ("Gradients", "What the server is told about the answers, in training only."),
    "adapter": ("Adapter", "The trained weights that are given to others."),
}

_ATTACKS = {
    "1": ("forward search", "tries every token of the vocabulary and keeps the one that fits"),
    "2": ("learned inverter", "a network trained on public text to undo the client's layers"),
    "3": ("gradient matching", "adjusts a guess until it would have caused the same traffic"),
    "4": ("label inversion", "solves a linear system for the labels"),
    "5": ("known plaintext", "learns the client's secret from text that the server knows"),
    "6": ("span check", "asks which tokens fit into a weight update"),
    "7": ("membership", "asks whether a text was in the training data"),
    "8": ("active server", "probes whether a server that cheats is noticed"),
}


def percent(share: float | None) -> str:
    """Return a share as a percentage with one decimal."""
    if share is None or not math.isfinite(share):
        return ABSENT
    if share in {0.0, 1.0}:
        return f"{share:.0%}"
    words = f"{100 * share:.1f}%"
    if words == "100.0%" and share < 1:
        return "over 99.9%"
    return "under 0.1%" if words in {"0.0%", "-0.0%"} else words.replace("-", "\u2212")


def interval(ends: Sequence[float] | None) -> str:
    """Return a 95% interval of a share in words."""
    if ends is None:
        return ABSENT
    low, high = ends
    return f"{percent(low)} to {percent(high)}"


def count(number: int | None) -> str:
    """Return a whole number with commas."""
    return ABSENT if number is None else f"{number:,}"


def number(value: float | None) -> str:
    """Return a number with as many digits as are of use, at least three that count."""
    if value is None:
        return ABSENT
    if isinstance(value, int) or value == int(value if math.isfinite(value) else 0):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return "infinite" if value > 0 else ABSENT
    words = f"{value:,.2f}" if abs(value) >= 100 else f"{value:.3g}"
    # 1e-05 is written as people write it, 1e-5.
    return re.sub(r"e([+-])0+", r"e\1", words)


def measured(value: Any) -> str:
    """Return a share as a percentage, and words as they are."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return percent(float(value))
    return plain(value)


def ceiled(value: float) -> str:
    """Return an epsilon with two decimals, rounded up: a promise is never shown smaller."""
    return f"{math.ceil(value * 100 - 1e-6) / 100:,.2f}"


def plain(value: Any) -> str:
    """Return anything that an audit may state, as text."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{spaced(str(k))} {plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return str(value)


def seconds(value: float) -> str:
    """Return a time in seconds, in two digits that count or whole seconds."""
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"


def spaced(name: str) -> str:
    """Return a name of our code as words."""
    return name.replace("_", " ")


def titled(words: str) -> str:
    """Return words with a capital at the front, and the rest as it was."""
    return words[:1].upper() + words[1:]


def attack_words(name: str) -> tuple[str, str]:
    """Return an attack's name with its title, and what it does."""
    known = re.match(r"[aA](\d)(?![0-9])", name)
    title, does = _ATTACKS.get(known[1] if known else "", ("", ""))
    if known is not None and len(name) <= 3 and title:
        return f"{name.upper()[:2]}{name[2:]}, {title}", does
    return spaced(name), does


def measure_words(name: str) -> tuple[str, str]:
    """Return what an attack's rate is a share of, and what is counted."""
    if re.match(r"[aA]7(?![0-9])", name):
        return "of guesses about who was in the training data are right", "texts"
    return "of tokens read back", "tokens"


def channel_words(name: str) -> tuple[str, str]:
    """Return a channel's heading and what it is."""
    return _CHANNELS.get(name, (spaced(name).capitalize(), ""))


def visible(token: str) -> str:
    """Return a token with what cannot be seen, or would move the text around it, made visible."""
    return "".join(_shown(character) for character in token) or "∅"


def _shown(character: str) -> str:
    if character == "\n":
        return "↵\n"
    # Format characters may reverse or hide what follows; these two only join letters and emoji.
    if character in "\u200c\u200d":
        return character
    if unicodedata.category(character) in {"Cc", "Cf", "Cs"}:
        return f"⟨{ord(character):04X}⟩"
    return character
