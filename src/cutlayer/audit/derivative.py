"""Solve J' e = G, J the derivative of a part of a model: what label inversion comes down to."""

# Shapes:  B batch   T tokens   D width of the point   E width of the value

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["Derivative", "Metric", "descend", "metric_of"]


class Derivative:
    """The derivative of a function at a point, to be applied from either side without a rerun.

    J' is the backward. J is the backward of that backward, which is linear in what comes in; it
    asks less of a model's layers than forward-mode derivatives do, and no forward for each use.

    Attributes:
        value: The function's value, (B, T, E).
    """

    def __init__(self, function: Callable[[Tensor], Tensor], point_BTD: Tensor) -> None:
        with torch.enable_grad():
            self._point = point_BTD.detach().requires_grad_()
            self._value = function(self._point)
            self._incoming = torch.zeros_like(self._value, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(
                self._value, self._point, self._incoming, create_graph=True
            )
        self.value = self._value.detach()

    def pull(self, change_BTE: Tensor) -> Tensor:
        """Return J' applied to a change of the value, (B, T, D)."""
        (back,) = torch.autograd.grad(self._value, self._point, change_BTE, retain_graph=True)
        return back

    def push(self, change_BTD: Tensor) -> Tensor:
        """Return J applied to a change of the point, (B, T, E)."""
        (ahead,) = torch.autograd.grad(self._pulled, self._incoming, change_BTD, retain_graph=True)
        return ahead


class Metric:
    """Coordinates x of the value's changes in which J J' is near the identity.

    A position of large activations (the first token of most models) passes almost no gradient, and
    some directions pass hundreds of times what others do. In these coordinates all are recovered
    alike: far fewer iterations are needed, and plain distances weigh each direction by how well it
    is known.

    Attributes:
        gain_BT: How much each position passes.
    """

    def __init__(self, gain_BT1: Tensor, factor_EE: Tensor) -> None:
        """Take each position's gain and the lower Cholesky factor of what all have in common."""
        self.gain_BT = gain_BT1.squeeze(-1)
        self._gain_BT1 = gain_BT1
        self._factor_EE = factor_EE
        eye_EE = torch.eye(len(factor_EE), dtype=factor_EE.dtype, device=factor_EE.device)
        self._inverse_EE = torch.linalg.solve_triangular(factor_EE, eye_EE, upper=False)

    def coordinates(self, change_BTE: Tensor) -> Tensor:
        """Return x of a change."""
        return self._gain_BT1 * (change_BTE @ self._factor_EE)

    def change(self, x_BTE: Tensor) -> Tensor:
        """Return the change that has these coordinates."""
        return (x_BTE @ self._inverse_EE) / self._gain_BT1

    def adjoint(self, pushed_BTE: Tensor) -> Tensor:
        """Return the adjoint of `change`, applied to what J gave."""
        return (pushed_BTE / self._gain_BT1) @ self._inverse_EE.T

    def shape(self, rows_NE: Tensor) -> Tensor:
        """Return coordinates of rows that stand at no position: without the position's gain."""
        return rows_NE @ self._factor_EE

    def coshape(self, coordinates_NE: Tensor) -> Tensor:
        """Return what has, with a row, the inner product that these have with its `shape`."""
        return coordinates_NE @ self._factor_EE.T


def metric_of(derivative: Derivative, like_BTD: Tensor, *, seed: int = 0) -> Metric:
    """Estimate J J' of each position as its gain times what all positions have in common.

    E[(J v)(J v)'] = J J' for white v, so a few random pushes do. Twice as many samples as there
    are dimensions are drawn, and the estimate is shrunk towards its diagonal.
    """
    generator = torch.Generator().manual_seed(seed)
    width = derivative.value.shape[-1]
    positions = derivative.value[..., 0].numel()
    probes = min(max(8, math.ceil(2 * width / positions)), 64)
    pushed = []
    for _ in range(probes):
        probe_BTD = torch.randn(like_BTD.shape, generator=generator, dtype=like_BTD.dtype)
        pushed.append(derivative.push(probe_BTD.to(like_BTD.device)))
    pushed_PBTE = torch.stack(pushed)
    gain_BT = pushed_PBTE.square().mean((0, 3)).sqrt()
    # A position that passes nothing at all (padding) must not divide by zero.
    gain_BT = gain_BT.clamp_min(1e-6 * float(gain_BT.max())).clamp_min(1e-30)
    even_NE = (pushed_PBTE / gain_BT[None, ..., None]).flatten(0, 2)
    common_EE = (even_NE.T @ even_NE).double() / len(even_NE)
    own_E = common_EE.diagonal()
    # As many samples as dimensions tell little of the weakest directions.
    shrink = min(0.5, 0.1 * width / len(even_NE))
    common_EE = (1 - shrink) * common_EE + torch.diag(
        shrink * own_E + 1e-6 * own_E.mean() + torch.finfo(torch.float64).tiny
    )
    factor_EE = torch.linalg.cholesky(common_EE).to(like_BTD.dtype)
    return Metric(gain_BT.unsqueeze(-1), factor_EE)


def _row_dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((1, 2), keepdim=True)


def descend(
    derivative: Derivative,
    grad_BTD: Tensor,
    metric: Metric,
    *,
    carries_BT1: Tensor | None = None,
    ridge: float = 0.0,
) -> Iterator[Tensor]:
    """Solve J' e = G by conjugate gradients; yield e after each iteration, (B, T, E).

    Rows of a batch are independent and have their own step lengths. This is CG on
    (J J' + ridge) e = J G, without forming the square, which would cost half of the digits.

    Args:
        derivative: J.
        grad_BTD: G.
        metric: In whose coordinates it is done.
        carries_BT1: 0 where e is known to be zero.
        ridge: Weight of the norm of x.

    References:
        CGLS: Hestenes and Stiefel 1952; Björck, Numerical Methods for Least Squares, 1996, 7.4.
    """

    def change(x_BTE: Tensor) -> Tensor:
        e_BTE = metric.change(x_BTE)
        return e_BTE if carries_BT1 is None else e_BTE * carries_BT1

    def downhill(rest_BTD: Tensor, x_BTE: Tensor) -> Tensor:
        pushed_BTE = derivative.push(rest_BTD)
        if carries_BT1 is not None:
            pushed_BTE = pushed_BTE * carries_BT1
        return metric.adjoint(pushed_BTE) - ridge * x_BTE

    x, rest = torch.zeros_like(derivative.value), grad_BTD
    slope = along = downhill(rest, x)
    steep = _row_dot(slope, slope)
    while True:
        pulled = derivative.pull(change(along))
        bend = _row_dot(pulled, pulled) + ridge * _row_dot(along, along)
        # A row without a gradient, or one that is solved, stands still.
        step = torch.where(bend > 0, steep / bend, 0)
        x = x + step * along
        rest = rest - step * pulled
        slope = downhill(rest, x)
        steeper = _row_dot(slope, slope)
        along = slope + torch.where(steep > 0, steeper / steep, 0) * along
        steep = steeper
        yield change(x)
