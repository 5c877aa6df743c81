"""Draw a result and write it as a table: what is left of the task against what is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["draw", "table"]

_PANELS = (
    ("activations", ("tokens", "listed"), "text read at the lower cut"),
    ("gradients", ("inverted", "tried"), "answers read at the upper cut"),
)
_MARKS = "osD^v"


def strongest(figures: dict[str, float], key: str, attacks: tuple[str, ...]) -> str | None:
    """Return the attack that reads most at a point, `None` if none has anything to read."""
    known = [name for name in attacks if f"{key}_{name}" in figures]
    return max(known, key=lambda name: figures[f"{key}_{name}"]) if known else None


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a result's plot as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "cutlayer", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    figures, points = result["figures"], result["settings"]["points"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for panel, (channel, attacks, label) in zip(panels, _PANELS, strict=True):
        names = dict.fromkeys(p["name"] for p in points if p["channel"] == channel)
        for name, mark in zip((n for n in names if n != "no_backward"), _MARKS, strict=False):
            keys = [p["key"] for p in points if p["name"] == name]
            found = [(key, f"{key}_{strongest(figures, key, attacks)}") for key in keys]
            x = [figures[read] for _key, read in found]
            y = [figures[f"{key}_accuracy"] for key in keys]
            spread_x = [
                [figures[k] - figures[f"{k}_low"] for _key, k in found],
                [figures[f"{k}_high"] - figures[k] for _key, k in found],
            ]
            accuracies = [f"{key}_accuracy" for key in keys]
            spread_y = [
                [figures[k] - figures[f"{k}_min"] for k in accuracies],
                [figures[f"{k}_max"] - figures[k] for k in accuracies],
            ]
            panel.errorbar(
                x, y, yerr=spread_y, xerr=spread_x, marker=mark, linewidth=1, elinewidth=0.5,
                label=name,
            )  # fmt: skip
            for key, at_x, at_y in zip(keys, x, y, strict=True):
                strength = key.removeprefix(f"{name}_")
                panel.annotate(strength, (at_x, at_y), (4, 4), textcoords="offset points", size=7)
        panel.axhline(figures["none_accuracy"], color="black", linestyle="--", linewidth=0.8)
        panel.annotate("no defense", (0, figures["none_accuracy"]), (2, 3),
                       textcoords="offset points", size=7)  # fmt: skip
        panel.axhline(figures["guessing_accuracy"], color="grey", linestyle=":", linewidth=0.8)
        panel.annotate("guessing", (0, figures["guessing_accuracy"]), (2, 3),
                       textcoords="offset points", size=7)  # fmt: skip
        if channel == "gradients" and "no_backward_accuracy" in figures:
            panel.plot(0, figures["no_backward_accuracy"], "k*", label="no_backward (sends none)")
        panel.set(xlabel=f"share of {label}", xlim=(-0.04, 1.08), ylim=(0, None))
        panel.legend(fontsize=7)
    panels[0].set_ylabel("accuracy on held-out wordings")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def table(result: dict[str, Any]) -> str:
    """Return a result as Markdown: a row for each defense, its strengths from weak to strong."""
    figures = result["figures"]
    points: dict[str, list[dict[str, Any]]] = {}
    for point in result["settings"]["points"]:
        points.setdefault(point["name"], []).append(point)
    lines = ["| defense | strength | accuracy | loss | read |", "|---|---|---|---|---|"]
    for name, listed in points.items():
        channel = listed[0]["channel"]
        attacks = [a for c, names, _label in _PANELS if channel in ("", c) for a in names]
        cells: tuple[list[str], ...] = ([], [], [], [])
        for point in listed:
            key = point["key"]
            cells[0].append("" if point["strength"] is None else f"{point['strength']:g}")
            cells[1].append(f"{figures[f'{key}_accuracy']:.2f}")
            read = strongest(figures, key, tuple(attacks))
            cells[2].append(f"{figures[f'{key}_loss']:.2f}")
            cells[3].append("nothing sent" if read is None else f"{figures[f'{key}_{read}']:.2f}")
        parameter = listed[0]["parameter"].replace("_", " ")
        strengths = f"{parameter} {' / '.join(cells[0])}".strip()
        shown = " | ".join(" / ".join(cell) for cell in cells[1:])
        lines.append(f"| `{name}` | {strengths} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found = json.loads(Path(name).read_text())
        draw(found, Path(name).with_suffix(".svg"))
        print(table(found))
