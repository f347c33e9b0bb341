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
missing does less harm than one that counts twice.

[SCJ18]  Stich, Cordonnier and Jaggi, "Sparsified SGD with Memory",
         https://arxiv.org/abs/1809.07599
[KRSJ19] Karimireddy, Rebjock, Stich and Jaggi, "Error Feedback Fixes SignSGD",
         https://arxiv.org/abs/1901.09847
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from fedcore.errors import LocalProtocolError, PeerProtocolError
from fedcore.pipeline import RoundPlan, Upload, bind_round, left_out, typed
from fedcore.vectors import RealVector

_VECTORS = "fedcore.feedback"
_SENT = "fedcore.feedback.sent"


class Feedback:
    """What a node's uploads have left out; kept in its Context, which stays on the node."""

    def __init__(self, context: Context) -> None:
        self._records = context.state

    def start(self, plan: RoundPlan, counted: int) -> RealVector | None:
        """Return what to add to the update of a round, shape [dim]; None for nothing.

        Args:
            plan: Of the round.
            counted: The last round in which an upload of this node counted; 0 for none.

        Raises:
            LocalProtocolError: What is kept cannot be read, or belongs to another model.
        """
        if not plan.run.error_feedback or _SENT not in self._records.config_records:
            return None
        sent = self._records.config_records[_SENT]
        try:
            last = RoundPlan.from_bytes(typed(sent, "plan", bytes))
            payload = typed(sent, "payload", bytes)
        except PeerProtocolError as error:
            msg = f"what this device kept of its last upload cannot be read: {error}"
            raise LocalProtocolError(msg) from error
        if last.run_id != plan.run_id:
            return None
        if last.round_number == plan.round_number:
            return self._vector("before", plan)
        whole = self._vector("whole", plan)
        if whole is None or last.round_number > counted:
            return whole
        return left_out(bind_round(last), whole, payload)

    def keep(self, plan: RoundPlan, upload: Upload, before: RealVector | None) -> None:
        """Keep what an upload was made from, and `before`, what it started from."""
        if upload.whole is None:
            return
        vectors = {"whole": Array(upload.whole)}
        if before is not None:
            vectors["before"] = Array(before)
        self._records[_VECTORS] = ArrayRecord(vectors)
        self._records[_SENT] = ConfigRecord({"plan": plan.to_bytes(), "payload": upload.payload})

    def _vector(self, name: str, plan: RoundPlan) -> RealVector | None:
        kept = self._records.array_records.get(_VECTORS, ArrayRecord())
        if name not in kept:
            return None
        vector: RealVector = kept[name].numpy()
        if vector.shape != (plan.dim,) or vector.dtype != np.float32:
            msg = (
                f"the stored residual has shape {vector.shape} and type {vector.dtype}, the model "
                f"needs ({plan.dim},) and float32"
            )
            raise LocalProtocolError(msg)
        return vector
