"""A whole round with a seed helper in memory: three parties, no network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from fedcore.crypto import Entropy, KeyPair, SystemEntropy
from fedcore.errors import ConfigurationError
from fedcore.ring import pack, unpack
from fedcore.secagg.loopback import RoundResult
from fedcore.secagg.seed_helper.coordinator import collect
from fedcore.secagg.seed_helper.device import mask_and_seal
from fedcore.secagg.seed_helper.helper import open_round
from fedcore.secagg.seed_helper.messages import CloseRequest, MaskSum, SeedBox
from fedcore.secagg.seed_helper.plan import HelperPlan
from fedcore.vectors import RingVector


def run_helper_round(
    inputs: Mapping[int, RingVector],
    plan: HelperPlan,
    drops: Collection[int] = (),
    *,
    entropy: Entropy | None = None,
    helper: KeyPair | None = None,
) -> RoundResult:
    """Run one round with a seed helper in memory.

    Args:
        inputs: Vector of each client, shape [plan.dim], elements of the plan's ring.
            There are `plan.clients` of them; any integers may name them.
        plan: The public parameters.
        drops: Who disappears before its upload, the only message a client sends.
        entropy: The operating system's if None.
        helper: The key of the plan's helper; if None, one is made for this round and
            its public half takes the place of `plan.helper_key`.

    Raises:
        ConfigurationError: `inputs` or `drops` do not fit the plan.
        RoundAbortedError: Too few clients are left.
        PeerProtocolError: `helper` is not the plan's.

    Example:
        >>> import numpy as np
        >>> from fedcore.secagg.seed_helper import HelperPlan
        >>> plan = HelperPlan(3, 2, 16, 2, context=bytes(32), helper_key=bytes(32))
        >>> inputs = {name: np.array([name, 1], np.uint16) for name in (10, 20, 30)}
        >>> run_helper_round(inputs, plan, drops={20}).total.tolist()
        [40, 2]
    """
    names = sorted(inputs)
    strangers = sorted(set(drops) - inputs.keys())
    if len(names) != plan.clients or strangers:
        msg = (
            f"expected inputs of {plan.clients} clients and drops among them, "
            f"found {len(names)} inputs and drops of {strangers}"
        )
        raise ConfigurationError(msg)
    entropy = entropy or SystemEntropy()
    if helper is None:
        helper = KeyPair.generate(entropy.child("helper"), "helper-key")
        plan = replace(plan, helper_key=helper.public)
    sent = dict.fromkeys(names, 0)
    helping, adding = open_round(plan, helper), collect(plan)
    for client, name in enumerate(names):
        if name in drops:
            continue
        upload = mask_and_seal(
            plan.ring.reduce(inputs[name]),
            plan,
            client,
            pinned_key=helper.public,
            entropy=entropy.child(f"client={client}"),
        )
        vector, box = pack(upload.vector, plan.ring), upload.box.to_bytes()
        sent[name] = len(vector) + len(box)
        helping = helping.on_box(SeedBox.from_bytes(box), now=0)
        adding = adding.on_input(client, unpack(vector, plan.dim, plan.ring))
    unmasking, request = adding.close()
    closed = helping.close(CloseRequest.from_bytes(request.to_bytes()).survivors)
    answer = MaskSum.from_bytes(closed.mask_sum().to_bytes(plan), plan)
    outcome = unmasking.on_mask_sum(answer)
    return RoundResult(
        total=outcome.total,
        survivors=frozenset(names[client] for client in outcome.survivors),
        sent_bytes=sent,
        received_bytes=dict.fromkeys(names, len(plan.to_bytes())),
    )
