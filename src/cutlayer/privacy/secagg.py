"""Secure aggregation (defense D5): the sum of several clients' adapters, and nothing of any one.

Four rounds after Bonawitz et al. Each message is a plain dict of bytes; nothing here sends one.

    client                          aggregator
    advertise()      -> keys        hands everybody's keys to everybody
    share(keys)      -> sealed      hands each client what was sealed for it (`deliver`)
    mask(sealed, x)  -> masked      goes on with those whose masked input came
    reveal(there)    -> shares      total(...) -> the sum of the inputs that came

An input is clipped, written in fixed point and masked twice: by one mask for every pair of
clients, which cancel in the sum, and by one of the client's own. For a client whose input came the
others reveal its own mask; for one that dropped out, its pair masks; never both for one client.

What it promises, and against whom: an aggregator that keeps to the protocol, together with fewer
than `threshold` clients, learns the sum of the inputs that came and which clients those were. An
aggregator that makes up clients of its own can answer for them: the clients must know each
other's keys to be genuine. The sum itself is not private: of two clients each can subtract its
own input. For a guarantee about the sum, add noise on every client first.

References:
    Bonawitz et al., 2017, Practical secure aggregation, https://doi.org/10.1145/3133956.3133982
"""

# Shapes:  P parameters of the input

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cutlayer.errors import ConfigError, DataError, ProtocolError, Refused
from cutlayer.privacy.fixed_point import FixedPoint
from cutlayer.privacy.masks import (
    KEY_BYTES,
    SHARE_BYTES,
    agreed,
    derived,
    framed,
    join,
    keystream,
    new_secret,
    public,
    split,
)

__all__ = ["Client", "Round", "deliver", "total"]

_TAG_BYTES = 16
_KEYS = ("seal_key", "pair_key", "seed_digest")
_STEPS = ("advertise", "share", "mask", "reveal")

Message = dict[str, bytes]


@dataclass(frozen=True)
class Round:
    """What all who take part know beforehand."""

    name: str
    """A name that is used once; keys of one round mean nothing in another."""
    members: tuple[str, ...]
    """The clients' names, in the order of their shares."""
    length: int
    """How many numbers an input has."""
    fixed_point: FixedPoint

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: Naming all that is wrong.
        """
        faults = []
        clients = len(self.members)
        if clients < 2:
            faults.append(
                f"{clients} client(s): the sum of one input is that input, so there is nothing to "
                "hide it among; at least 2 are needed, better 5"
            )
        if len(set(self.members)) != clients or not all(self.members):
            faults.append(f"members {list(self.members)}: every name must be there once")
        if clients * (self.fixed_point.levels - 1) >= 1 << self.fixed_point.bits:
            faults.append(
                f"the sum of {clients} clients at {self.fixed_point.levels} levels does not fit "
                f"{self.fixed_point.bits} bits: choose fewer levels, or 64 bits"
            )
        if self.length < 1:
            faults.append(f"length={self.length} must be at least 1")
        if faults:
            raise ConfigError("; ".join(faults))

    @property
    def threshold(self) -> int:
        """How many clients must answer in every round: two thirds, rounded up.

        With more than half, no two disjoint groups can be asked for the two secrets of a client.
        """
        return -(-2 * len(self.members) // 3)

    def index(self, name: str) -> int:
        """Return at which point a client's shares lie, counted from 1."""
        return self.members.index(name) + 1

    def check_enough(self, names: Iterable[str], what: str) -> tuple[str, ...]:
        """Return the names in the round's order.

        Raises:
            ProtocolError: If one of them takes no part.
            Refused: If they are fewer than the threshold.
        """
        given = set(names)
        if given - set(self.members):
            raise ProtocolError(
                f"'{min(given - set(self.members))}' takes no part in round '{self.name}': check "
                "the aggregator"
            )
        if len(given) < self.threshold:
            raise Refused(
                f"{len(given)} of {len(self.members)} clients {what} and {self.threshold} are "
                "needed: nothing is summed; start the round again"
            )
        return tuple(name for name in self.members if name in given)


# ---------------------------------------------------------------------------- the client


@dataclass
class Client:
    """One client's part in one round: each of the four calls is made once, in order."""

    round: Round
    name: str
    _done: list[str] = field(default_factory=list, repr=False)
    _seal_key: bytes = field(default_factory=new_secret, repr=False)
    _pair_key: bytes = field(default_factory=new_secret, repr=False)
    _own_seed: bytes = field(default_factory=new_secret, repr=False)
    _keys: dict[str, Message] = field(default_factory=dict, repr=False)
    _context: bytes = field(default=b"", repr=False)
    _mine: tuple[bytes, bytes] = field(default=(b"", b""), repr=False)
    _shares: dict[str, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check that the client takes part.

        Raises:
            ConfigError: If it does not.
        """
        if self.name not in self.round.members:
            raise ConfigError(f"client '{self.name}' is none of {', '.join(self.round.members)}")

    def _begin(self, step: str) -> None:
        expected = (*_STEPS, "nothing")[len(self._done)]
        if step != expected:
            raise ProtocolError(
                f"client '{self.name}' was asked to {step} in round '{self.round.name}' where "
                f"{expected} comes next: an answer given twice would unmask an input"
            )
        self._done.append(step)

    def advertise(self) -> Message:
        """Return the client's public keys, and a digest by which its own seed is known again.

        Raises:
            ProtocolError: If it is not the first call.
        """
        self._begin("advertise")
        return {
            "seal_key": public(self._seal_key),
            "pair_key": public(self._pair_key),
            "seed_digest": hashlib.sha256(self._own_seed).digest(),
        }

    def share(self, keys: Mapping[str, Message]) -> Message:
        """Return, for every other client, a share of both secrets that only it can open.

        Args:
            keys: By name what each client advertised.

        Raises:
            ProtocolError: If keys are malformed, used twice, or our own are not among them.
            Refused: If fewer than the threshold advertised.
        """
        self._begin("share")
        names = self.round.check_enough(keys, "sent keys")
        self._keys = {name: _checked_keys(name, keys[name]) for name in names}
        mine = self._keys.get(self.name, {}).get("pair_key", b"")
        if not hmac.compare_digest(mine, public(self._pair_key)):
            raise ProtocolError(f"the keys of client '{self.name}' are not those it advertised")
        for field_name in ("seal_key", "pair_key"):
            if len({message[field_name] for message in self._keys.values()}) != len(names):
                raise ProtocolError("two clients advertised one key: check the aggregator")
        self._context = _context(self.round, self._keys)
        clients, threshold = len(self.round.members), self.round.threshold
        seeds = split(self._own_seed, threshold=threshold, count=clients)
        pairs = split(self._pair_key, threshold=threshold, count=clients)
        at = {name: self.round.index(name) - 1 for name in names}
        self._mine = (seeds[at[self.name]], pairs[at[self.name]])
        return {
            name: self._sealer(name, sender=self.name, recipient=name).encrypt(
                bytes(12), seeds[at[name]] + pairs[at[name]], self._context
            )
            for name in names
            if name != self.name
        }

    def _sealer(self, other: str, *, sender: str, recipient: str) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        shared = agreed(self._seal_key, self._keys[other]["seal_key"])
        # A key for each direction, used for one message: the nonce may be the same.
        return ChaCha20Poly1305(derived(shared, self._context, "seal", sender, recipient))

    def mask(self, sealed: Mapping[str, bytes], vector_P: np.ndarray) -> Message:
        """Return this client's input, masked.

        Args:
            sealed: By sender what was sealed for this client; who sent nothing has dropped out.
            vector_P: The input.

        Raises:
            DataError: If the input has another length than the round's.
            NotFinite: If a value is NaN or infinite.
            ProtocolError: If a sealed message cannot be opened.
            Refused: If fewer than the threshold have shared.
        """
        if len(vector_P) != self.round.length:
            raise DataError(
                f"an input of {len(vector_P)} numbers where round '{self.round.name}' sums "
                f"{self.round.length}: the clients' adapters must have one shape"
            )
        total_P = self.round.fixed_point.encode(vector_P)
        self._begin("mask")
        names = self.round.check_enough({*sealed, self.name}, "shared their secrets")
        self._shares = {self.name: self._mine}
        for name in names:
            if name != self.name:
                opened = self._open(name, sealed[name])
                self._shares[name] = (opened[:SHARE_BYTES], opened[SHARE_BYTES:])
        total_P = total_P + _words(self.round, self._own_seed)
        for name in names:
            if name != self.name:
                key = _pair_seed(self._pair_key, self._keys, self._context, self.name, name)
                total_P = _with_pair(total_P, self.round, key, self.name, name)
        return {"masked": total_P.astype(self.round.fixed_point.dtype).tobytes()}

    def _open(self, sender: str, message: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        fault = (
            f"what client '{sender}' sealed for '{self.name}' cannot be opened: it was changed on "
            "the way, or the two were given different keys"
        )
        if sender not in self._keys or len(message) != 2 * SHARE_BYTES + _TAG_BYTES:
            raise ProtocolError(fault)
        sealer = self._sealer(sender, sender=sender, recipient=self.name)
        try:
            opened: bytes = sealer.decrypt(bytes(12), message, self._context)
        except InvalidTag as error:
            raise ProtocolError(fault) from error
        return opened

    def reveal(self, there: Sequence[str]) -> Message:
        """Return a share for every client: of its seed if its input came, else of its pair key.

        Args:
            there: The clients whose masked input came.

        Raises:
            ProtocolError: If it is asked twice, or one is named whose shares this client lacks.
            Refused: If they are fewer than the threshold.
        """
        self._begin("reveal")
        came = self.round.check_enough(there, "sent a masked input")
        if set(came) - set(self._shares) or self.name not in came:
            raise ProtocolError(
                f"client '{self.name}' is told of inputs from {list(came)} and shared secrets with "
                f"{list(self._shares)}: check the aggregator"
            )
        return {name: seed if name in came else pair for name, (seed, pair) in self._shares.items()}


# ---------------------------------------------------------------------------- the aggregator


def deliver(sealed: Mapping[str, Message]) -> dict[str, Message]:
    """Return, by recipient and sender, what is given by sender and recipient.

    Those who sealed nothing have dropped out and get nothing.
    """
    return {
        recipient: {s: message[recipient] for s, message in sealed.items() if recipient in message}
        for recipient in sealed
    }


def total(
    round_: Round,
    keys: Mapping[str, Message],
    sharers: Sequence[str],
    masked: Mapping[str, Message],
    revealed: Mapping[str, Message],
) -> np.ndarray:
    """Return the sum of the inputs that came, (P,).

    Args:
        round_: The round.
        keys: By name what each client advertised.
        sharers: The clients that sealed shares.
        masked: By name the masked inputs that came.
        revealed: By name what each client revealed.

    Raises:
        ProtocolError: If a message is malformed, or shares do not give the secret back.
        Refused: If fewer than the threshold revealed shares.
    """
    came = round_.check_enough(masked, "sent a masked input")
    shared = round_.check_enough(sharers, "shared their secrets")
    round_.check_enough(set(keys) & set(shared), "sent keys")
    answered = round_.check_enough(revealed, "revealed their shares")
    checked = {name: _checked_keys(name, message) for name, message in keys.items()}
    context = _context(round_, {name: checked[name] for name in round_.members if name in checked})
    dtype = round_.fixed_point.dtype
    sum_P = np.zeros(round_.length, dtype=dtype)
    for name in came:
        body = masked[name].get("masked", b"")
        if name not in shared or len(body) != round_.length * dtype.itemsize:
            raise ProtocolError(f"the masked input of client '{name}' is malformed: start again")
        sum_P = sum_P + np.frombuffer(body, dtype=dtype)
    for name in shared:
        points = {round_.index(n): revealed[n][name] for n in answered if name in revealed[n]}
        secret = join(points, threshold=round_.threshold)
        if name in came:
            _check(name, hashlib.sha256(secret).digest(), checked[name]["seed_digest"])
            sum_P = sum_P - _words(round_, secret)
            continue
        _check(name, public(secret), checked[name]["pair_key"])
        for other in came:
            # What `other` added for this pair is what the one that dropped out would have undone.
            key = _pair_seed(secret, checked, context, name, other)
            sum_P = _with_pair(sum_P, round_, key, name, other)
    return round_.fixed_point.decode(sum_P, len(came))


def _check(name: str, found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise ProtocolError(
            f"the shares revealed for client '{name}' do not give its secret back: a client "
            "revealed a wrong one; start the round again"
        )


# ---------------------------------------------------------------------------- for both sides


def _words(round_: Round, key: bytes) -> np.ndarray:
    dtype = round_.fixed_point.dtype
    return np.frombuffer(keystream(key, round_.length * dtype.itemsize), dtype=dtype)


def _with_pair(sum_P: np.ndarray, round_: Round, key: bytes, mine: str, other: str) -> np.ndarray:
    words_P = _words(round_, key)
    return sum_P + words_P if round_.index(mine) < round_.index(other) else sum_P - words_P


def _pair_seed(
    secret: bytes, keys: Mapping[str, Message], context: bytes, mine: str, other: str
) -> bytes:
    shared = agreed(secret, keys[other]["pair_key"])
    return derived(shared, context, "mask", *sorted((mine, other)))


def _context(round_: Round, keys: Mapping[str, Message]) -> bytes:
    """Return a digest of all that the clients must have been told alike."""
    told = [round_.name, *round_.members, str(round_.length), repr(round_.fixed_point)]
    parts = [part.encode() for part in told]
    for name, message in keys.items():
        parts += [name.encode(), *(message[key] for key in _KEYS)]
    return hashlib.sha256(b"".join(map(framed, parts))).digest()


def _checked_keys(name: str, message: Message) -> Message:
    if set(message) != set(_KEYS) or any(len(part) != KEY_BYTES for part in message.values()):
        raise ProtocolError(f"the keys of client '{name}' are malformed: check its version")
    return dict(message)
