"""The rounds that a seed helper has open, and those it has answered.

`fedcore.secagg.seed_helper` says what a helper answers; this adapter says how often.
A round belongs to the peer that opened it, is answered once, and is claimed in the
`AnsweredRounds` before a single mask is added up: a helper that crashes in between
has answered nothing, and never will for that round.

What arrives is bytes. `PeerProtocolError` means a client's box is bad and the round
goes on without it; `RefusedRoundError` means the helper refuses the round itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Protocol

from fedcore.crypto import KeyPair
from fedcore.errors import ConfigurationError, PeerProtocolError, RoundAbortedError
from fedcore.secagg.seed_helper import (
    AwaitingBoxes,
    Closed,
    CloseRequest,
    HelperPlan,
    SeedBox,
    open_round,
)


class RefusedRoundError(PeerProtocolError):
    """The coordinator asked for a round, or an answer, that this helper does not give."""


class AnsweredRounds(Protocol):
    """Remembers every round that was answered, for as long as the helper's key lives."""

    def __contains__(self, digest: bytes, /) -> bool:
        """Whether the round was answered."""
        ...

    def claim(self, digest: bytes, /) -> None:
        """Record durably that the round is being answered.

        Raises:
            RefusedRoundError: It was claimed before, by this process or another.
        """
        ...


@dataclass(slots=True)
class AnsweredInMemory:
    """For simulations: forgets with the process."""

    digests: set[bytes] = field(default_factory=set)

    def __contains__(self, digest: bytes, /) -> bool:
        """Whether the round was answered."""
        return digest in self.digests

    def claim(self, digest: bytes, /) -> None:
        """Record the round.

        Raises:
            RefusedRoundError: It was claimed before.
        """
        if digest in self.digests:
            raise _answered(digest)
        self.digests.add(digest)


@dataclass(frozen=True, slots=True)
class AnsweredFolder:
    """One empty file per answered round, named by its digest.

    A file is created exclusively, which the file system does atomically, and it and its
    folder are synced before the claim counts. Two helpers that share the folder cannot
    both answer a round.
    """

    folder: Path

    def __contains__(self, digest: bytes, /) -> bool:
        """Whether the round was answered."""
        return (self.folder / digest.hex()).exists()

    def claim(self, digest: bytes, /) -> None:
        """Record the round on disk.

        Raises:
            RefusedRoundError: It was claimed before, or the disk does not take it.
        """
        try:
            with (self.folder / digest.hex()).open("xb") as file:
                os.fsync(file.fileno())
            _sync_folder(self.folder)
        except FileExistsError:
            raise _answered(digest) from None
        except OSError as error:
            msg = f"this helper cannot record that it answers a round: {error.strerror}"
            raise RefusedRoundError(msg) from error


@dataclass(frozen=True, slots=True)
class HelperLimits:
    """What a helper accepts of any coordinator.

    Attributes:
        rounds: Open at a time.
        clients: Of one round.
        dim: Of one round; an answer takes a few vectors of it in memory.
        minimum_survivors: Plans that would reveal sums over fewer are refused.
        seconds: After which an open round is forgotten.
    """

    rounds: int = 16
    clients: int = 10_000
    dim: int = 1 << 28
    minimum_survivors: int = 2
    seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rounds", self.rounds, 1),
            ("clients", self.clients, 2),
            ("dim", self.dim, 1),
            ("minimum_survivors", self.minimum_survivors, 2),
            ("seconds", self.seconds, 1),
        ):
            if not least <= value < 1 << 40:
                msg = f"helper.limits.{name} must be in [{least}, 2^40), got {value}: raise it"
                raise ConfigurationError(msg)


@dataclass(slots=True)
class _OpenRound:
    state: AwaitingBoxes = field(repr=False)
    owner: str
    opened_at: float


class HelperRounds:
    """All rounds of one helper; safe to call from many threads.

    Args:
        key: The helper's X25519 pair, whose public half the devices pin.
        answered: Survives the process in a deployment.
        limits: What to accept.
        authority: Public key of the root that enrols devices; None admits any box.
        now: Unix time in seconds.
    """

    def __init__(
        self,
        key: KeyPair,
        answered: AnsweredRounds,
        limits: HelperLimits | None = None,
        *,
        authority: bytes | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.public_key = key.public
        self._key = key
        self._answered = answered
        self._limits = limits or HelperLimits()
        self._authority = authority
        self._now = now
        self._rounds: dict[bytes, _OpenRound] = {}
        self._lock = Lock()

    @property
    def open_rounds(self) -> int:
        """How many rounds are waiting for boxes."""
        with self._lock:
            self._forget_expired()
            return len(self._rounds)

    def open(self, plan: bytes, owner: str) -> None:
        """Open a round for `owner`; opening it again changes nothing.

        Raises:
            RefusedRoundError: Malformed, answered before, or beyond a limit.
        """
        with self._lock:
            self._forget_expired()
            state = self._accept(plan)
            digest = state.plan.digest()
            if digest in self._answered:
                raise _answered(digest)
            known = self._rounds.get(digest)
            if known is not None and known.owner == owner:
                return
            if known is not None or len(self._rounds) >= self._limits.rounds:
                msg = (
                    f"this helper holds {len(self._rounds)} of at most {self._limits.rounds} open "
                    "rounds, or somebody else's round of this plan: start another attempt later"
                )
                raise RefusedRoundError(msg)
            self._rounds[digest] = _OpenRound(state, owner, self._now())

    def deposit(self, digest: bytes, box: bytes, owner: str) -> None:
        """Take one client's box.

        Raises:
            RefusedRoundError: The round is not open, or not `owner`'s.
            PeerProtocolError: The box is bad: leave that client out.
        """
        parsed = SeedBox.from_bytes(box)
        with self._lock:
            self._forget_expired()
            entry = self._find(digest, owner)
            entry.state = entry.state.on_box(parsed, int(self._now()))

    def close(self, request: CloseRequest, owner: str) -> Closed:
        """Claim the round, forget it, and return what adds up its masks.

        A refused request leaves the round open: nothing was answered.

        Raises:
            RefusedRoundError: Not open, not `owner`'s, answered before, too few
                survivors, or one whose box is missing.
        """
        with self._lock:
            self._forget_expired()
            entry = self._find(request.digest, owner)
            try:
                closed = entry.state.close(request.survivors)
            except (PeerProtocolError, RoundAbortedError) as error:
                raise RefusedRoundError(str(error)) from error
            del self._rounds[request.digest]
            self._answered.claim(request.digest)
            return closed

    def _accept(self, data: bytes) -> AwaitingBoxes:
        """Return the state that opens the plan in `data`."""
        try:
            plan = HelperPlan.from_bytes(data)
            state = open_round(plan, self._key, self._authority)
        except (ConfigurationError, PeerProtocolError) as error:
            raise RefusedRoundError(str(error)) from error
        limits = self._limits
        for name, found, low, high in (
            ("clients", plan.clients, 2, limits.clients),
            ("dim", plan.dim, 1, limits.dim),
            ("minimum_survivors", plan.minimum_survivors, limits.minimum_survivors, plan.clients),
        ):
            if not low <= found <= high:
                msg = f"this helper takes plans with {name} in {low}..{high}, found {found}"
                raise RefusedRoundError(msg)
        return state

    def _find(self, digest: bytes, owner: str) -> _OpenRound:
        if digest in self._answered:
            raise _answered(digest)
        entry = self._rounds.get(digest)
        if entry is None or entry.owner != owner:
            msg = (
                f"round {digest.hex()[:12]} is not open, or was opened by somebody else, or has "
                f"expired after {self._limits.seconds:g} s: start a new attempt"
            )
            raise RefusedRoundError(msg)
        return entry

    def _forget_expired(self) -> None:
        oldest = self._now() - self._limits.seconds
        for digest in [d for d, entry in self._rounds.items() if entry.opened_at < oldest]:
            del self._rounds[digest]


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _answered(digest: bytes) -> RefusedRoundError:
    return RefusedRoundError(
        f"round {digest.hex()[:12]} was answered before, and a second answer could unmask a "
        "client: start a new attempt"
    )
