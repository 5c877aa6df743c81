"""Each defense does what it books, and says what it is worth."""

# Shapes:  B sequences   T tokens   D model width   V vocabulary

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError
from cutlayer.privacy.accountant import epsilon_of
from cutlayer.privacy.adversarial import AdversarialBottom
from cutlayer.privacy.defenses import DEFENSES, REFUSED, Chain, Defense, defense_of
from cutlayer.privacy.embedding import MetricDpEmbed, distance_quantiles
from cutlayer.privacy.mechanisms import LdpSequence
from cutlayer.privacy.noise import secure_normal, secure_uniform
from cutlayer.privacy.profiles import PROFILES, profile_of
from cutlayer.privacy.release import CHANNELS, Release
from cutlayer.privacy.two_server import shares
from cutlayer.privacy.zeroth_order import move_along, step_along

B, T, D, V = 3, 5, 8, 11
FORMAL = {"clip": 2.0, "epsilon": 8.0, "delta": 1e-5, "planned": 4}
PARAMS: dict[str, dict[str, Any]] = {
    "ldp_sequence": FORMAL,
    "noisy_grad": FORMAL,
    "loss_scalar": FORMAL,
    "metric_dp_embed": {"eta": 3.0},
    "gaussian": {"nsr": 0.5},
    "two_server": {},
    "no_backward": {},
    "adv_mi_bottom": {"vocabulary": V, "nsr": 0.1},
}
TENSORS = [name for name in PARAMS if name not in ("no_backward", "loss_scalar", "two_server")]


def built(name: str, **changed: Any) -> Any:
    """Return the defense with usual parameters."""
    return defense_of(name, **{**PARAMS[name], **changed})


def drawn(*shape: int, scale: float = 1.0, seed: int = 1) -> Tensor:
    """Return numbers that are the same each time."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- one battery for all


@pytest.mark.parametrize("name", sorted(PARAMS))
def test_every_defense_declares_itself(name: str):
    """It has a channel, JSON facts that name it, and a release for each record that it touches."""
    defense: Defense = built(name)

    facts = json.loads(json.dumps(defense.describe()))
    releases = defense.releases(3, ["a", "b", "a"])

    assert (facts["name"], facts["channel"]) == (name, defense.channel)
    assert defense.channel in CHANNELS
    assert [r for release in releases for r in release.records] == (
        [] if name == "no_backward" else ["a", "b", "a"]
    )
    assert all(
        (r.mechanism, r.channel, r.formal) == (name, defense.channel, defense.formal)
        for r in releases
    )
    assert all(release.records == () for release in defense.releases(3))


def test_the_battery_covers_the_table():
    """A defense that is added is tested by being listed."""
    assert PARAMS.keys() == DEFENSES.keys()


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_defense_keeps_shape_and_dtype(name: str, dtype: torch.dtype):
    """What may leave has the shape and dtype of what would have left, and is finite."""
    tensor_BTD = drawn(B, T, D).to(dtype)

    out_BTD = built(name).apply(tensor_BTD, torch.ones(B, T, dtype=torch.long))

    assert (out_BTD.shape, out_BTD.dtype) == (tensor_BTD.shape, dtype)
    assert torch.isfinite(out_BTD).all()
    assert not torch.equal(out_BTD, tensor_BTD)


@pytest.mark.parametrize("name", TENSORS)
def test_noise_is_fresh_and_not_of_the_training_generator(name: str):
    """Two applications differ though torch's generators are set alike, which noise leaves alone."""
    tensor_BTD, defense = drawn(B, T, D), built(name)
    out = []
    for _ in range(2):
        torch.manual_seed(0)
        out.append(defense.apply(tensor_BTD))
    state = torch.get_rng_state()
    torch.manual_seed(0)

    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(*out)


def test_noise_has_the_distribution_it_says():
    """The secure generators give standard normal and uniform numbers, no two calls alike."""
    from scipy.stats import kstest

    normal, uniform = secure_normal((200_001,)), secure_uniform((200_001,))

    # A right generator fails one of these once in a million runs.
    assert kstest(normal.numpy(), "norm").pvalue > 1e-6
    assert kstest(uniform.numpy(), "uniform").pvalue > 1e-6
    assert uniform.min() > 0
    assert uniform.max() < 1
    pairs = torch.stack([normal[:100_000], normal[100_000:200_000], normal[1:100_001]])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.02
    assert secure_normal((2, 0, 3)).shape == (2, 0, 3)


# ---------------------------------------------------------------------- clipped Gaussians


@pytest.mark.parametrize("name", ["ldp_sequence", "noisy_grad"])
def test_the_noise_on_the_tensor_is_the_noise_that_is_booked(name: str):
    """Measured on zeros, the noise has the standard deviation of the release, everywhere."""
    defense = built(name, clip=3.0)
    (release,) = defense.releases(1)

    out_BTD = defense.apply(torch.zeros(16, 64, 64), torch.ones(16, 64))

    assert release.clip == 3.0
    assert release.formal
    expected = release.clip * release.sigma
    assert out_BTD.std().item() == pytest.approx(expected, rel=0.015)
    assert out_BTD.std((0, 1)).min().item() > 0.8 * expected
    assert release.noise_multiplier == release.sigma / 2  # a replaced sequence moves by 2 C


@pytest.mark.parametrize("name", ["ldp_sequence", "noisy_grad", "loss_scalar"])
def test_what_is_planned_is_what_it_costs(name: str):
    """All planned releases of a sequence come to the epsilon that was asked for."""
    defense = built(name, planned=6, epsilon=2.0)

    found = epsilon_of(defense.releases(1, ["a"]) * 6, 1e-5)

    assert 1.999 < found.pld <= 2.0


@pytest.mark.parametrize("settings", [{}, {"pool": 4}], ids=["whole", "pooled"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_a_sequence_is_never_longer_than_its_clip(settings: dict[str, int], scale: float):
    """Any two sequences end up at most 2 C apart, whatever they are; short ones are not touched."""
    defense = built("ldp_sequence", **settings)
    tensor_BTD = drawn(B, T, D, scale=scale)

    signal = defense.signal(tensor_BTD)

    norms = signal.flatten(1).norm(dim=1)
    assert (norms <= defense.clip * (1 + 1e-12)).all()
    if scale == 1e4:
        torch.testing.assert_close(norms, torch.full_like(norms, defense.clip))
    if scale == 0.01 and not settings:
        torch.testing.assert_close(signal, tensor_BTD.double())


def test_half_precision_does_not_stretch_the_clip():
    """A norm whose square overflows float16 is still clipped to C."""
    tensor_BTD = torch.full((2, 64, 64), 300.0, dtype=torch.float16)

    norms = built("ldp_sequence").signal(tensor_BTD).flatten(1).norm(dim=1)

    torch.testing.assert_close(norms, torch.full_like(norms, 2.0))


@pytest.mark.parametrize(
    "settings", [{}, {"pool": 4}, {"clip": 1e3}], ids=["clipped", "pooled", "short"]
)
def test_gradients_pass_through_the_clip(settings: dict[str, Any]):
    """The clip, its scale included, is differentiated exactly, and the noise does not change it."""
    defense = built("ldp_sequence", **settings)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    tensor_BTD = drawn(B, T, D).double().requires_grad_()

    assert torch.autograd.gradcheck(lambda x: defense.signal(x, mask_BT), tensor_BTD)

    upstream = drawn(*defense.apply(tensor_BTD, mask_BT).shape, seed=2).double()
    expected, found = (
        torch.autograd.grad(f(tensor_BTD, mask_BT), tensor_BTD, upstream)[0]
        for f in (defense.signal, defense.apply)
    )
    torch.testing.assert_close(expected, found)
    assert torch.autograd.gradcheck(defense.signal, torch.zeros_like(tensor_BTD).requires_grad_())


def test_what_stands_at_padding_does_not_leave():
    """The signal is the same whatever is at masked positions, which get noise like all others."""
    mask_BT = torch.ones(B, T)
    mask_BT[:, -2:] = 0
    one_BTD, other_BTD = drawn(B, T, D, scale=0.1), drawn(B, T, D, scale=0.1)
    other_BTD[:, -2:] = 50.0

    for settings in ({}, {"pool": 4}):
        defense = built("ldp_sequence", **settings)
        assert torch.equal(defense.signal(one_BTD, mask_BT), defense.signal(other_BTD, mask_BT))
    out_BTD = built("ldp_sequence").apply(one_BTD, mask_BT)
    assert (out_BTD[:, -2:] != 0).all()


def test_pooled_release_is_the_mean_in_few_dimensions():
    """With `pool` one vector of that width leaves a sequence; spread, it has the trunk's shape."""
    tensor_BTD = drawn(B, T, D, scale=0.01)
    mask_BT = torch.tensor([[1, 1, 0, 0, 0]] * B)
    defense = built("ldp_sequence", pool=4)
    basis_DP = defense.projection_for(tensor_BTD)

    torch.testing.assert_close(basis_DP.T @ basis_DP, torch.eye(4, dtype=torch.float64))
    mean_BD = tensor_BTD[:, :2].double().mean(1)
    torch.testing.assert_close(defense.signal(tensor_BTD, mask_BT)[:, 0], mean_BD @ basis_DP)
    assert defense.apply(tensor_BTD, mask_BT).shape == (B, 1, 4)

    spread_BTD = built("ldp_sequence", pool=4, spread=True).apply(tensor_BTD, mask_BT)

    assert spread_BTD.shape == (B, T, D)
    assert torch.equal(spread_BTD, spread_BTD[:, :1].expand_as(spread_BTD))
    assert torch.linalg.matrix_rank(spread_BTD[:, 0]) == B
    inside_BD = spread_BTD[:, 0].double()
    torch.testing.assert_close(inside_BD @ basis_DP @ basis_DP.T, inside_BD, atol=1e-5, rtol=1e-5)
    # The same projection next time: a secret that changed would be no secret, and no model.
    assert torch.equal(basis_DP, LdpSequence(**FORMAL, pool=4).projection_for(tensor_BTD))


# ---------------------------------------------------------------------- the others


def test_heuristic_noise_follows_the_size_of_what_is_not_padding():
    """The noise-to-signal ratio is what was asked for, and padding does not count."""
    tensor_BTD, mask_BT = drawn(8, 64, 64, scale=5.0), torch.ones(8, 64)
    mask_BT[:, 32:] = 0
    tensor_BTD[:, 32:] = 1e3

    noise_BTD = built("gaussian", nsr=0.3).apply(tensor_BTD, mask_BT) - tensor_BTD

    assert noise_BTD.std().item() == pytest.approx(0.3 * 5.0, rel=0.03)
    assert built("gaussian", channel="gradients").releases(2)[0].channel == "gradients"


def test_metric_noise_is_gamma_long_and_without_direction():
    """The noise's length is Gamma(D) / eta, its direction uniform."""
    from scipy.stats import gamma, kstest

    eta = 3.0
    noise_BTD = MetricDpEmbed(eta=eta).apply(torch.zeros(50, 100, D, dtype=torch.float64))

    length_N = noise_BTD.norm(dim=-1).flatten()
    assert kstest(length_N.numpy(), gamma(D, scale=1 / eta).cdf).pvalue > 1e-6
    direction_ND = noise_BTD.flatten(0, 1) / length_N[:, None]
    assert direction_ND.mean(0).abs().max() < 0.03
    torch.testing.assert_close(
        direction_ND.T @ direction_ND / len(direction_ND),
        torch.eye(D, dtype=torch.float64) / D,
        atol=0.02,
        rtol=0,
    )


def test_metric_privacy_prints_eta_times_distance():
    """What a pair of tokens is promised is eta times its distance times the releases."""
    rows_VD = torch.eye(V, D)[:D]  # every pair at a distance of sqrt(2)

    found = MetricDpEmbed(eta=10.0).token_epsilon(rows_VD, releases=3)

    assert found == pytest.approx(dict.fromkeys((0.05, 0.5, 0.95), 30 * 2**0.5))
    assert distance_quantiles(torch.tensor([[0.0], [1.0]]), [0.5]) == {0.5: 1.0}


def test_snapping_gives_rows_and_lets_gradients_pass():
    """A snapped embedding is a row of the table, the nearest one, and passes the gradient on."""
    table_VD = drawn(V, D, scale=10.0)
    ids_BT = torch.randint(V, (B, T))
    near_BTD = (table_VD[ids_BT] + 0.1).requires_grad_()

    out_BTD = built("metric_dp_embed", eta=1e3, snap=True, embedding_VD=table_VD).apply(near_BTD)
    out_BTD.sum().backward()

    torch.testing.assert_close(out_BTD.detach(), table_VD[ids_BT])
    torch.testing.assert_close(near_BTD.grad, torch.ones_like(near_BTD))


def test_an_adversarial_bottom_and_its_inverter_pull_against_each_other():
    """The inverter learns the tokens from what leaves; the pull moves the bottom against it."""
    table_VD, ids_BT = drawn(V, D), torch.arange(16 * T).reshape(16, T) % V
    defense = AdversarialBottom(V, nsr=0.3, lr=0.02)
    weight_DD = torch.eye(D).requires_grad_(True)
    began = None
    for _ in range(40):
        defense.pulled(table_VD[ids_BT] @ weight_DD, ids_BT, None)
        began = began or defense.loss
    learnt = defense.loss
    defense.steps = 1
    optimizer = torch.optim.SGD([weight_DD], lr=5.0)
    for _ in range(20):
        optimizer.zero_grad()
        (0 * defense.pulled(table_VD[ids_BT] @ weight_DD, ids_BT, None)).sum().backward()
        optimizer.step()

    assert learnt < 0.5 * began
    assert defense.loss > learnt + 0.5


def test_the_pull_is_added_to_the_tasks_gradient():
    """What leaves is not changed; the gradient gains what lowers the truth's log-probability."""
    hidden_BTD, ids_BT = drawn(B, T, D).requires_grad_(True), torch.arange(B * T).reshape(B, T) % V
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 3:] = 0
    found = []
    for weight in (1.0, 3.0):
        defense = AdversarialBottom(V, weight=weight, nsr=1e-6)
        torch.manual_seed(0)
        out_BTD = defense.pulled(hidden_BTD, ids_BT, mask_BT)
        (gradient_BTD,) = torch.autograd.grad(out_BTD.sum(), hidden_BTD)
        found.append(gradient_BTD - 1)
        assert torch.equal(out_BTD, hidden_BTD)

    assert found[0].abs().max() > 1e-4
    assert not found[0][0, 3:].any()  # a GRU does not look ahead, so padding is not pulled
    torch.testing.assert_close(found[1], 3 * found[0], rtol=1e-2, atol=1e-5)


def test_loss_scalar_releases_one_clipped_noisy_sum():
    """One number leaves a batch: the sum of clipped differences, with noise of sigma C."""
    defense = built("loss_scalar", clip=0.5, epsilon=8.0)
    difference_B = torch.tensor([9.0, -0.1, -9.0, 0.3, 2.0])

    drawn_N = torch.stack([defense.apply(difference_B) for _ in range(4000)])

    (release,) = defense.releases(5, list("abcde"))
    assert release.records == tuple("abcde")
    assert defense.signal(difference_B).item() == pytest.approx(0.5 - 0.1 - 0.5 + 0.3 + 0.5)
    assert drawn_N.mean().item() == pytest.approx(0.7, abs=0.15)
    assert drawn_N.std().item() == pytest.approx(0.5 * release.sigma, rel=0.06)


def test_steps_along_a_public_seed_descend():
    """With no gradient at all, clipped differences and public seeds bring a loss down."""
    target = drawn(D)
    weights = [torch.zeros(D // 2), torch.zeros(D // 2)]

    def loss() -> float:
        return float((torch.cat(weights) - target).square().sum())

    began, scale = loss(), 1e-3
    for seed in range(300):
        move_along(weights, seed, scale)
        above = loss()
        move_along(weights, seed, -2 * scale)
        difference = above - loss()
        move_along(weights, seed, scale)
        step_along(weights, seed, difference, scale=scale, batch_size=1, lr=0.02)

    assert loss() < 0.05 * began


def test_no_backward_stops_a_gradient():
    """Where no gradient may leave, one that is about to raises, and nothing is booked."""
    with pytest.raises(ConfigError, match="lets no gradient leave"):
        built("no_backward").apply(drawn(B, T, D))


# ---------------------------------------------------------------------- two servers


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_shares_add_up(scale: float, measured: Any):
    """T-D8: the two shares sum to the gradient within 1e-4, whatever its size."""
    grad_BTD = drawn(8, 64, 96, scale=scale)

    one_BTD, other_BTD = shares(grad_BTD)

    off = ((one_BTD + other_BTD - grad_BTD).norm() / grad_BTD.norm()).item()
    measured(off=off)
    assert off < 1e-4


@pytest.mark.parametrize(
    # In float32 each backward rounds at the size of its share, kappa times that of the gradient:
    # the trunk decides how much of kappa there may be.
    ("dtype", "kappa", "bound"),
    [(torch.float64, 2.0**10, 1e-9), (torch.float32, 2.0**8, 1e-4)],
)
def test_two_backwards_add_up_to_one(dtype: torch.dtype, kappa: float, bound: float, measured: Any):
    """T-D8: two backwards through four layers add up to one; float32 bounds the noise for 1e-4."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, dtype=dtype)
    trunk = nn.TransformerEncoder(layer, 4)
    x_BTD = drawn(4, 16, 32).to(dtype).requires_grad_()
    wanted = [x_BTD, *trunk.parameters()]
    grad_BTD = drawn(4, 16, 32, scale=1e-3, seed=2).to(dtype)

    def backward_of(upper_BTD: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(trunk(x_BTD), wanted, upper_BTD)

    plain = torch.cat([g.flatten() for g in backward_of(grad_BTD)])
    one, other = (backward_of(share) for share in shares(grad_BTD, kappa))
    both = torch.cat([(a + b).flatten() for a, b in zip(one, other, strict=True)])

    off = ((both - plain).norm() / plain.norm()).item()
    measured(off=off)
    assert off < bound


def test_one_share_tells_no_label(measured: Any):
    """T-D8: solved for its labels, either share gives them as often as guessing does."""
    rows, vocabulary = 4000, 50
    hidden_ND, head_VD = drawn(rows, 32), drawn(vocabulary, 32, seed=2)
    labels_N = torch.randint(vocabulary, (rows,))
    logits_NV = hidden_ND @ head_VD.T
    errors_NV = logits_NV.softmax(-1) - nn.functional.one_hot(labels_N, vocabulary)
    grad_ND = errors_NV @ head_VD

    def solved(gradient_ND: Tensor) -> float:
        rows_ND = logits_NV.softmax(-1) @ head_VD - gradient_ND
        return float((torch.cdist(rows_ND, head_VD).argmin(-1) == labels_N).float().mean())

    one_ND, other_ND = (share[0] for share in shares(grad_ND[None]))
    measured(of_a_share=max(solved(one_ND), solved(other_ND)), of_the_gradient=solved(grad_ND))
    assert solved(grad_ND) == 1.0
    # Five standard deviations above one in fifty.
    assert max(solved(one_ND), solved(other_ND)) < 0.02 + 5 * (0.02 * 0.98 / rows) ** 0.5


# ---------------------------------------------------------------------- chains


def test_a_chain_is_as_formal_as_its_best_link():
    """Noise after a formal release costs nothing; only that release is booked."""
    chain = Chain(built("gaussian"), built("ldp_sequence", pool=4), built("gaussian"))

    assert chain.formal
    assert [r.mechanism for r in chain.releases(2, ["a", "b"])] == ["ldp_sequence"] * 2
    assert chain.apply(drawn(B, T, D), torch.ones(B, T)).shape == (B, 1, 4)
    assert [link["name"] for link in chain.describe()["links"]][1] == "ldp_sequence"
    assert [r.formal for r in Chain(built("gaussian")).releases(2)] == [False] * 2


@pytest.mark.parametrize(
    "names",
    [(), ("ldp_sequence", "noisy_grad"), ("metric_dp_embed", "ldp_sequence")],
)
def test_a_chain_stands_in_one_place(names: tuple[str, ...]):
    """Defenses of two channels or two places are no chain."""
    with pytest.raises(ConfigError, match="a chain of"):
        Chain(*(built(name) for name in names))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", [*REFUSED, "quantization", "int8", "shuffle"])
def test_what_protects_nothing_is_refused_by_name(name: str):
    """Asked for by name, it is refused in one sentence that says why."""
    with pytest.raises(ConfigError, match=f"'{name}' is not offered as a defense: ") as told:
        defense_of(name)
    assert not str(told.value).endswith(".")
    assert len(str(told.value)) > 80


def test_reasons_of_refusal_are_sentences():
    """Each reason reads on after a colon."""
    assert all(reason[0].islower() and not reason.endswith(".") for reason in REFUSED.values())


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("ldp_sequence", {"clip": 0.0}, "ldp_sequence: clip = 0.0 must be a number above 0"),
        ("ldp_sequence", {"clip": float("nan")}, "clip = nan"),
        ("ldp_sequence", {"delta": 0.01, "records": 100}, "below 1/n = 0.01 for n = 100 records"),
        ("ldp_sequence", {"clip": -1, "epsilon": 0}, "clip = -1 .*; epsilon = 0"),
        ("ldp_sequence", {"planned": 0}, "planned = 0 must be at least 1"),
        ("ldp_sequence", {"pool": 17}, "pool = 17 must be from 1 to 16"),
        ("ldp_sequence", {"spread": True}, "spread = True needs pool"),
        ("noisy_grad", {"delta": 2}, "noisy_grad: delta = 2"),
        ("noisy_grad", {"pool": 4}, "has no parameter pool: it has clip, epsilon"),
        ("loss_scalar", {"clip": -0.5}, "loss_scalar: clip = -0.5"),
        ("gaussian", {"epsilon": 8}, "epsilon = 8 was asked of 'gaussian', which has none"),
        ("metric_dp_embed", {"epsilon": 8}, "asked of 'metric_dp_embed', which has none"),
        ("no_backward", {"delta": 1e-5}, "delta = 1e-05 was asked of 'no_backward'"),
        ("gaussian", {"nsr": -1}, "nsr = -1 must be a number above 0"),
        ("gaussian", {"channel": "scalars"}, "channel = 'scalars' must be one of"),
        ("metric_dp_embed", {"eta": 0}, "eta = 0"),
        ("metric_dp_embed", {"snap": True}, "snap = True needs embedding_VD"),
        ("two_server", {"kappa": 0}, "kappa = 0"),
        ("adv_mi_bottom", {"weight": -1}, "weight = -1"),
    ],
)
def test_parameters_that_make_no_sense(name: str, changed: dict[str, Any], says: str):
    """Wrong parameters are refused in one sentence with all faults."""
    with pytest.raises(ConfigError, match=says) as told:
        built(name, **changed)
    assert "\n" not in str(told.value)
    assert not str(told.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "says"),
    [("ldp_sequense", "did you mean ldp_sequence"), ("magic", "one of ldp_sequence, ")],
)
def test_unknown_defenses(name: str, says: str):
    """An unknown name is refused with the nearest known one, or all of them."""
    with pytest.raises(ConfigError, match=says):
        defense_of(name)


def test_missing_and_mistaken_parameters():
    """What is missing is named, and ids that do not fit the batch are refused."""
    with pytest.raises(ConfigError, match=r"'ldp_sequence': missing 3 .*'clip', 'epsilon'"):
        defense_of("ldp_sequence")
    with pytest.raises(ConfigError, match="2 record ids were given for a batch of 3"):
        built("gaussian").releases(3, ["a", "b"])
    with pytest.raises(ConfigError, match=r"pool = 9 is more than the model's width of 8"):
        built("ldp_sequence", pool=9).apply(drawn(B, T, D))


# ---------------------------------------------------------------------- profiles


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_can_be_built_and_says_what_it_is_worth(name: str):
    """Its defenses exist and stand on their channel; only the formal one promises a number."""
    given = {"clip": 1.0, "epsilon": 8.0, "delta": 1e-5, "planned": 3}
    profile = profile_of(name, given if PROFILES[name].formal else {})

    for channel, settings in profile.defenses.items():
        needed = {k: v for k, v in given.items() if settings["name"] == "ldp_sequence"}
        assert defense_of(**{**settings, **needed}).channel == channel
    assert ("no formal guarantee" in profile.verdict) is not profile.formal
    assert set(profile.train) <= {"bottom", "trunk", "top"}
    # A bottom that is trained on the records makes each release depend on all of them.
    assert name == "open" or "bottom" not in profile.train
    assert profile.backward or "trunk" not in profile.train


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("forml", {}, "did you mean formal"),
        ("formal", {"clip": 1.0}, "needs epsilon, delta, planned"),
        ("empirical", {"epsilon": 8}, "epsilon = 8 was asked of the profile 'empirical'"),
        ("open", {"epsilon": 8}, "which has none"),
    ],
)
def test_profiles_that_cannot_hold(name: str, given: dict[str, Any], says: str):
    """An unknown profile, one without its numbers, and a number asked of one that has none."""
    with pytest.raises(ConfigError, match=says):
        profile_of(name, given)


def test_releases_compare_by_what_they_are():
    """A release of other records is the same kind of release."""
    one = Release("gaussian", "activations", "none", 0.0, 1.0, 0.0, ("a",), formal=False)

    assert one.of("b").of() == one.of()
    assert one.of("b") != one
