"""The client's side of a round with a seed helper: one function, one upload.

    y = x + PRG(s) mod 2^b       to the coordinator
    s                            sealed to the helper

The coordinator alone sees uniform vectors, the helper alone sees random seeds; both
together see every input. That is the price of speaking once: the two must be run by
parties that do not collude. [HNM+21] has an enclave in the helper's place,
Prio [CB17] two servers with symmetric roles.

[HNM+21] https://arxiv.org/abs/2111.04877
[CB17]   https://arxiv.org/abs/1703.06255
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedcore.crypto import SEED_BYTES, Entropy, Mask, add_masks
from fedcore.errors import LocalProtocolError, PeerProtocolError
from fedcore.secagg.identity import Identity
from fedcore.secagg.seed_helper.messages import SeedBox, Voucher
from fedcore.secagg.seed_helper.plan import HelperPlan
from fedcore.secagg.seed_helper.sealing import seal_seed
from fedcore.vectors import RingVector


@dataclass(frozen=True, slots=True)
class SealedInput:
    """All that a client sends in a round.

    Attributes:
        vector: The masked input, shape [plan.dim]: uniform to everybody but the helper.
        box: The seed of the mask: readable by the helper only.
    """

    vector: RingVector = field(repr=False)
    box: SeedBox


def mask_and_seal(
    vector: RingVector,
    plan: HelperPlan,
    client: int,
    *,
    pinned_key: bytes,
    entropy: Entropy,
    identity: Identity | None = None,
) -> SealedInput:
    """Mask one input under a fresh seed, and seal the seed to the helper.

    A device calls this once per plan; who must send again sends the same bytes.

    Args:
        vector: Shape [plan.dim], elements of the plan's ring.
        plan: As received from the coordinator.
        client: Our index in the plan.
        pinned_key: The helper's public key as this device knows it, 32 bytes. Never
            take it from the plan: the coordinator wrote that.
        entropy: Of this client and attempt.
        identity: Signs the box, for a helper that admits enrolled devices only.

    Raises:
        PeerProtocolError: The plan names another helper, or has no such client.
        LocalProtocolError: `vector` does not fit the plan.
        ConfigurationError: `pinned_key` is no valid public key.
    """
    if plan.helper_key != pinned_key:
        msg = (
            f"expected the helper that this device pins, {pinned_key.hex()[:12]}..., found "
            f"{plan.helper_key.hex()[:12]}...: this device does not take part"
        )
        raise PeerProtocolError(msg)
    if not 0 <= client < plan.clients:
        msg = f"our index must be in 0..{plan.clients - 1}, found {client}"
        raise PeerProtocolError(msg)
    if vector.shape != (plan.dim,):
        msg = f"expected an input of shape ({plan.dim},), found {vector.shape}"
        raise LocalProtocolError(msg)
    digest = plan.digest()
    seed = entropy.draw("helper-seed", SEED_BYTES)
    sealed = seal_seed(seed, digest, client, pinned_key)
    voucher = None if identity is None else Voucher.make(identity, digest, client, sealed)
    masked = add_masks(vector, [Mask(seed)], plan.ring)
    return SealedInput(masked, SeedBox(client, sealed, voucher))
