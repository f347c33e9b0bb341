"""The helper's side of a round: seeds in, one sum of masks out.

    open_round > AwaitingBoxes > Closed > MaskSum

The helper never sees an input, masked or not. What it must not do is answer twice:
the sums over two sets of clients differ by the masks of the clients in one of them,
and so unmask a single one. A state is a value and cannot remember that; whoever keeps
it claims the round's digest, durably, before the answer leaves.

A coordinator that could invent clients would choose all seeds but one. So a helper
that pins an authority admits signed boxes only, one per enrolled device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedcore.crypto import KeyPair, Mask, add_masks
from fedcore.errors import PeerProtocolError, RoundAbortedError
from fedcore.secagg.seed_helper.messages import MaskSum, SeedBox
from fedcore.secagg.seed_helper.plan import HelperPlan
from fedcore.secagg.seed_helper.sealing import unseal_seed


@dataclass(frozen=True, slots=True)
class Closed:
    """The survivors are fixed, and the seeds of all others forgotten."""

    plan: HelperPlan
    seeds: Mapping[int, bytes] = field(repr=False)

    def mask_sum(self) -> MaskSum:
        """Return the sum of the survivors' masks, added block by block: one vector [dim]."""
        masks = [Mask(self.seeds[client]) for client in sorted(self.seeds)]
        vector = add_masks(self.plan.ring.zeros(self.plan.dim), masks, self.plan.ring)
        return MaskSum(self.plan.digest(), vector)


@dataclass(frozen=True, slots=True)
class AwaitingBoxes:
    """The round is open.

    Attributes:
        plan: The public parameters.
        secret: The helper's X25519 secret, 32 bytes.
        authority: Public key of the root that enrols devices; None admits any box.
        seeds: Of the clients whose box arrived.
        names: Of the enrolled devices among them.
    """

    plan: HelperPlan
    secret: bytes = field(repr=False)
    authority: bytes | None = None
    seeds: Mapping[int, bytes] = field(repr=False, default_factory=dict)
    names: frozenset[str] = frozenset()

    def on_box(self, box: SeedBox, now: int) -> AwaitingBoxes:
        """Open one client's box and keep the seed.

        Args:
            box: Untrusted.
            now: Unix time in seconds, for the certificate.

        Raises:
            PeerProtocolError: Not invited, a second box, not from an enrolled device, or
                made for another round, client or helper.
        """
        client = box.client
        if not 0 <= client < self.plan.clients:
            msg = f"a client's index must be below {self.plan.clients}, found {client}"
            raise PeerProtocolError(msg)
        if client in self.seeds:
            msg = f"client {client} has already sent a box; its second one is dropped"
            raise PeerProtocolError(msg)
        names = self.names if self.authority is None else self._admit(box, self.authority, now)
        seed = unseal_seed(box.sealed, self.plan.digest(), client, self.secret)
        return replace(self, seeds={**self.seeds, client: seed}, names=names)

    def close(self, survivors: frozenset[int]) -> Closed:
        """Fix whose masks are added up.

        Raises:
            RoundAbortedError: Fewer survivors than the plan's minimum.
            PeerProtocolError: A survivor has sent no box.
        """
        needed = self.plan.minimum_survivors
        if len(survivors) < needed:
            raise RoundAbortedError(stage="closing", needed=needed, found=len(survivors))
        strangers = survivors - self.seeds.keys()
        if strangers:
            msg = (
                f"survivors must be among the {len(self.seeds)} clients whose box arrived, "
                f"found also {sorted(strangers)[:8]}"
            )
            raise PeerProtocolError(msg)
        return Closed(self.plan, {client: self.seeds[client] for client in survivors})

    def _admit(self, box: SeedBox, authority: bytes, now: int) -> frozenset[str]:
        """Return the names with that of the box's sender."""
        if box.voucher is None:
            msg = f"this helper admits enrolled devices only; the box of {box.client} is unsigned"
            raise PeerProtocolError(msg)
        digest = self.plan.digest()
        box.voucher.check(digest, box.client, box.sealed, authority=authority, now=now)
        name = box.voucher.certificate.name
        if name in self.names:
            msg = f"device {name} already takes part under another index; one box per device"
            raise PeerProtocolError(msg)
        return self.names | {name}


def open_round(plan: HelperPlan, key: KeyPair, authority: bytes | None = None) -> AwaitingBoxes:
    """Start a round of `plan` at the helper that owns `key`.

    Raises:
        PeerProtocolError: The plan is for another helper.
    """
    if plan.helper_key != key.public:
        msg = (
            f"this helper's key is {key.public.hex()[:12]}..., the plan names "
            f"{plan.helper_key.hex()[:12]}...: correct the coordinator's helper key"
        )
        raise PeerProtocolError(msg)
    return AwaitingBoxes(plan, key.secret, authority)
