"""Error feedback that knows which uploads arrived.

What an upload leaves out (coordinates that were not sent, what the clip cut off) is added
to the next update, so that everything is sent in the end [SCJ18, KRSJ19]. That is right for
an upload that went into the model. One that was late, or got lost, or whose round was given
up, sent nothing at all; its device learns so only later, from the coordinator, which names
the last round that counted with every request for an upload. Until then both are kept:

    before    what the upload started from
    whole     what it was made from: `before` plus the update of that round

and with them the plan of the round, by which what was left out follows from `whole`. The
next upload then starts from

    what was left out    if the round counted
    `whole`              if it did not: nothing of it was sent
    `before`             if it is another attempt of the same round, which trains anew

so that after any number of lost rounds all that was sent, and what is kept, add up to all
updates, each once. It takes the memory of two models, and the code of the last upload if
it was compressed by itself.

The coordinator may also name a later round than that of the last upload. Then this
memory is older than it should be, or the coordinator began after that round, and whether
it counted is not known: the upload is taken for one that did, since an update that is
missing does less harm than one that counts twice. The same holds for a device that has
another node id than when it sent its last upload: what it is told is about the new one.

[SCJ18]  Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory",
         https://arxiv.org/abs/1809.07599
[KRSJ19] Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes SignSGD",
         https://arxiv.org/abs/1901.09847
"""

from __future__ import annotations

import numpy as np
from flwr.app import Context

from clients.feedback_store import LastUpload, store_of
from fedcore.errors import LocalProtocolError, PeerProtocolError
from fedcore.pipeline import RoundPlan, Upload, bind_round, left_out
from fedcore.vectors import RealVector


class Feedback:
    """What a node's uploads have left out; it stays on the node."""

    def __init__(self, context: Context) -> None:
        self._store = store_of(context)
        self._node_id = context.node_id

    def start(self, plan: RoundPlan, counted: int) -> RealVector | None:
        """Return what to add to the update of a round, shape [dim]; None for nothing.

        Args:
            plan: Of the round.
            counted: The last round in which an upload of this node counted; 0 for none.

        Raises:
            LocalProtocolError: What is kept cannot be read, or belongs to another model.
            ConfigurationError: The file that it is kept in is damaged, or cannot be read.
        """
        last = self._store.load() if plan.run.error_feedback else None
        if last is None:
            return None
        try:
            sent = RoundPlan.from_bytes(last.plan)
        except PeerProtocolError as error:
            msg = f"what this device kept of its last upload cannot be read: {error}"
            raise LocalProtocolError(msg) from error
        if sent.run_id != plan.run_id:
            return None
        if sent.round_number == plan.round_number:
            return None if last.before is None else _of_model(last.before, plan)
        whole = _of_model(last.whole, plan)
        if last.node_id == self._node_id and sent.round_number > counted:
            return whole
        return left_out(bind_round(sent), whole, last.payload)

    def keep(self, plan: RoundPlan, upload: Upload, before: RealVector | None) -> None:
        """Keep what an upload was made from, and `before`, what it started from.

        Raises:
            ConfigurationError: The file that it is kept in cannot be written.
        """
        if upload.whole is not None:
            payload, data = upload.payload, plan.to_bytes()
            self._store.save(LastUpload(self._node_id, data, payload, upload.whole, before))


def _of_model(vector: RealVector, plan: RoundPlan) -> RealVector:
    """Return `vector` if it fits the model."""
    if vector.shape != (plan.dim,) or vector.dtype != np.float32:
        msg = (
            f"the stored residual has shape {vector.shape} and type {vector.dtype}, the model "
            f"needs ({plan.dim},) and float32"
        )
        raise LocalProtocolError(msg)
    return vector
