"""Secure aggregation: the sum comes out, and nothing else does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import sympy
import torch

from cutlayer.errors import ConfigError, DataError, NotFinite, ProtocolError, Refused
from cutlayer.privacy.fixed_point import FixedPoint, flatten, unflatten
from cutlayer.privacy.masks import PRIME, SHARE_BYTES, join, keystream, new_secret, split
from cutlayer.privacy.secagg import Client, Round, _pair_seed, deliver, total

NAMES = ("alder", "birch", "cedar", "dogwood", "elm")
LENGTH = 1000


@dataclass
class Meeting:
    """Some clients and what an honest aggregator carries between them."""

    round: Round
    inputs: dict[str, np.ndarray]
    keys: dict[str, Any] = field(default_factory=dict)
    sealed: dict[str, Any] = field(default_factory=dict)
    masked: dict[str, Any] = field(default_factory=dict)
    revealed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clients = {name: Client(self.round, name) for name in self.round.members}

    def run(
        self,
        *,
        no_share: tuple[str, ...] = (),
        no_input: tuple[str, ...] = (),
        no_reveal: tuple[str, ...] = (),
    ) -> np.ndarray:
        """Do all four rounds, some clients dropping out before their part in one."""
        self.keys = {name: client.advertise() for name, client in self.clients.items()}
        there = [name for name in self.round.members if name not in no_share]
        self.sealed = {name: self.clients[name].share(self.keys) for name in there}
        sealed_for = deliver(self.sealed)
        there = [name for name in there if name not in no_input]
        self.masked = {
            name: self.clients[name].mask(sealed_for[name], self.inputs[name]) for name in there
        }
        self.revealed = {
            name: self.clients[name].reveal(there) for name in there if name not in no_reveal
        }
        return self.total()

    def total(self) -> np.ndarray:
        """Return the aggregator's sum."""
        return total(self.round, self.keys, list(self.sealed), self.masked, self.revealed)


def meeting(clients: int = 5, *, clip: float = 1.0, **settings: Any) -> Meeting:
    """Return clients with inputs of their own, all within the clip."""
    generator = np.random.default_rng(clients)
    names = NAMES[:clients]
    inputs = {name: generator.uniform(-clip, clip, LENGTH) for name in names}
    return Meeting(Round("round 7", names, LENGTH, FixedPoint(clip, **settings)), inputs)


def plain_sum(found: Meeting, *, without: tuple[str, ...] = ()) -> np.ndarray:
    """Return the sum of the inputs as they were."""
    return np.sum([x for name, x in found.inputs.items() if name not in without], axis=0)


@pytest.mark.parametrize("clients", [2, 3, 5])
@pytest.mark.parametrize("fixed_point", [{}, {"bits": 64, "levels": 1 << 40}])
def test_the_sum_is_the_plain_sum(clients: int, fixed_point: dict[str, int], measured: Any):
    """T-D5: the sum of n clients equals the plain sum within a quantum for each of them."""
    them = meeting(clients, clip=0.37, **fixed_point)

    found_P = them.run()

    quantum = them.round.fixed_point.quantum
    measured(off_in_quanta=np.abs(found_P - plain_sum(them)).max() / quantum)
    assert np.abs(found_P - plain_sum(them)).max() <= clients * quantum
    assert quantum <= (2e-7 if not fixed_point else 1e-12)


@pytest.mark.parametrize("stage", ["no_share", "no_input", "no_reveal"])
def test_one_dropout_recovers(stage: str):
    """T-D5: a client that goes away at any stage leaves a sum of those whose input came."""
    them = meeting()

    found_P = them.run(**{stage: ("cedar",)})

    without = () if stage == "no_reveal" else ("cedar",)
    assert np.abs(found_P - plain_sum(them, without=without)).max() <= (
        5 * them.round.fixed_point.quantum
    )


@pytest.mark.parametrize("stage", ["no_share", "no_input", "no_reveal"])
def test_below_the_threshold_nothing_comes_out(stage: str):
    """With two of five gone, fewer than two thirds are left and no sum is made."""
    them = meeting()

    with pytest.raises(Refused, match=r"3 of 5 clients .* 4 are needed"):
        them.run(**{stage: ("birch", "elm")})


@pytest.mark.parametrize(("clients", "threshold"), [(2, 2), (3, 2), (4, 3), (5, 4), (6, 4)])
def test_threshold_is_two_thirds_rounded_up(clients: int, threshold: int):
    """The threshold is ceil(2n/3)."""
    names = tuple(f"client-{number}" for number in range(clients))

    assert Round("r", names, 1, FixedPoint(1.0)).threshold == threshold


def test_one_client_alone_is_refused():
    """A round of one would hand the aggregator that client's input."""
    with pytest.raises(ConfigError, match="the sum of one input is that input"):
        Round("r", ("alder",), LENGTH, FixedPoint(1.0))


def test_masks_use_all_bits_of_their_key():
    """T-D5: two keys that a fold to 32 bits cannot tell apart give different masks."""

    def folded(key: bytes) -> int:
        """Fold as the published generator does, by XOR of 32-bit words."""
        return int(np.bitwise_xor.reduce(np.frombuffer(key, dtype="<u4")))

    one = new_secret()
    other = bytearray(one)
    other[0] ^= 0x5A
    other[4] ^= 0x5A

    assert one != other
    assert folded(one) == folded(bytes(other))
    assert keystream(one, 64) != keystream(bytes(other), 64)


def test_keystream_is_chacha20():
    """The stream of the zero key is that of RFC 8439, appendix A.1, test vector 1."""
    expected = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"

    assert keystream(bytes(32), 32).hex() == expected


def test_a_masked_input_says_nothing_of_the_input():
    """What leaves is uniform over all integers, whatever the input, and the same never twice."""
    quiet = Round("r", NAMES[:2], 1 << 16, FixedPoint(1.0))
    sent = []
    for _ in range(2):
        them = Meeting(quiet, {name: np.zeros(1 << 16) for name in NAMES[:2]})
        them.run()
        sent += [np.frombuffer(message["masked"], "<u4") for message in them.masked.values()]

    for words_P in sent:
        counts = np.bincount(words_P >> 24, minlength=256)
        # Chi-square with 255 degrees of freedom: beyond 400 with probability 2e-8.
        assert ((counts - 256) ** 2 / 256).sum() < 400
    assert len({words_P.tobytes() for words_P in sent}) == 4


def test_the_pair_masks_alone_do_not_open_an_input():
    """Whose input comes late, after its pair masks were revealed, still has its own mask on it."""
    them = meeting(3)
    them.run(no_input=("cedar",))
    cedar = them.clients["cedar"]
    late = cedar.mask(deliver(them.sealed)["cedar"], them.inputs["cedar"])
    shares = {them.round.index(n): them.revealed[n]["cedar"] for n in ("alder", "birch")}
    pair_key = join(shares, threshold=2)
    opened_P = np.frombuffer(late["masked"], "<u4")
    for other in ("alder", "birch"):
        seed = _pair_seed(pair_key, them.keys, cedar._context, "cedar", other)
        unmasked_P = np.frombuffer(keystream(seed, 4 * LENGTH), "<u4")
        opened_P = opened_P + unmasked_P  # cedar comes last, so it took its pair masks off

    counts = np.bincount(opened_P >> 28, minlength=16)
    # Chi-square with 15 degrees of freedom: beyond 60 with probability 2e-7.
    assert ((counts - LENGTH / 16) ** 2 / (LENGTH / 16)).sum() < 60
    own_P = np.frombuffer(keystream(cedar._own_seed, 4 * LENGTH), "<u4")
    found_P = them.round.fixed_point.decode(opened_P - own_P, 1)
    assert np.abs(found_P - them.inputs["cedar"]).max() <= them.round.fixed_point.quantum


def test_a_client_answers_once():
    """A second answer, which could reveal the other secret of the same client, is refused."""
    them = meeting()
    them.run()

    with pytest.raises(ProtocolError, match="unmask an input"):
        them.clients["elm"].reveal(NAMES[:4])


def test_a_client_does_not_go_on_with_too_few():
    """A client told of three survivors of five reveals nothing."""
    them = meeting()
    them.keys = {name: client.advertise() for name, client in them.clients.items()}
    them.sealed = {name: client.share(them.keys) for name, client in them.clients.items()}
    sealed_for = deliver(them.sealed)
    them.clients["elm"].mask(sealed_for["elm"], them.inputs["elm"])

    with pytest.raises(Refused, match="nothing is summed"):
        them.clients["elm"].reveal(["alder", "birch", "elm"])


def test_altered_messages_are_named():
    """A sealed share, a revealed share or a masked input that was changed is refused by name."""
    them = meeting()
    them.keys = {name: client.advertise() for name, client in them.clients.items()}
    them.sealed = {name: client.share(them.keys) for name, client in them.clients.items()}
    sealed_for = deliver(them.sealed)
    broken = {**sealed_for["elm"], "birch": bytes(len(sealed_for["elm"]["birch"]))}
    with pytest.raises(ProtocolError, match="client 'birch' sealed for 'elm' cannot be opened"):
        them.clients["elm"].mask(broken, them.inputs["elm"])

    them = meeting()
    them.run()
    them.revealed["birch"] = {**them.revealed["birch"], "alder": bytes(SHARE_BYTES)}
    with pytest.raises(ProtocolError, match="revealed for client 'alder' do not give its secret"):
        them.total()

    them.masked["cedar"] = {"masked": them.masked["cedar"]["masked"][:-1]}
    with pytest.raises(ProtocolError, match="masked input of client 'cedar' is malformed"):
        them.total()


def test_keys_told_differently_are_noticed():
    """Two clients that an aggregator told different keys cannot open each other's shares."""
    them = meeting(3)
    stranger = Client(them.round, "cedar")
    keys = {name: client.advertise() for name, client in them.clients.items()}
    others = {**keys, "cedar": stranger.advertise()}
    sealed_by_alder = them.clients["alder"].share(keys)
    them.clients["birch"].share(others)

    with pytest.raises(ProtocolError, match="given different keys"):
        them.clients["birch"].mask({"alder": sealed_by_alder["birch"]}, them.inputs["birch"])


def test_a_key_used_twice_is_refused():
    """An aggregator cannot answer for a client by handing out another's keys as its own."""
    them = meeting(3)
    keys = {name: client.advertise() for name, client in them.clients.items()}

    with pytest.raises(ProtocolError, match="two clients advertised one key"):
        them.clients["alder"].share({**keys, "cedar": keys["birch"]})


def test_what_is_beyond_the_clip_is_cut_off():
    """A value beyond the clip counts as the clip, and the share of such values is told."""
    them = meeting(2, clip=0.5)
    them.inputs["alder"][:250] = 3.0

    found_P = them.run()

    expected_P = np.clip(them.inputs["alder"], -0.5, 0.5) + them.inputs["birch"]
    assert np.abs(found_P - expected_P).max() <= 2 * them.round.fixed_point.quantum
    assert them.round.fixed_point.clipped_share(them.inputs["alder"]) == 0.25


def test_bad_inputs_are_refused_before_anything_is_sent():
    """NaN, another length, an overflow and senseless settings each get their sentence."""
    them = meeting(2)
    with pytest.raises(NotFinite, match="would spoil everybody's"):
        them.round.fixed_point.encode(np.array([1.0, np.nan]))
    with pytest.raises(DataError, match="an input of 3 numbers"):
        them.clients["alder"].mask({}, np.zeros(3))
    with pytest.raises(ConfigError, match="does not fit 32 bits"):
        Round("r", NAMES, 1, FixedPoint(1.0, levels=1 << 30))
    with pytest.raises(ConfigError, match=r"clip=-1.0 .*; bits=16"):
        FixedPoint(-1.0, bits=16)


def test_any_threshold_of_the_shares_give_the_secret_and_fewer_do_not():
    """Each set of three out of five shares gives the secret; two are refused."""
    secret = b"\xff" * 32  # the largest, so that a field of less than 2**256 would lose it
    shares = dict(enumerate(split(secret, threshold=3, count=5), start=1))

    for chosen in ((1, 2, 3), (1, 3, 5), (3, 4, 5), (1, 2, 3, 4, 5)):
        assert join({point: shares[point] for point in chosen}, threshold=3) == secret
    with pytest.raises(Refused, match="2 shares of a secret where 3"):
        join({1: shares[1], 2: shares[2]}, threshold=3)
    with pytest.raises(ProtocolError, match="malformed"):
        join({**shares, 2: b"\xff" * SHARE_BYTES}, threshold=3)
    assert sympy.isprime(PRIME)


def test_an_adapter_comes_back_as_it_was():
    """Flattened and unflattened, names, shapes and dtypes are the adapter's."""
    adapter = {
        "b": torch.randn(2, 3),
        "a": torch.randn(4, dtype=torch.float64),
        "c": torch.randn(3).bfloat16(),
    }

    found = unflatten(flatten(adapter), adapter)

    torch.testing.assert_close(found, adapter, rtol=0, atol=0)
    with pytest.raises(DataError, match="12 numbers for an adapter that has 13"):
        unflatten(np.zeros(12), adapter)
