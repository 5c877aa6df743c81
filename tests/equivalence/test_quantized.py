"""A trunk in 8 or 4 bits is the same trunk split as unsplit, and both sides must know of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError, Refused
from cutlayer.server.app import make_server
from cutlayer.server.fused_batch import Asked, CannotFuse, FusedBatches
from cutlayer.server.memory import counting_saved
from cutlayer.server.trunk import SharedTrunk, TenantTrunk
from cutlayer.split.adapters import LoraTarget, TrunkLora, seed_adapter
from cutlayer.split.cut import Cut, anatomy_of
from cutlayer.split.quantized import QUANTIZATIONS, _quantize, quantize_trunk
from tests.site import AUTO, Loop, Site, adapter_of, batch_of, equal, lora, site_of, unsplit
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.quantized

KINDS = QUANTIZATIONS[1:]
CUT = Cut(1, 5)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MODULES = {
    "int8": "torchao.quantization",
    "float8": "torchao.quantization",
    "nf4": "bitsandbytes.nn",
}
WIDTH = 64


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes a tiny model with rows of 64, 128 and 192, once a type."""
    made: dict[str, Path] = {}
    fields = {"hidden_size": WIDTH, "head_dim": 32, "intermediate_size": 192}

    def write(model_type: str) -> Path:
        if model_type not in made:
            declared = tiny_config(model_type).to_dict()
            mine = {name: size for name, size in fields.items() if name in declared}
            mine |= {"ffn_hidden_size": 192} if model_type == "falcon" else {}
            made[model_type] = tmp_path_factory.mktemp("wide") / model_type
            tiny_model(model_type, fields=mine).save_pretrained(made[model_type])
        return made[model_type]

    return write


def unsplit_over(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """Return the unsplit model over weights that were quantized as the server does it."""
    from peft import get_peft_model

    whole = AUTO["causal-lm"].from_pretrained(folder, dtype=dtype)
    quantize_trunk(whole, anatomy_of(whole), CUT, kind)
    model = get_peft_model(whole, lora())
    seed_adapter(model, 3)
    return model


def trunk_over(folder: Path, kind: str, dtype: torch.dtype, **settings: Any) -> SharedTrunk:
    """Return a trunk as a server holds it."""
    whole = AUTO["causal-lm"].from_pretrained(folder, dtype=dtype)
    anatomy = anatomy_of(whole)
    quantize_trunk(whole, anatomy, CUT, kind)
    return SharedTrunk(whole, anatomy, CUT, **settings)


def all_linear() -> TrunkLora:
    """Return a LoRA on every linear layer of a llama's trunk."""
    inner = [f"self_attn.{n}_proj" for n in "qkvo"]
    inner += [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{name}" for layer in range(1, 5) for name in inner]
    return TrunkLora(tuple(LoraTarget(name, 3, 7.0) for name in names), seed=3)


def widened(weight: Any) -> Tensor:
    """Return the numbers that a weight in 4 bits stands for."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def linears(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of `CUT`, without LoRA's own."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and "lora_" not in name
        and any(f"layers.{layer}." in name for layer in range(1, 5))
    ]


def trained(tenant: TenantTrunk, dtype: torch.dtype) -> list[Tensor]:
    """Return an evaluation's output, a forward's, its activations' gradient and the adapter's."""
    generator = torch.Generator().manual_seed(1)
    smashed_BTD, grad_BTD = torch.randn((2, 2, 7, WIDTH), generator=generator).to(dtype)
    with torch.no_grad():
        for name, parameter in tenant.parameters.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    evaluated_BTD = tenant.forward(1, smashed_BTD.clone(), {})
    asked = {"training": True, "keep_graph": True, "wants_gradient": True}
    out_BTD = tenant.forward(2, smashed_BTD.clone(), {}, **asked)
    grad_smashed_BTD = tenant.backward(2, grad_BTD)
    assert grad_smashed_BTD is not None
    grads = [p.grad for p in tenant.parameters.values() if p.grad is not None]
    assert len(grads) == len(tenant.parameters)
    return [evaluated_BTD, out_BTD, grad_smashed_BTD, *grads]


def storages() -> dict[int, Tensor]:
    """Return a tensor of each storage of this process, by address; who holds it keeps it there."""
    gc.collect()
    kinds = {"Tensor", "Parameter", "Params4bit"}  # one of torchao's lies in several of the first
    tensors = [each for each in gc.get_objects() if type(each).__name__ in kinds]
    return {t.untyped_storage().data_ptr(): t for t in tensors if isinstance(t, Tensor)}


@pytest.mark.parametrize("kind", KINDS)
@DTYPES
def test_a_run_equals_the_unsplit_run_over_the_same_weights(
    wide: Any, certs: Path, tmp_path: Path, kind: str, dtype: torch.dtype
):
    """Losses, logits, norms and the adapter, bit for bit; tenants share the trunk.

    One of them has its layers computed again, and another evaluates in between.
    """
    folder, name = wide("llama"), str(dtype).removeprefix("torch.")
    site = site_of(folder, certs, tmp_path, quantization=kind, dtype=name)
    settings = {"bottom_layers": 1, "top_layers": 1, "quantization": kind, "dtype": name}
    again = {**settings, "seed": 3, "gradient_checkpointing": True}
    whole = unsplit_over(folder, kind, dtype)
    loop, expected = Loop.over(whole), []
    for step in range(3):
        expected += loop.step(batch_of(2 * step), batch_of(2 * step + 1))

    with (
        site.connect(seed=3, **settings) as split,
        site.connect(**again) as checkpointed,
        site.connect(seed=4, **settings) as other,
    ):
        loops = [Loop.over(split), Loop.over(checkpointed)]
        found: list[list[Tensor]] = [[], []]
        other.eval()
        for step in range(3):
            for index, each in enumerate(loops):
                found[index] += each.step(batch_of(2 * step), batch_of(2 * step + 1))
            with torch.no_grad():
                other(**batch_of(step))
        for seen, model in zip(found, (split, checkpointed), strict=True):
            assert equal(expected, seen)
            assert equal(adapter_of(whole), adapter_of(model))
    site.server.stop(0)


@pytest.mark.parametrize(
    ("dtype", "lora_of_all"),
    [
        (torch.float32, True),
        (torch.float32, False),
        # Without a LoRA: beside 4 bits peft rounds its output before the sum, elsewhere after it.
        (torch.bfloat16, False),
    ],
    ids=["fp32", "fp32-base", "bf16-base"],
)
def test_four_bits_train_as_the_numbers_that_they_stand_for(
    wide: Any, dtype: torch.dtype, lora_of_all: bool
):
    """Outputs and gradients are those over ordinary weights of the same numbers, bit for bit.

    An evaluation first changes nothing of it: there is hardware for which bitsandbytes would
    rewrite the weights then.
    """
    stored, ordinary = (trunk_over(wide("llama"), kind, dtype) for kind in ("nf4", ""))
    for mine, theirs in zip(linears(stored.model), linears(ordinary.model), strict=True):
        theirs.weight.data = widened(mine.weight)
    held = {name: t.clone() for name, t in stored.model.state_dict().items()}
    asked = all_linear() if lora_of_all else TrunkLora(())

    found, expected = (trained(each.tenant(CUT, asked), dtype) for each in (stored, ordinary))

    assert equal(held, stored.model.state_dict())
    assert equal(expected, found)


@pytest.mark.parametrize("shape", [(76, 48), (64, 80), (48, 128), (128, 192)])
def test_what_is_stored_in_four_bits_is_near(shape: tuple[int, int]):
    """Each number comes back within half a gap of its block's 16, or was left as it is."""
    linear = nn.Linear(shape[1], shape[0], bias=False)
    weight = linear.weight.detach().clone()
    other = nn.Linear(64, 5)
    block = nn.ModuleList([linear, other])

    _quantize([block], "nf4")

    stored: Any = block[0]
    assert type(block[1]) is not nn.Linear
    if shape[1] % 64:
        assert stored is linear
        return
    assert stored.weight.nbytes * 8 == weight.nbytes
    assert stored.weight.quant_state.absmax.nbytes * 64 == weight.numel()
    found = widened(stored.weight)
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    off = (found - weight).view(-1, 64).abs()
    # The widest gap is 0.304 of the largest; a scale in 8 bits is itself off by up to 1%.
    assert bool((off <= (0.152 + 0.01) * largest).all())
    assert not torch.equal(found, weight)


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_a_tenant_costs_its_adapter(wide: Any, kind: str):
    """The shared weights and their scales are no tenant's, in memory as in the accounts."""
    shared = trunk_over(wide("llama"), kind, torch.float32)
    first = shared.tenant(CUT, all_linear())
    before = storages()
    second = shared.tenant(CUT, all_linear())

    new = {at: tensor for at, tensor in storages().items() if at not in before}
    adapter_bytes = sum(p.nbytes for p in second.parameters.values())
    assert sum(tensor.untyped_storage().nbytes() for tensor in new.values()) == adapter_bytes
    weights = [module.weight for module in linears(first.model)]
    assert len(weights) == 28
    assert all(a is b.weight for a, b in zip(weights, linears(second.model), strict=True))


def test_four_bits_keep_nothing_more_for_the_backward(wide: Any):
    """What a forward keeps is counted as without them; no widened weight is among it."""
    kept = []
    for kind in ("", "nf4"):
        tenant = trunk_over(wide("llama"), kind, torch.float32).tenant(CUT, all_linear())
        with counting_saved([tenant]) as seen:
            tenant.forward(1, torch.randn(2, 7, WIDTH), {}, training=True, keep_graph=True)
        kept.append(sum(seen.values()))
    assert kept[0] == kept[1] > 0


def test_the_adapter_begins_as_on_a_plain_trunk(wide: Any, certs: Path, tmp_path: Path):
    """Its names and numbers depend on the seed and the names of layers alone."""
    folder = wide("llama")
    site = site_of(folder, certs, tmp_path, quantization="nf4")
    with site.connect(seed=3, quantization="nf4") as split:
        assert equal(adapter_of(unsplit(folder, lora(), seed=3)), adapter_of(split))
    site.server.stop(0)


@pytest.mark.parametrize("model_type", ["gpt_neox", "qwen2", "falcon"])
def test_biases_and_linear_layers_of_a_familys_own_are_stored_too(
    wide: Any, certs: Path, tmp_path: Path, model_type: str
):
    """One step over 4 bits is that of the unsplit model over the same."""
    folder = wide(model_type)
    site = site_of(folder, certs, tmp_path, quantization="nf4")
    whole = unsplit_over(folder, "nf4", torch.float32)
    expected = Loop.over(whole).step(batch_of(0))
    settings = {"bottom_layers": 1, "top_layers": 1, "seed": 3, "quantization": "nf4"}
    with site.connect(**settings) as split:
        assert equal(expected, Loop.over(split).step(batch_of(0)))
        assert equal(adapter_of(whole), adapter_of(split))
    site.server.stop(0)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_compiled_layers_train_the_same_within_rounding(wide: Any, kind: str):
    """Evaluation runs what is stored as it is."""
    plain, compiled = (
        trunk_over(wide("llama"), kind, torch.float32, compiles=compiles)
        for compiles in (False, True)
    )
    expected, found = (
        trained(each.tenant(CUT, all_linear()), torch.float32) for each in (plain, compiled)
    )
    assert torch.equal(expected[0], found[0])
    # Fused operations round otherwise, about 1e-7 of the largest number each.
    for mine, other in zip(expected, found, strict=True):
        assert float((mine - other).abs().max()) <= 1e-5 * float(mine.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layers_are_not_fused(wide: Any, kind: str):
    """Beside --fuse_tokens each tenant is computed alone, with the bits that it has without it."""
    shared = trunk_over(wide("llama"), kind, torch.float32)
    tenants = [shared.tenant(CUT, all_linear()) for _ in range(2)]
    asked = [Asked(tenant, torch.randn(2, 7, WIDTH), {}) for tenant in tenants]
    with pytest.raises(CannotFuse, match="is no plain LoRA"):
        FusedBatches().forward(asked)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_the_trunk_takes_a_quarter(wide: Any, kind: str):
    """Of float32 linear weights 8 bits are left, and another trunk than before."""
    whole = AUTO["causal-lm"].from_pretrained(wide("llama"))
    anatomy = anatomy_of(whole)
    weight = anatomy.layers(whole)[2].mlp.up_proj.weight.detach().clone()
    untouched = anatomy.layers(whole)[0].mlp.up_proj.weight

    quantize_trunk(whole, anatomy, CUT, kind)

    stored = anatomy.layers(whole)[2].mlp.up_proj.weight
    assert stored.qdata.nbytes * 4 == weight.nbytes
    assert not torch.equal(stored.dequantize(), weight)
    assert torch.allclose(stored.dequantize(), weight, atol=0.07 * float(weight.abs().max()))
    assert anatomy.layers(whole)[0].mlp.up_proj.weight is untouched


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_client_that_does_not_know_is_refused(wide: Any, certs: Path, tmp_path: Path, kind: str):
    """The adapter would be trained beside weights that its owner does not have."""
    site: Site = site_of(wide("llama"), certs, tmp_path, quantization=kind)
    told = rf"quantization is '' at the client and '{kind}' at the server: name what the server's"
    with pytest.raises(Refused, match=told):
        site.connect()
    with pytest.raises(Refused, match=rf"is 'float8' at the client and '{kind}' at the server"):
        site.connect(quantization="float8")
    site.server.stop(0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_it_says_so(wide: Any, monkeypatch: pytest.MonkeyPatch, kind: str):
    """In one sentence, and nothing of the model is changed."""
    monkeypatch.setitem(sys.modules, MODULES[kind], None)
    whole = AUTO["causal-lm"].from_pretrained(wide("llama"))
    package = MODULES[kind].partition(".")[0]
    with pytest.raises(
        ConfigError,
        match=rf"^quantization '{kind}' needs {package}, which is not installed: pip install "
        r"'cutlayer\[quantized\]'$",
    ):
        quantize_trunk(whole, anatomy_of(whole), CUT, kind)
    assert all(type(module) is nn.Linear for module in linears(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trunk_without_linear_layers_is_refused(folder_of: Any, kind: str):
    """GPT-2's are of another type, and would stay as they are without a word."""
    whole = AUTO["causal-lm"].from_pretrained(folder_of("gpt2"))
    told = r"no linear layer that it can store in layers 1:5 .* \('gpt2'\): leave it out"
    with pytest.raises(ConfigError, match=told):
        quantize_trunk(whole, anatomy_of(whole), CUT, kind)


def test_an_unknown_quantization_is_refused(wide: Any, tmp_path: Path):
    """Before anything is served."""
    with pytest.raises(
        ConfigError, match="quantization 'int3' is unknown: one of int8, float8, nf4"
    ):
        make_server(
            str(wide("llama")),
            bottom_layers=1,
            top_layers=1,
            credentials=None,
            state_dir=tmp_path,
            quantization="int3",
        )
