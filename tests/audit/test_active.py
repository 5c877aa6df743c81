"""A server that follows the protocol passes every check; one that cheats is noticed."""

# Shapes:  B batch   T tokens   D model width   V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.audit.active import (
    Answer,
    Probes,
    Pull,
    angle_between,
    answers_are_deterministic,
    gradient_fits_answers,
    gradients_follow_labels,
    hijack_score,
    probe_digest,
)
from cutlayer.audit.public import PublicModel
from cutlayer.errors import DataError
from cutlayer.split.cut import Cut, Trunk
from cutlayer.split.loading import load_trunk, open_checkpoint, skeleton_of
from tests.audit.victims import public_of, random_ids, refusal, write_gpt2

BOTTOM, TOP, LAYERS = 1, 1, 5


class Server:
    """An honest server: the trunk that the product loads, with its forward and its backward."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(str(folder))
        skeleton = skeleton_of(checkpoint.config, "causal-lm")
        cut = Cut.leaving(bottom_layers=BOTTOM, top_layers=TOP, num_layers=LAYERS)
        self.model = load_trunk(checkpoint, skeleton, cut, dtype=torch.float32).eval()
        self._trunk = Trunk(self.model.requires_grad_(False), skeleton.anatomy, cut)

    def answer(self, smashed_BTD: Tensor) -> Tensor:
        """Return the trunk's output."""
        return self._trunk(smashed_BTD, {})

    def pull(self, smashed_BTD: Tensor, grad_BTD: Tensor) -> Tensor:
        """Return the gradient at the lower cut."""
        with torch.enable_grad():
            entered = smashed_BTD.detach().requires_grad_()
            return torch.autograd.grad(self._trunk(entered, {}), entered, grad_BTD)[0]

    def hijack(self, smashed_BTD: Tensor, _grad_BTD: Tensor) -> Tensor:
        """Return the gradient of an aim of its own: a critic's, that no label changes."""
        with torch.enable_grad():
            entered = smashed_BTD.detach().requires_grad_()
            aim = torch.tanh(entered).square().mean(dim=(1, 2)).sum()
            return torch.autograd.grad(aim, entered)[0]


class Client:
    """What a client has: the ends, texts, and labels right and shuffled."""

    def __init__(self, folder: Path) -> None:
        self.public: PublicModel = public_of(folder, bottom=BOTTOM, top=TOP)

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return texts, and what they send up."""
        ids_BT = random_ids(512, 4, 12, seed=seed)
        return ids_BT, self.public.bottom(ids_BT).detach()

    def gradient(self, trunk_out_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Return what these labels send up."""
        z_BTD = trunk_out_BTD.detach().requires_grad_()
        logits_BTV = self.public.head(self.public.top(z_BTD))
        loss = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
        )
        return torch.autograd.grad(loss, z_BTD)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random GPT-2."""
    return write_gpt2(tmp_path_factory.mktemp("gpt2"), layers=LAYERS, width=64, vocabulary=512)


@pytest.fixture(scope="module")
def server(folder: Path) -> Server:
    """Return an honest server."""
    return Server(folder)


@pytest.fixture(scope="module")
def client(folder: Path) -> Client:
    """Return a client."""
    return Client(folder)


def coarse(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a call whose answers are rounded as the codec bf16 rounds them."""
    return lambda *given: call(*given).bfloat16().float()


def test_an_honest_server_answers_alike(server: Server, client: Client):
    """The same activations give the same answer, bit for bit, and the same digest."""
    _ids, smashed_BTD = client.batch(0)

    check = answers_are_deterministic(server.answer, smashed_BTD, times=3)

    assert check.passed
    assert check.found == 0
    assert probe_digest(server.answer, smashed_BTD) == probe_digest(server.answer, smashed_BTD)


def test_answers_that_vary_are_noticed(server: Server, client: Client):
    """Noise, other weights for one client, or an answer of another shape fail the check."""
    _ids, smashed_BTD = client.batch(0)

    def moody(sent_BTD: Tensor) -> Tensor:
        return server.answer(sent_BTD) + 1e-4 * torch.randn(sent_BTD.shape)

    shapes = iter([3, 4])
    other = answers_are_deterministic(lambda sent: torch.ones(next(shapes), 2), smashed_BTD)

    assert not answers_are_deterministic(moody, smashed_BTD).passed
    assert answers_are_deterministic(moody, smashed_BTD, tolerance=0.01).passed
    assert (other.passed, other.found) == (False, math.inf)
    assert probe_digest(moody, smashed_BTD) != probe_digest(server.answer, smashed_BTD)


def test_probes_sent_again_find_a_server_that_changed(server: Server, client: Client):
    """A share of the batches is kept; sent later, they show that the weights are others."""
    probes = Probes(share=0.2, at_most=5, seed=1)
    for seed in range(40):
        _ids, smashed_BTD = client.batch(seed)
        probes.saw(smashed_BTD, server.answer(smashed_BTD))

    honest = probes.replay(server.answer)
    changed = probes.replay(lambda sent_BTD: server.answer(sent_BTD) * (1 + 1e-3))

    assert len(probes) == 5
    assert honest.passed
    assert not changed.passed
    assert changed.found == pytest.approx(1e-3, rel=0.01)


def test_probes_cannot_be_foreseen():
    """Without a seed of one's own, no two runs keep the same batches."""
    kept = []
    for _ in range(2):
        probes = Probes(share=0.5, at_most=64)
        for number in range(64):
            probes.saw(torch.tensor([float(number)]), torch.zeros(1))
        kept.append([float(sent) for sent, _answer in probes._kept])

    assert kept[0] != kept[1]


@pytest.mark.parametrize("through", [lambda call: call, coarse])
def test_an_honest_backward_passes(server: Server, client: Client, through: Callable[..., Answer]):
    """Its gradient follows the labels and fits its answers, rounded by a codec or not."""
    answer, pull = through(server.answer), through(server.pull)
    for seed in range(3):
        ids_BT, smashed_BTD = client.batch(seed)
        right, wrong = (
            client.gradient(server.answer(smashed_BTD), labels)
            for labels in (ids_BT, ids_BT.flip(0))
        )

        follows = gradients_follow_labels(pull, smashed_BTD, right, wrong)
        fits = gradient_fits_answers(answer, pull, smashed_BTD, right)

        assert follows.passed, follows.says
        assert follows.found > 0.3
        assert fits.passed, fits.says


def test_a_hijacked_backward_is_noticed(server: Server, client: Client):
    """A server that trains the bottom towards its own aim fails both checks."""
    ids_BT, smashed_BTD = client.batch(0)
    right, wrong = (
        client.gradient(server.answer(smashed_BTD), labels) for labels in (ids_BT, ids_BT.flip(0))
    )

    follows = gradients_follow_labels(server.hijack, smashed_BTD, right, wrong)
    fits = gradient_fits_answers(server.answer, server.hijack, smashed_BTD, right)

    assert not follows.passed
    assert follows.found == pytest.approx(0, abs=1e-6)
    assert not fits.passed


def test_a_hijack_mixed_with_the_task_is_noticed(server: Server, client: Client):
    """An aim of its own beside the task's gradient follows the labels, and still does not fit."""
    ids_BT, smashed_BTD = client.batch(0)
    right = client.gradient(server.answer(smashed_BTD), ids_BT)
    honest_BTD = server.pull(smashed_BTD, right)
    own_BTD = server.hijack(smashed_BTD, right)
    own_BTD = own_BTD * honest_BTD.norm() / own_BTD.norm()

    fits = gradient_fits_answers(
        server.answer, lambda *given: server.pull(*given) + own_BTD, smashed_BTD, right
    )

    assert not fits.passed
    assert fits.found > 0.2


def scores(client: Client, server: Server, pull: Pull) -> float:
    """Return SplitGuard's score over a run with a fake batch after every third."""
    regular: list[Tensor] = []
    fake: list[Tensor] = []
    for seed in range(24):
        ids_BT, smashed_BTD = client.batch(seed)
        # Labels that the batches have in common, as a task has; fake ones are drawn anew.
        labels = torch.full_like(ids_BT, 7) if seed % 4 else ids_BT
        grad_BTD = client.gradient(server.answer(smashed_BTD), labels)
        (regular if seed % 4 else fake).append(pull(smashed_BTD, grad_BTD).mean((0, 1)))
    return hijack_score(regular, fake)


def test_splitguard_tells_honest_from_hijacked(server: Server, client: Client):
    """Its score is high where labels matter and near a half where they do not."""
    honest = scores(client, server, server.pull)
    hijacked = scores(client, server, server.hijack)

    assert honest > 0.9
    assert hijacked < 0.7


def test_angles_are_exact_where_cosines_are_not():
    """Of nearly equal and of opposite tensors, and of zero."""
    one = torch.tensor([1.0, 0.0])

    assert angle_between(one, torch.tensor([1.0, 1e-6])) == pytest.approx(1e-6, rel=1e-4)
    assert angle_between(one, -one) == pytest.approx(math.pi)
    assert angle_between(one, torch.tensor([0.0, 2.0])) == pytest.approx(math.pi / 2)
    assert angle_between(one, torch.zeros(2)) == 0


def test_checks_that_can_prove_nothing_are_refused(server: Server, client: Client):
    """No probes kept, the same labels twice, too few batches: one sentence each."""
    _ids, smashed_BTD = client.batch(0)
    same = torch.ones_like(smashed_BTD)

    with pytest.raises(DataError, match="no batch was kept") as none:
        Probes(seed=0).replay(server.answer)
    with pytest.raises(DataError, match="at most 1") as share:
        Probes(share=2)
    with pytest.raises(DataError, match="can prove nothing") as equal:
        gradients_follow_labels(server.pull, smashed_BTD, same, same)
    with pytest.raises(DataError, match="needs two and one") as few:
        hijack_score([same], [same])

    for error in (none, share, equal, few):
        refusal(error.value)
