"""Several tenants' rows through one trunk, in each dtype: results, gradients, what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cutlayer.server.fused_batch import Asked, FusedBatches, backward_together
from cutlayer.server.memory import counting_saved
from cutlayer.server.trunk import SharedTrunk, TenantTrunk
from cutlayer.split.adapters import plan_adapter
from cutlayer.split.cut import Cut
from cutlayer.split.loading import load_trunk, open_checkpoint, skeleton_of
from tests.site import lora

WIDTH, TOKENS = 48, 7
ROWS = [(1, 1, 1), (1, 2, 1)]


def tenants_of(folder: Path, dtype: torch.dtype, count: int) -> list[TenantTrunk]:
    """Return trunks of tenants that differ in LoRA's numbers, which are the same in each dtype."""
    checkpoint = open_checkpoint(str(folder))
    skeleton = skeleton_of(checkpoint.config, "causal-lm")
    cut = Cut.leaving(bottom_layers=1, top_layers=1, num_layers=skeleton.anatomy.num_layers)
    loaded = load_trunk(checkpoint, skeleton, cut, dtype=dtype)
    shared = SharedTrunk(loaded, skeleton.anatomy, cut)
    plan = plan_adapter(skeleton, lora(), cut, train=("trunk",), seed=0)
    tenants = [shared.tenant(cut, plan.trunk) for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    for tenant in tenants:
        for parameter in tenant.parameters.values():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            nn.init.zeros_(parameter).data.add_((0.05 * drawn).bfloat16())
    return tenants


def asked_of(tenants: Sequence[TenantTrunk], rows: Sequence[int], **given: object) -> list[Asked]:
    """Return a forward of each, from activations that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(tenants[0].model.parameters()).dtype
    return [
        Asked(
            tenant,
            torch.randn((count, TOKENS, WIDTH), generator=generator).bfloat16().to(dtype),
            {},
            wants_gradient=True,
            training=True,
            **given,  # type: ignore[arg-type]
        )
        for tenant, count in zip(tenants, rows, strict=True)
    ]


def gradient_of(out_BTD: Tensor) -> Tensor:
    """Return a gradient of an output, which depends on its shape only."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(out_BTD.shape, generator=generator).bfloat16().to(out_BTD.dtype)


def together(asked: Sequence[Asked]) -> list[list[Tensor]]:
    """Return each one's output, gradient of the activations and gradients of the LoRA."""
    shares = FusedBatches().forward(asked)
    outs = [share.out_BTD.detach() for share in shares]
    gradients = {share: gradient_of(share.out_BTD) for share in shares}
    assert backward_together(shares[0].batch, gradients)
    for share in shares:
        assert share.ready is not None
    return [
        [out, *(g for g in (share.ready[0], *share.ready[1]) if g is not None)]
        for out, share in zip(outs, shares, strict=True)
    ]


def alone(asked: Sequence[Asked]) -> list[list[Tensor]]:
    """Return the same of each by itself."""
    found = []
    for each in asked:
        trunk, given = each.trunk, {"training": True, "autocast": each.autocast}
        out_BTD = trunk.forward(
            1, each.smashed_BTD.clone(), {}, keep_graph=True, wants_gradient=True, **given
        )
        grad_BTD = trunk.backward(1, gradient_of(out_BTD))
        assert grad_BTD is not None
        grads = [p.grad for p in trunk.parameters.values() if p.grad is not None]
        found.append([out_BTD, grad_BTD, *grads])
        trunk.gradients.zero()
    return found


@pytest.mark.parametrize("rows", ROWS)
def test_a_batch_is_its_tenants_alone(folder_of: Callable[..., Path], rows: tuple[int, ...]):
    """In float64 outputs and gradients differ from solo ones by float64's rounding only."""
    asked = asked_of(tenants_of(folder_of("llama"), torch.float64, 3), rows)

    expected, found = alone(asked), together(asked)

    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_batch_in_half_precision_is_as_near_to_the_truth_as_solo(
    folder_of: Callable[..., Path], rows: tuple[int, ...], autocast: torch.dtype | None
):
    """In bfloat16, and under autocast to it, a batch has no larger errors than solo runs."""
    dtype = torch.float32 if autocast else torch.bfloat16
    folder = folder_of("llama")
    asked = asked_of(tenants_of(folder, dtype, 3), rows, autocast=autocast)

    solo, fused = alone(asked), together(asked)
    truth = alone(asked_of(tenants_of(folder, torch.float64, 3), rows))

    for true, mine, other in zip(truth, fused, solo, strict=True):
        assert [t.dtype for t in mine] == [t.dtype for t in other]
        # Each error is a draw of its own: of small tensors one may be larger by chance.
        assert errors(mine, true).mean() < 1.25 * errors(other, true).mean()
        assert (errors(mine, true) < 3 * errors(other, true)).all()


def test_who_has_stepped_since_its_forward_goes_alone(folder_of: Callable[..., Path]):
    """Its gradients are of the LoRA that it has now, and the others' are what they would be."""
    asked = asked_of(tenants_of(folder_of("llama"), torch.float64, 3), (1, 1, 1))
    before = alone(asked)
    shares = FusedBatches().forward(asked)
    gradients = {share: gradient_of(share.out_BTD) for share in shares}
    with torch.no_grad():
        for parameter in asked[0].trunk.parameters.values():
            parameter.mul_(1.5)

    assert backward_together(shares[0].batch, gradients)

    assert shares[0].ready is None
    for share, expected in zip(shares[1:], before[1:], strict=True):
        assert share.ready is not None
        torch.testing.assert_close(
            [share.ready[0], *share.ready[1]], expected[1:], rtol=1e-11, atol=1e-11
        )
    trunk = asked[0].trunk
    grad_BTD = shares[0].backward(trunk, gradients[shares[0]], 0)
    found = [grad_BTD, *(p.grad for p in trunk.parameters.values())]
    trunk.gradients.zero()
    torch.testing.assert_close(found, alone(asked[:1])[0][1:], rtol=1e-11, atol=1e-11)


def nodes_of(tensor: Tensor) -> Counter[str]:
    """Return how many nodes of each kind a graph has."""
    seen, open_ = set(), [tensor.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_ += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def test_few_tokens_in_bfloat16_are_attended_to_by_plain_products(
    folder_of: Callable[..., Path],
):
    """The kernel whose backward is slow for them is in no batch, and is chosen again after it."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        asked = asked_of(tenants_of(folder_of("llama"), dtype, 2), (1, 1))
        FusedBatches().forward(asked)
        found[dtype] = nodes_of(FusedBatches().forward(asked)[0].out_BTD)
        solo_BTD = asked[0].trunk.run(asked[0].smashed_BTD.requires_grad_(), {}, training=True)
        assert any("Flash" in name for name in nodes_of(solo_BTD))

    assert not any("Flash" in name for name in found[torch.bfloat16])
    assert any("Flash" in name for name in found[torch.float32])


def test_a_batch_keeps_an_input_once_for_all_layers_that_have_it(folder_of: Callable[..., Path]):
    """What a batch keeps for its backward is less than what its tenants keep alone."""
    asked = asked_of(tenants_of(folder_of("llama"), torch.bfloat16, 3), (1, 1, 1))
    alone_bytes = 0
    for each in asked:
        with counting_saved([each.trunk]) as seen:
            each.trunk.run(each.smashed_BTD.requires_grad_(), {}, training=True)
        alone_bytes += sum(seen.values())

    shares = FusedBatches().forward(asked)

    assert sum(share.graph_bytes for share in shares) < 0.9 * alone_bytes


def errors(found: Sequence[Tensor], true: Sequence[Tensor]) -> Tensor:
    """Return each tensor's error over its norm."""
    return torch.stack(
        [(f.double() - t).norm() / t.norm() for f, t in zip(found, true, strict=True)]
    )
