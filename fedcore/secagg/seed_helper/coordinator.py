"""The coordinator's side of a round with a seed helper.

    collect > AwaitingInputs > AwaitingMaskSum > Outcome

    sum x_i = sum y_i - sum PRG(s_i)      over the survivors

A client counts once both halves of its upload are safe: the helper has its box and
the total its vector. Whoever drops out before that is simply not among the survivors;
no other client is asked for anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedcore.errors import PeerProtocolError, RoundAbortedError
from fedcore.ring import Ring
from fedcore.secagg.seed_helper.messages import CloseRequest, MaskSum
from fedcore.secagg.seed_helper.plan import HelperPlan
from fedcore.secagg.server import Outcome
from fedcore.vectors import RingVector


@dataclass(frozen=True, slots=True)
class AwaitingMaskSum:
    """The survivors are fixed; the helper is adding up their masks."""

    plan: HelperPlan
    survivors: frozenset[int]
    total: RingVector = field(repr=False)

    def on_mask_sum(self, message: MaskSum) -> Outcome:
        """Unmask the sum.

        Raises:
            PeerProtocolError: The masks are of another round.
        """
        if message.digest != self.plan.digest():
            msg = "expected the masks of this round, found another round's"
            raise PeerProtocolError(msg)
        return Outcome(unmask(self.total, message.vector, self.plan.ring), self.survivors)


@dataclass(frozen=True, slots=True)
class AwaitingInputs:
    """Masked inputs are added up as they come."""

    plan: HelperPlan
    total: RingVector = field(repr=False)
    survivors: frozenset[int] = frozenset()

    def check(self, client: int) -> None:
        """Refuse who was not asked or has answered, before its box is forwarded.

        Raises:
            PeerProtocolError: Not invited, or a second upload.
        """
        if not 0 <= client < self.plan.clients:
            msg = f"client {client} was not invited; its upload is dropped"
            raise PeerProtocolError(msg)
        if client in self.survivors:
            msg = f"client {client} has already answered; its second upload is dropped"
            raise PeerProtocolError(msg)

    def on_input(self, client: int, vector: RingVector) -> AwaitingInputs:
        """Add one masked input whose box the helper has accepted.

        Raises:
            PeerProtocolError: Not invited, a second upload, or of the wrong length.
        """
        self.check(client)
        if vector.shape != (self.plan.dim,) or vector.dtype != self.total.dtype:
            msg = f"client {client} must send {self.plan.dim} elements, found {vector.shape}"
            raise PeerProtocolError(msg)
        return replace(self, total=self.total + vector, survivors=self.survivors | {client})

    def close(self) -> tuple[AwaitingMaskSum, CloseRequest]:
        """Fix the survivors and ask for the sum of their masks.

        Raises:
            RoundAbortedError: Too few survivors.
        """
        needed, found = self.plan.minimum_survivors, len(self.survivors)
        if found < needed:
            raise RoundAbortedError(stage="uploading", needed=needed, found=found)
        request = CloseRequest(self.plan.digest(), self.survivors)
        return AwaitingMaskSum(self.plan, self.survivors, self.total), request


def collect(plan: HelperPlan) -> AwaitingInputs:
    """Start a round at the coordinator."""
    return AwaitingInputs(plan, plan.ring.zeros(plan.dim))


def unmask(total: RingVector, mask_sum: RingVector, ring: Ring) -> RingVector:
    """Return `total` minus `mask_sum`, reduced: the exact sum of the inputs, shape [dim]."""
    return ring.reduce(total - mask_sum)
