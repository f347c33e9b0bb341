"""What a round must have given: the sum of what exactly its survivors sent, in this process.

Devices that rehearse draw everything from a seed, so their uploads can be made again: each
survivor trains on the model from before the round, its change is encoded as the plan says,
and the encodings are added in the clear. A round under chaos must give the same model, bit
for bit: a sum that lacks a survivor, has one twice or has anything else in it does not.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from clients.client_app import build_client_app, replayed_entropy
from clients.policy import DevicePolicy
from clients.received import measurements
from fedcore.crypto import ReplayedEntropy
from fedcore.engine import InProcessGrid, to_arrays, to_record
from fedcore.engine.nodes import FIRST_NODE_ID
from fedcore.job import Job, check
from fedcore.models import build
from fedcore.pipeline import LocalUpdate, RoundPlan, bind_round, decode_sum, make_upload
from fedcore.training import get_arrays
from fedcore.vectors import Layout

Arrays = Mapping[str, np.ndarray]
_ANYTHING = DevicePolicy(minimum_cohort=1, require_masks=False)


@lru_cache(maxsize=8)
def initial_model(job: Job) -> Arrays:
    """The model before the first round."""
    dataset = check(job).dataset
    return get_arrays(build(job.model, dataset.input_shape, dataset.classes, job.seed))


def model_after(job: Job, plan: RoundPlan, model: Arrays, survivors: Iterable[int]) -> Arrays:
    """The model that the `survivors`, by number, make of `model` in the round of `plan`."""
    bound, group, layout = bind_round(plan), sorted(survivors), Layout.of(model)
    before = layout.flatten(model)
    total, names = bound.ring.zeros(bound.dim), []
    for number, content in zip(group, _trained(job, plan, model, group), strict=True):
        (arrays,) = content.array_records.values()
        examples, metrics = measurements(content, "num-examples")
        upload = make_upload(
            bound,
            LocalUpdate(layout.flatten(to_arrays(arrays)) - before, examples, metrics),
            None,
            _entropy(job.seed, number, plan).child("upload"),
        )
        total = total + upload.vector
        names.append(upload.metric_names)
    mean = decode_sum(bound, bound.ring.reduce(total), len(group), names, None)
    return layout.unflatten(before + mean.delta)


def _entropy(seed: int, number: int, plan: RoundPlan) -> Any:
    node = ReplayedEntropy(str(seed).encode()).child(f"node={number}")
    return node.child(f"round={plan.round_number}/attempt={plan.attempt}")


def _trained(job: Job, plan: RoundPlan, model: Arrays, group: list[int]) -> list[RecordDict]:
    """What the train function of each of the group gives, without a sum around it."""
    app = build_client_app(_ANYTHING, entropy=replayed_entropy(job.seed))
    with InProcessGrid(app, [{}] * job.clients, {"job": job.to_json()}) as grid:
        config = ConfigRecord({"server-round": plan.round_number})
        messages = [
            Message(
                RecordDict({"arrays": to_record(model), "config": config}),
                FIRST_NODE_ID + number,
                "train",
            )
            for number in group
        ]
        replies = grid.send_and_receive(messages)
        contents = {reply.metadata.src_node_id: reply.content for reply in replies}
    return [contents[FIRST_NODE_ID + number] for number in group]
