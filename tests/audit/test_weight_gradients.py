"""Gradients of weights hold the inputs they were made of, up to their rank and no further."""

# Shapes:  B batch   T tokens   D width of a layer's input   N candidates

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from cutlayer.audit.public import PublicModel
from cutlayer.audit.weight_gradients import (
    LayerGradients,
    discrete_moves,
    gradient_span,
    lamp_distance,
    match_gradients,
    span_distance,
    span_of,
    span_search,
    tag_distance,
)
from cutlayer.errors import ConfigError, DataError
from tests.audit.victims import public_of, random_ids, refusal, write_gpt2
from tests.tiny import VOCABULARY

SIZE, TOKENS = 1024, 20
FIRST, SECOND = "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random GPT-2."""
    return write_gpt2(tmp_path_factory.mktemp("gpt2"), vocabulary=SIZE)


@pytest.fixture(scope="module")
def public(folder: Path) -> PublicModel:
    """Return its ends, as an attacker has them."""
    return public_of(folder)


@pytest.fixture(scope="module")
def ids_BT() -> Tensor:
    """Return two texts of twenty tokens."""
    return random_ids(SIZE, 2, TOKENS)


def full_gradients(folder: Path, ids_BT: Tensor) -> list[LayerGradients]:
    """Return the gradients of the first two attention layers after one backward."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    weights = dict(model.named_parameters())
    return [LayerGradients(name, (weights[f"{name}.weight"].grad.T,)) for name in (FIRST, SECOND)]


def adapted(folder: Path, rank: int, *, size: float) -> PeftModel:
    """Return a GPT-2 with LoRA pairs, of which B has moved from zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(folder), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    return model


def lora_gradients(model: PeftModel, ids_BT: Tensor) -> list[LayerGradients]:
    """Return the gradients of A in the first two attention layers after one backward."""
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    weights = dict(model.named_parameters())
    return [
        LayerGradients(name, (weights[f"base_model.model.{name}.lora_A.default.weight"].grad,))
        for name in (FIRST, SECOND)
    ]


def distances(public: PublicModel, gradients: LayerGradients, ids_BT: Tensor, position: int):
    """Return the distances of the true tokens at a position, and those of all others."""
    where_N1 = torch.full((SIZE, 1), position)
    (inputs_N1D,) = public.inputs_to([FIRST], torch.arange(SIZE)[:, None], position_ids=where_N1)
    distance_N = span_distance(span_of(gradients.gradients), inputs_N1D[:, 0].detach())
    true = torch.zeros(SIZE, dtype=torch.bool)
    true[ids_BT[:, position]] = True
    return distance_N[true], distance_N[~true]


@pytest.mark.parametrize("position", [0, 7, 18])
def test_full_gradients_hold_the_true_tokens_and_no_others(
    folder: Path,
    public: PublicModel,
    ids_BT: Tensor,
    position: int,
    measured: Callable[..., None],
):
    """T-A6: the true tokens lie in the span of the full gradient, all others far from it."""
    first, _second = full_gradients(folder, ids_BT)

    true_N, others_N = distances(public, first, ids_BT, position)

    measured(true=true_N.max(), others=others_N.min())
    assert len(span_of(first.gradients)) == 2 * (TOKENS - 1)  # the last token has no label
    assert true_N.max() <= 1e-5
    assert others_N.min() >= 0.1


def test_lora_of_a_large_rank_holds_them_too(
    folder: Path, public: PublicModel, ids_BT: Tensor, measured: Callable[..., None]
):
    """T-A6: so with LoRA of rank 64, above the number of positions."""
    first, _second = lora_gradients(adapted(folder, 64, size=0.02), ids_BT)

    found = [distances(public, first, ids_BT, position) for position in (0, 7, 18)]

    true, others = max(t.max() for t, _o in found), min(o.min() for _t, o in found)
    measured(true=true, others=others)
    assert true <= 1e-5
    assert others >= 0.1


def test_lora_of_a_small_rank_does_not_separate(
    folder: Path, public: PublicModel, ids_BT: Tensor, measured: Callable[..., None]
):
    """T-A6: with LoRA of rank 8, below the number of positions, the check fails, as it must."""
    first, _second = lora_gradients(adapted(folder, 8, size=0.02), ids_BT)

    found = [distances(public, first, ids_BT, position) for position in range(1, TOKENS - 1)]

    measured(true=min(float(true_N.min()) for true_N, _others in found))
    assert len(span_of(first.gradients)) == 8
    assert all(true_N.min() > 0.1 for true_N, _others in found)
    assert any(others_N.min() < true_N.max() for true_N, others_N in found)


def test_pairs_with_one_input_add_their_ranks(folder_of: Callable[..., Path]):
    """Query, key and value of rank 5 each hold ten positions, which none of them does alone."""
    path = folder_of("llama")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path),
        LoraConfig(r=5, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    ids_BT = random_ids(VOCABULARY, 1, 11)
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    layer = "model.layers.0.self_attn"
    weights = dict(model.named_parameters())
    gradients = [
        weights[f"base_model.model.{layer}.{name}.lora_A.default.weight"].grad
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    public = PublicModel.load(str(path), bottom_layers=2, top_layers=1)
    (inputs_BTD,) = public.inputs_to([f"{layer}.q_proj"], ids_BT)

    together = span_distance(span_of(gradients), inputs_BTD[0, :-1].detach())
    alone = span_distance(span_of(gradients[:1]), inputs_BTD[0, :-1].detach())

    assert len(span_of(gradients)) == 10
    assert together.max() <= 1e-4
    assert alone.max() > 0.1


def test_whole_texts_are_read_from_full_gradients(
    folder: Path, public: PublicModel, ids_BT: Tensor
):
    """DAGER's search gives both texts of a batch back, but for their last token."""
    layers = full_gradients(folder, ids_BT)

    finding = gradient_span(public, layers, ids_BT.tolist())

    assert (finding.attack, finding.channel, finding.verdict) == ("A6", "adapter", "plaintext")
    assert (finding.trr, finding.exact) == (1.0, 1.0)
    assert finding.extra["ranks"] == [38, 38]
    assert finding.recovered[1].guess == tuple(ids_BT[1, :-1].tolist())


def test_an_aggregator_reads_texts_from_adapters(folder: Path, public: PublicModel, ids_BT: Tensor):
    """Whoever knows the adapter that a step began with merges it, and reads the step's texts."""
    model = adapted(folder, 64, size=0.02)
    layers = lora_gradients(model, ids_BT)
    model.merge_adapter()
    merged = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): value
        for name, value in model.state_dict().items()
    }

    with public.weights_changed(lambda name, value: merged.get(name, value)):
        known = span_search(public, layers, max_tokens=TOKENS)
    unknown = span_search(public, layers, max_tokens=TOKENS)

    assert sorted(known) == sorted(ids_BT[:, :-1].tolist())
    assert sorted(unknown) != sorted(known)


def test_texts_are_read_where_positions_are_rotations(folder_of: Callable[..., Path]):
    """The first layer of a Llama tells only which tokens there are; the second orders them."""
    path = folder_of("llama")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids_BT = random_ids(VOCABULARY, 2, 8)
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    weights = dict(model.named_parameters())
    layers = [
        LayerGradients(
            f"model.layers.{number}.self_attn.q_proj",
            tuple(
                weights[f"model.layers.{number}.self_attn.{name}.weight"].grad
                for name in ("q_proj", "k_proj", "v_proj")
            ),
        )
        for number in (0, 1)
    ]
    public = PublicModel.load(str(path), bottom_layers=2, top_layers=1)

    found = span_search(public, layers, max_tokens=8)

    assert all(text in found for text in ids_BT[:, :-1].tolist())


def test_gradients_of_an_unmoved_adapter_are_refused(folder: Path, ids_BT: Tensor):
    """While B is zero the gradient of A is, and says so in one sentence."""
    layers = lora_gradients(adapted(folder, 8, size=0.0), ids_BT)

    with pytest.raises(DataError, match="of a later step") as zero:
        span_of(layers[0].gradients)
    with pytest.raises(DataError, match="no common input") as unlike:
        span_of([torch.ones(2, 4), torch.ones(2, 5)])

    refusal(zero.value)
    refusal(unlike.value)


def test_a_module_that_is_not_the_bottoms_is_refused(public: PublicModel, ids_BT: Tensor):
    """A layer of the trunk, or a name that does not exist: one sentence."""
    for name in ("transformer.h.3.attn.c_attn", "transformer.h.0.attn.q"):
        with pytest.raises(ConfigError, match="has no module") as error:
            public.inputs_to([name], ids_BT)
        refusal(error.value)


# For comparison with published figures


@pytest.mark.parametrize("distance", [tag_distance, lamp_distance])
def test_matching_gradients_finds_the_tokens_of_a_small_layer(distance: Callable[..., Tensor]):
    """TAG and LAMP: of some starts, that whose gradients match best has found the tokens."""
    generator = torch.Generator().manual_seed(0)
    table_VD = torch.randn(30, 24, generator=generator)
    weight = torch.randn(24, 30, generator=generator).requires_grad_()
    tokens_T = torch.tensor([4, 17, 9])

    def gradients_of(x_TD: Tensor, logits_TV: Tensor) -> list[Tensor]:
        loss = torch.nn.functional.cross_entropy(torch.tanh(x_TD) @ weight, logits_TV.softmax(-1))
        return list(torch.autograd.grad(loss, [weight], create_graph=True))

    one_hot_TV = torch.nn.functional.one_hot(torch.tensor([1, 22, 5]), 30).float() * 30
    target = [g.detach() for g in gradients_of(table_VD[tokens_T], one_hot_TV)]
    starts = [
        (torch.randn(3, 24, generator=generator), torch.randn(3, 30, generator=generator))
        for _ in range(4)
    ]

    matched = min(
        (match_gradients(gradients_of, target, start, distance=distance) for start in starts),
        key=lambda found: found.distances[-1],
    )
    likeness_TV = torch.cosine_similarity(matched.guesses[0][:, None], table_VD[None], dim=2)

    assert matched.distances[-1] < matched.distances[0] / 10
    assert set(likeness_TV.argmax(1).tolist()) == set(tokens_T.tolist())


def test_moves_never_make_an_order_worse():
    """LAMP's moves keep the tokens, and lower the score or leave the order as it was."""
    order = [3, 1, 2, 0, 5, 4, 7, 6]

    def unsorted(tokens: list[int]) -> float:
        return float(sum(a > b for n, a in enumerate(tokens) for b in tokens[n:]))

    for seed in range(20):
        moved = discrete_moves(order, unsorted, tries=30, seed=seed)
        assert sorted(moved) == sorted(order)
        assert unsorted(moved) <= unsorted(order)
        order = moved

    assert order == sorted(order)
