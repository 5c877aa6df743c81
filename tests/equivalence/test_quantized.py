"""A trunk in 8 bits is the same trunk split as unsplit, and both sides must know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.errors import ConfigError, Refused
from cutlayer.server.app import make_server
from cutlayer.split.adapters import seed_adapter
from cutlayer.split.cut import Cut, anatomy_of
from cutlayer.split.quantized import QUANTIZATIONS, quantize_trunk
from tests.site import AUTO, Loop, Site, adapter_of, batch_of, equal, lora, site_of

pytestmark = pytest.mark.quantized

KINDS = QUANTIZATIONS[1:]
CUT = Cut(1, 5)


def unsplit_over(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """Return the unsplit model over weights that were quantized as the server does it."""
    from peft import get_peft_model

    whole = AUTO["causal-lm"].from_pretrained(folder, dtype=dtype)
    quantize_trunk(whole, anatomy_of(whole), CUT, kind)
    model = get_peft_model(whole, lora())
    seed_adapter(model, 3)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_run_equals_the_unsplit_run_over_the_same_weights(
    folder_of: Any, certs: Path, tmp_path: Path, kind: str, dtype: torch.dtype
):
    """Losses, logits, norms and the adapter, bit for bit; two tenants share the trunk."""
    folder, name = folder_of("llama"), str(dtype).removeprefix("torch.")
    site = site_of(folder, certs, tmp_path, quantization=kind, dtype=name)
    settings = {"bottom_layers": 1, "top_layers": 1, "quantization": kind, "dtype": name}
    whole = unsplit_over(folder, kind, dtype)
    loop, expected = Loop.over(whole), []
    for step in range(3):
        expected += loop.step(batch_of(2 * step), batch_of(2 * step + 1))

    with site.connect(seed=3, **settings) as split, site.connect(seed=4, **settings) as other:
        loop, beside, found = Loop.over(split), Loop.over(other), []
        for step in range(3):
            found += loop.step(batch_of(2 * step), batch_of(2 * step + 1))
            beside.step(batch_of(step))
        assert equal(expected, found)
        assert equal(adapter_of(whole), adapter_of(split))
    site.server.stop(0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trunk_takes_a_quarter(folder_of: Any, kind: str):
    """Of float32 linear weights 8 bits are left, and another trunk than before."""
    whole = AUTO["causal-lm"].from_pretrained(folder_of("llama"))
    anatomy = anatomy_of(whole)
    weight = anatomy.layers(whole)[2].mlp.up_proj.weight.detach().clone()
    untouched = anatomy.layers(whole)[0].mlp.up_proj.weight

    quantize_trunk(whole, anatomy, CUT, kind)

    stored = anatomy.layers(whole)[2].mlp.up_proj.weight
    assert stored.qdata.nbytes * 4 == weight.nbytes
    assert not torch.equal(stored.dequantize(), weight)
    assert torch.allclose(stored.dequantize(), weight, atol=0.07 * float(weight.abs().max()))
    assert anatomy.layers(whole)[0].mlp.up_proj.weight is untouched


def test_a_client_that_does_not_know_is_refused(folder_of: Any, certs: Path, tmp_path: Path):
    """The adapter would be trained beside weights that its owner does not have."""
    site: Site = site_of(folder_of("llama"), certs, tmp_path, quantization="int8")
    with pytest.raises(Refused, match=r"quantization is '' at the client and 'int8' at the server"):
        site.connect()
    site.server.stop(0)


def test_an_unknown_quantization_is_refused(folder_of: Any, tmp_path: Path):
    """Before anything is served."""
    with pytest.raises(ConfigError, match="quantization 'int3' is unknown: one of int8, float8"):
        make_server(
            str(folder_of("llama")),
            bottom_layers=1,
            top_layers=1,
            credentials=None,
            state_dir=tmp_path,
            quantization="int3",
        )
