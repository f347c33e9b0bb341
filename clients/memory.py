"""What a device remembers between two messages of a run.

Kept in Flower's Context, which stays on the node: the protocol state, the last round
that was begun, the last answer, and the last global model where only its changes travel.
What error feedback keeps there is in `clients.feedback`. A state is removed when it is
taken; it comes back only as its successor.

The last answer is there for a coordinator that did not get it. It is what was sent, byte
for byte, so that nobody learns from it what the coordinator did not learn from the first.
It costs a digest and the reply: after an upload the packed vector, ceil(dim * bits / 8)
bytes, until the next stage begins, or the next round where the upload is the only stage.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from clients.participation import spacing_of
from fedcore.crypto import transcript_hash
from fedcore.engine.nodes import isolated
from fedcore.errors import PeerProtocolError
from fedcore.pipeline import RoundPlan, typed

_STATE = "fedcore.protocol"
_ROUND = "fedcore.round"
_MODEL = "fedcore.global-model"
_ANSWER = "fedcore.answer"
_REPLY = f"{_ANSWER}/"
"""What the names of the records of the last reply start with."""


class ProtocolMemory:
    """A node's records in its Context."""

    def __init__(self, context: Context) -> None:
        self._records = context.state

    def begin(self, plan: RoundPlan) -> None:
        """Note that `plan` is being answered, and drop whatever was left of older rounds.

        Raises:
            PeerProtocolError: This attempt, or a later one, was begun before; or the noise of
                the run hides no participation in this round.
        """
        attempt = (plan.round_number, plan.attempt)
        taken = 1
        if _ROUND in self._records.config_records:
            last = self._records.config_records[_ROUND]
            begun = (typed(last, "round", int), typed(last, "attempt", int))
            if typed(last, "run", str) == plan.run_id and attempt <= begun:
                msg = (
                    f"round {attempt[0]}, attempt {attempt[1]} must be later than what this device "
                    f"answered last, round {begun[0]}, attempt {begun[1]}"
                )
                raise PeerProtocolError(msg)
            if typed(last, "run", str) == plan.run_id:
                before, spacing = typed(last, "taken", int), spacing_of(plan)
                if spacing is not None:
                    spacing.check(attempt[0], last=begun[0], taken=before)
                taken = before + (attempt[0] != begun[0])
        self._records.pop(_STATE, None)
        self._forget_answer()
        self._records[_ROUND] = ConfigRecord(
            {"run": plan.run_id, "round": attempt[0], "attempt": attempt[1], "taken": taken}
        )

    def put(self, plan: RoundPlan, state: bytes) -> None:
        """Keep the protocol state until the next message."""
        self._records[_STATE] = ConfigRecord({"plan": plan.to_bytes(), "state": state})

    def take(self) -> tuple[RoundPlan, bytes]:
        """Return the protocol state; forget it, and the answer to the stage before.

        Raises:
            PeerProtocolError: There is none: the device has not joined, or it left.
        """
        if _STATE not in self._records.config_records:
            msg = "a protocol message arrived, but this device is in no round: invite it first"
            raise PeerProtocolError(msg)
        stored = self._records.config_records[_STATE]
        del self._records[_STATE]
        self._forget_answer()
        return RoundPlan.from_bytes(typed(stored, "plan", bytes)), typed(stored, "state", bytes)

    def keep_answer(self, request: bytes, reply: RecordDict) -> None:
        """Keep what was answered to a request of the round that was begun last.

        Args:
            request: Digest of the whole request, see `clients.requests`.
            reply: What is sent; the bytes of its arrays are shared, not copied.
        """
        self._forget_answer()
        self._records[_ANSWER] = ConfigRecord({"request": self._in_this_attempt(request)})
        for name, record in isolated(reply).items():
            self._records[f"{_REPLY}{name}"] = record

    def answer_to(self, request: bytes) -> RecordDict | None:
        """Return the last answer, if it was to this very request in this very attempt."""
        last = self._records.config_records.get(_ANSWER)
        if last is None or typed(last, "request", bytes) != self._in_this_attempt(request):
            return None
        reply = {
            name.removeprefix(_REPLY): record
            for name, record in self._records.items()
            if name.startswith(_REPLY)
        }
        return isolated(RecordDict(reply))

    def _in_this_attempt(self, request: bytes) -> bytes:
        """Bind a request to run, round and attempt, which most requests do not name."""
        begun = self._records.config_records[_ROUND]
        return transcript_hash(
            "fedcore/v1/answered",
            typed(begun, "run", str).encode("utf-8", "surrogatepass"),
            typed(begun, "round", int).to_bytes(8, "little"),
            typed(begun, "attempt", int).to_bytes(8, "little"),
            request,
        )

    def _forget_answer(self) -> None:
        for name in [name for name in self._records if name.startswith(_ANSWER)]:
            del self._records[name]

    def model(self) -> npt.NDArray[np.float32] | None:
        """Return the last global model, flat, shape [dim]; None for none or a damaged one."""
        kept = self._records.array_records.get(_MODEL)
        if kept is None or "model" not in kept:
            return None
        try:
            model = kept["model"].numpy()
        except (ValueError, TypeError):
            return None
        return model if model.dtype == np.float32 and model.ndim == 1 else None

    def keep_model(self, model: npt.NDArray[np.float32]) -> None:
        """Keep a global model, flat, shape [dim], to apply later changes to."""
        self._records[_MODEL] = ArrayRecord({"model": Array(model)})
