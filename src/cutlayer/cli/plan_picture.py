"""The picture of a plan: every cut's step against the client's memory, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from cutlayer.split.prediction import Prediction
from cutlayer.split.schedule import RESOURCES

__all__ = ["draw"]

_MARKS = dict(zip(RESOURCES, "osD^v", strict=True))
_COLOURS = dict(
    zip(RESOURCES, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666"), strict=True)
)


def draw(
    found: Sequence[Prediction],
    best: Prediction | None,
    path: Path,
    *,
    limit_bytes: float | None = None,
    title: str = "",
) -> None:
    """Write the picture as SVG or PNG, by the path's ending."""
    mpl.use("svg" if path.suffix == ".svg" else "agg")
    mpl.rcParams |= {"svg.hashsalt": "cutlayer", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for name in RESOURCES:
        some = [each for each in found if each.step.binds == name]
        if some:
            left.scatter(
                [each.client_bytes / 2**30 for each in some],
                [each.step.seconds for each in some],
                marker=_MARKS[name], s=14, color=_COLOURS[name], alpha=0.6, linewidths=0,
                label=f"waits most for: {name}",
            )  # fmt: skip
    if limit_bytes:
        left.axvline(limit_bytes / 2**30, color="black", linestyle="--", linewidth=0.8)
    if best is not None:
        at = (best.client_bytes / 2**30, best.step.seconds)
        left.scatter(*at, marker="o", s=140, facecolors="none", edgecolors="black")
        left.annotate(
            f"{best.bottom_layers}+{best.top_layers}", at, (8, 8), textcoords="offset points"
        )
    left.set(xlabel="client memory, GiB", ylabel="seconds a step", title=f"{title}: every cut")
    left.legend(fontsize=7)
    _bars(right, best or min(found, key=lambda each: each.step.seconds))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    plt.close(figure)


def _bars(axes: Any, each: Prediction) -> None:
    start = 0.0
    for name in RESOURCES:
        took_s = each.step.chain_s[name]
        axes.barh(["longest chain"], [took_s], left=start, color=_COLOURS[name], label=name)
        start += took_s
        if name in each.step.busy_s:
            axes.barh([name], [each.step.busy_s[name]], color=_COLOURS[name])
    axes.axvline(each.step.seconds, color="black", linewidth=0.8)
    axes.set(
        xlabel="seconds",
        title=f"one step at {each.bottom_layers}+{each.top_layers}, {each.chunks} chunks",
    )
    axes.invert_yaxis()
    axes.legend(fontsize=7)
