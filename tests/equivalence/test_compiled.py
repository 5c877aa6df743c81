"""A trunk whose layers are compiled trains what the plain one trains, to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.site import AUTO, Site, batch_of, lora

# Fused operations round otherwise; a llama's norms and its loss are in float32 even in float64.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
LORA = {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.2}


@pytest.fixture(scope="module")
def site(folder_of: Any, serve: Any) -> Site:
    """A llama in float64, its trunk compiled."""
    return serve(folder_of("llama", dtype=torch.float64), dtype="float64", torch_compile=True)


def trained(model: Any) -> list[Tensor]:
    """Return loss, logits and the trunk's gradient norms of two batches of other shapes."""
    torch.manual_seed(5)  # the client draws the seeds of dropout
    found = []
    for batch in (batch_of(0), {name: rows[:2, :7] for name, rows in batch_of(1).items()}):
        output = model(**batch)
        output.loss.backward()
        found += [output.loss.detach(), output.logits.detach(), model.connection.norms.clone()]
    return found


def forms() -> int:
    """Count what was compiled in this process."""
    return counters["stats"]["unique_graphs"]


def test_tenants_train_as_on_the_plain_trunk(site: Site, serve: Any, folder_of: Any):
    """Dropout draws the same numbers; what one tenant had compiled serves the next."""
    plain = serve(folder_of("llama", dtype=torch.float64), dtype="float64")
    settings = {"dtype": "float64", "peft_config": lora(**LORA)}
    before = forms()
    with plain.connect(seed=3, **settings) as split:
        expected = trained(split.train())
    assert forms() == before
    with site.connect(seed=3, **settings) as split, site.connect(seed=3, **settings) as other:
        found, compiled = trained(split.train()), forms()
        again = trained(other.train())

    assert 0 < compiled == forms()
    torch.testing.assert_close(expected, found, **ROUNDING)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


def test_layers_that_are_computed_again_are_compiled_too(site: Site):
    """Gradient checkpointing changes nothing but what is kept."""
    settings = {"dtype": "float64", "peft_config": lora(**LORA), "seed": 3}
    with site.connect(**settings) as split:
        expected = trained(split.train())
    with site.connect(**settings, gradient_checkpointing=True) as split:
        found = trained(split.train())
    torch.testing.assert_close(expected, found, **ROUNDING)


def test_packed_texts_are_told_apart_as_on_the_plain_trunk(site: Site, folder_of: Any):
    """A model that makes a KV cache sees all before a token, one that makes none its own text."""
    whole = AUTO["causal-lm"].from_pretrained(folder_of("llama"), dtype=torch.float64).train()
    ids_BT = batch_of(0, rows=2, tokens=16)["input_ids"][:1]
    packed = {"input_ids": ids_BT, "position_ids": torch.arange(8).repeat(2)[None]}
    with site.connect(dtype="float64") as split:
        for use_cache in (True, False):
            found = split.train()(**packed, use_cache=use_cache).logits
            expected = whole(**packed, use_cache=use_cache).logits
            torch.testing.assert_close(expected, found, **ROUNDING)


def test_what_is_not_trained_through_is_bit_equal(site: Site, folder_of: Any):
    """Generation and evaluation run the layers as they are."""
    whole = AUTO["causal-lm"].from_pretrained(folder_of("llama"), dtype=torch.float64).eval()
    batch = {k: v for k, v in batch_of(1).items() if k != "labels"}
    settings = {"max_new_tokens": 5, "do_sample": False}
    with site.connect(dtype="float64") as split, torch.no_grad():
        split.eval()
        assert torch.equal(split(**batch).logits, whole(**batch).logits)
        assert torch.equal(split.generate(**batch, **settings), whole.generate(**batch, **settings))


def test_without_a_compiler_it_says_so(folder_of: Any, tmp_path: Path):
    """Before the server listens, in one sentence."""
    words = ["serve", "--model_name_or_path", str(folder_of("llama")), "--torch_compile"]
    words += ["--split_bottom_layers=1", "--split_top_layers=1", "--plaintext"]
    done = subprocess.run(
        [sys.executable, "-m", "cutlayer.cli.main", *words, "--host=127.0.0.1", "--port=0"],
        cwd=tmp_path,
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "install a C++ compiler (g++), or leave it out" in done.stderr
    assert "Traceback" not in done.stderr
