"""A split run over gRPC and TLS is the unsplit run, bit for bit."""

# Shapes:  B batch   T tokens

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.site import Loop, Site, adapter_of, batch_of, equal, lora

STEPS = 4

LORAS = {
    "a list of names": {"target_modules": ["q_proj", "down_proj"]},
    "a regular expression": {"target_modules": r".*\.(?:[0-3])\..*(?:v_proj|up_proj)"},
    "all-linear": {},
    "rank and alpha patterns": {
        "rank_pattern": {r"model\.layers\.3\.self_attn\.q_proj": 5, "gate_proj": 2},
        "alpha_pattern": {"o_proj": 9, r"^model\.layers\.1\..*up_proj": 11},
    },
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "a gaussian start": {"init_lora_weights": "gaussian"},
}


def steps_of(model: object, *, steps: int = STEPS, accumulate: int = 1, **settings: object) -> list:
    """Return all that a plain loop sees over some steps."""
    loop = Loop.over(model, **settings)
    batches = [batch_of(seed) for seed in range(steps * accumulate)]
    seen = [loop.step(*batches[i * accumulate : (i + 1) * accumulate]) for i in range(steps)]
    return [tensor for step in seen for tensor in step]


def same_run(site: Site, split: object, whole: object, **settings: object) -> None:
    """Assert that both models see the same in training and end with the same adapter."""
    expected = steps_of(whole, **settings)
    with split:
        found = steps_of(split, **settings)
        adapter = adapter_of(split)

    assert equal(expected, found)
    assert equal(adapter_of(whole), adapter)


@pytest.mark.parametrize("name", LORAS)
def test_every_kind_of_lora_is_exact(llama: Site, name: str):
    """A plain loop with clipping gives the unsplit losses, logits, norms and adapter."""
    config = lora(**LORAS[name])

    same_run(llama, llama.connect(peft_config=copy.deepcopy(config)), llama.unsplit(config))


@pytest.mark.parametrize(("bottom", "top"), [(1, 1), (1, 4), (4, 1), (2, 3)])
def test_every_cut_within_the_servers_is_exact(llama: Site, bottom: int, top: int):
    """A tenant may keep more layers than the server asks, and the run stays exact."""
    same_run(llama, llama.connect(bottom_layers=bottom, top_layers=top), llama.unsplit())


def test_nothing_but_embedding_and_head_at_the_client_is_exact(folder_of, serve):
    """A trunk of all layers, cut at 0 and L, is exact."""
    site = serve(folder_of("gpt2"), bottom_layers=0, top_layers=0)

    same_run(site, site.connect(bottom_layers=0, top_layers=0), site.unsplit())


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad]
    + [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adafactor],
)
def test_every_optimizer_of_the_table_is_exact(llama: Site, optimizer: type):
    """The trunk's optimizer does what the client's does, with accumulation over two batches."""
    same_run(llama, llama.connect(), llama.unsplit(), steps=3, accumulate=2, kind=optimizer)


@pytest.mark.parametrize(
    "train",
    [("trunk",), ("trunk", "top"), ("bottom", "trunk"), ("bottom",), ("top",), ("bottom", "top")],
)
def test_a_part_may_be_frozen(llama: Site, train: tuple[str, ...]):
    """Training some parts only, the trunk under a frozen bottom among them, is exact."""
    spans = {"bottom": range(2), "trunk": range(2, 5), "top": range(5, 6)}
    frozen = [n for part, span in spans.items() if part not in train for n in span]
    exclude = rf".*layers\.({'|'.join(map(str, frozen))})\..*"

    split = llama.connect(train=train)
    whole = llama.unsplit(lora(exclude_modules=exclude))
    before = adapter_of(whole)

    same_run(llama, split, whole)
    assert not equal(before, adapter_of(whole))
