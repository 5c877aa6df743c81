"""Tell the classes of samples apart from their gradients alone, without any weights (A4b).

For whoever does not know the top: the gradient of a rare class is larger, gradients of one class
point the same way, and two classes pull apart along one direction.
"""

# Shapes:  B batch   T tokens   D model width   N samples   C classes

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from cutlayer.audit.finding import Finding, Recovered
from cutlayer.audit.metrics import finding_of
from cutlayer.errors import DataError

__all__ = [
    "class_label_leak",
    "direction_scores",
    "leak_auc",
    "leak_auc_over_batches",
    "norm_scores",
    "spectral_labels",
]


def norm_scores(grad_BTD: Tensor) -> Tensor:
    """Return the norm of each sample's gradient, (B,): larger for the rarer class.

    References:
        Li et al., Label Leakage and Protection in Two-party Split Learning, ICLR 2022, 3.1,
        https://arxiv.org/abs/2102.08504
    """
    return grad_BTD.flatten(1).norm(dim=1)


def direction_scores(grad_BTD: Tensor, reference_D: Tensor) -> Tensor:
    """Return the cosine of each sample's gradient with that of a known positive, (B,).

    Args:
        grad_BTD: The gradients; their sums over positions are compared, for texts differ in
            length and a pooled model's gradient stands at one position or a few.
        reference_D: The known sample's gradient, summed over its positions.

    References:
        Li et al., ICLR 2022, 3.2, https://arxiv.org/abs/2102.08504
    """
    reference_1D = reference_D.detach().cpu().double().unsqueeze(0)
    return torch.cosine_similarity(_summed(grad_BTD), reference_1D, dim=1)


def spectral_labels(grad_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return which samples stand apart, (B,), and how far each does, (B,).

    The gradients are centred and projected on their first singular direction; two means part them,
    and the smaller part is called positive.

    References:
        Tran et al., Spectral Signatures in Backdoor Attacks, NeurIPS 2018,
        https://arxiv.org/abs/1811.00636; for labels, Sun et al., 2022,
        https://arxiv.org/abs/2203.01451
    """
    summed_BD = _summed(grad_BTD)
    centred_BD = summed_BD - summed_BD.mean(0)
    if len(summed_BD) < 2 or not centred_BD.any():
        return torch.zeros(len(summed_BD), dtype=torch.bool), torch.zeros(len(summed_BD))
    along_B = centred_BD @ torch.linalg.svd(centred_BD, full_matrices=False).Vh[0]
    positive_B = along_B > _parting(along_B)
    if int(positive_B.sum()) * 2 > len(positive_B):
        positive_B, along_B = ~positive_B, -along_B
    return positive_B, along_B


def _summed(grad_BTD: Tensor) -> Tensor:
    return grad_BTD.detach().cpu().double().sum(1)


def _parting(along_B: Tensor) -> Tensor:
    """Return the threshold between the two means of numbers: the cut of least inner variance."""
    sorted_B = along_B.sort().values
    left, sums = torch.arange(1, len(sorted_B)), sorted_B.cumsum(0)
    between = sums[:-1] ** 2 / left + (sums[-1] - sums[:-1]) ** 2 / (len(sorted_B) - left)
    at = int(between.argmax())
    return (sorted_B[at] + sorted_B[at + 1]) / 2


def leak_auc(scores_N: Tensor, positive_N: Tensor) -> float:
    """Return the area under the ROC curve of a score: .5 tells nothing, 1 tells all.

    Ties count half. Without both kinds of samples it is not defined, and NaN.

    References:
        Li et al., ICLR 2022, section 3: "leak AUC", https://arxiv.org/abs/2102.08504
    """
    positive = positive_N.bool().cpu().numpy()
    count, others = int(positive.sum()), int((~positive).sum())
    if not (count and others):
        return float("nan")
    ranks = rankdata(scores_N.detach().cpu().double().numpy())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def leak_auc_over_batches(aucs: Sequence[float]) -> float:
    """Return the 95th percentile over mini-batches, those without both kinds left out.

    NaN if none is left.
    """
    defined = [auc for auc in aucs if not math.isnan(auc)]
    return float(np.quantile(defined, 0.95)) if defined else float("nan")


def class_label_leak(batches: Sequence[tuple[Tensor, Tensor]]) -> Finding:
    """Return what gradients give away about classes to whoever has no weights (A4b).

    The first sample of each class is taken for known. The recovery rate is that of the known
    sample which points most nearly the same way, over all others; the leak AUCs of the three scores
    are for the rarest class against the rest.

    Args:
        batches: Gradients (B, T, D) with their classes (B,).

    Raises:
        DataError: If there are fewer than two classes in all.
    """
    begun = time.monotonic()
    counts = torch.bincount(torch.cat([labels for _grad, labels in batches]).cpu())
    if int((counts > 0).sum()) < 2:
        raise DataError("all samples are of one class: there are no labels to tell apart")
    classes = counts.nonzero().squeeze(1)
    rarest = int(classes[counts[classes].argmin()])
    commonest = int(counts.argmax())
    known = _first_of_each(batches)
    references_CD = [_summed(batches[batch][0])[row] for batch, row in known.values()]
    aucs: dict[str, list[float]] = {"norm": [], "direction": [], "spectral": []}
    recovered = []
    for number, (grad_BTD, labels_B) in enumerate(batches):
        truth_B = labels_B.cpu()
        rest_B = torch.tensor([(number, row) not in known.values() for row in range(len(truth_B))])
        toward_BC = torch.stack([direction_scores(grad_BTD, ref_D) for ref_D in references_CD], 1)
        scores = {
            "norm": norm_scores(grad_BTD),
            "direction": toward_BC[:, list(known).index(rarest)],
            "spectral": spectral_labels(grad_BTD)[1],
        }
        for name, scores_B in scores.items():
            aucs[name].append(leak_auc(scores_B.cpu()[rest_B], truth_B[rest_B] == rarest))
        if rest_B.any():
            truth = tuple(truth_B[rest_B].tolist())
            guess = torch.tensor(list(known))[toward_BC.argmax(1)][rest_B]
            recovered.append(Recovered(truth, tuple(guess.tolist()), (commonest,) * len(truth)))
    return finding_of(
        "A4b",
        "gradients",
        recovered,
        seconds=time.monotonic() - begun,
        params={"known": len(known), "classes": len(classes), "batches": len(batches)},
        extra={f"leak_auc_{name}": leak_auc_over_batches(found) for name, found in aucs.items()},
    )


def _first_of_each(batches: Sequence[tuple[Tensor, Tensor]]) -> dict[int, tuple[int, int]]:
    """Return the batch and row of each class's first sample."""
    first: dict[int, tuple[int, int]] = {}
    for batch, (_grad, labels_B) in enumerate(batches):
        for row, label in enumerate(labels_B.tolist()):
            first.setdefault(label, (batch, row))
    return first
