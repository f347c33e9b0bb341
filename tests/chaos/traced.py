"""The ServerApp of a chaos run: the deployed one, on a grid that writes down what crosses.

The trace has a line for every request, reply and probe, and is what the invariants are
checked against (`tests.chaos.invariants`). The grid also misbehaves when it is ordered to:
what a broken or malicious coordinator, network or device would send. It is sent to the
SuperLink inside of the app's bundle, so it imports nothing from the tests.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from clients.requests import request_digest
from fedcore.engine import WrappedGrid, unblocked
from fedcore.engine.nodes import isolated
from fedcore.pipeline import RECORD, VECTOR, Envelope, RoundPlan

TRACE, ORDERS = "trace.jsonl", "orders.jsonl"
LATE_SECONDS: Final = 300.0
OVERSIZE: Final = 24 << 20
ON_REPLIES = ("garble-reply", "cut-reply", "empty-reply", "oversize-reply")
ON_REQUESTS = ("garble-request", "oversize-request", "stale-request")
REPLAY = "replay"


class TracingGrid(WrappedGrid):
    """Writes down what crosses, and follows orders.

    Args:
        grid: Carries the messages.
        note: Takes one line of the trace.
        order: Says what to do to a node's exchange in a stage of a round, if anything.
        unix_time: Of the lines.
    """

    def __init__(
        self,
        grid: Grid,
        note: Callable[[dict[str, Any]], None],
        order: Callable[[int, str, str], str | None] = lambda *_: None,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(grid)
        self._note, self._order, self._time = note, order, unix_time
        self._attempt = 0
        self._open: dict[str, dict[str, Any]] = {}
        self._messages: dict[str, Message] = {}
        self._before: dict[int, RecordDict] = {}
        self._probes: dict[str, dict[str, Any]] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        batch = list(messages)
        facts = [self._facts(message) for message in batch]
        for message, fact in zip(batch, facts, strict=True):
            if fact and fact["order"] in ON_REQUESTS:
                self._probe(fact["order"], message, fact)
        contents = [isolated(message.content) if fact else None
                    for message, fact in zip(batch, facts, strict=True)]  # fmt: skip
        ids = list(super().push_messages(batch))
        for key, message, fact, content in zip(ids, batch, facts, contents, strict=False):
            if fact is None:
                continue
            self._note({"at": self._time(), "event": "asked", **fact})
            if key:
                self._open[key] = fact
                self._messages[key] = message
            if fact["order"] == REPLAY:
                fact["content"] = content
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        asked = set(message_ids)
        now = self._time()
        self._open = {
            key: fact
            for key, fact in self._open.items()
            if key in asked or now - fact["since"] < LATE_SECONDS
        }
        late = set(self._open) - asked
        for reply in super().pull_messages(asked | late | set(self._probes)):
            key = reply.metadata.reply_to_message_id
            if key in self._probes:
                self._answered_probe(self._probes.pop(key), reply)
                continue
            fact = self._open.pop(key, None)
            if fact is None:
                yield reply
                continue
            self._answered(fact, reply, late=key not in asked)
            if key in asked:
                yield self._spoiled(fact, reply, self._messages.pop(key))

    def _facts(self, message: Message) -> dict[str, Any] | None:
        records = message.content.config_records
        if RECORD not in records:
            return None
        envelope = Envelope.from_fields(records[RECORD])
        if envelope.plan:
            plan = RoundPlan.from_bytes(envelope.plan)
            self._attempt = plan.attempt
        step = (envelope.round_number, envelope.stage, envelope.label)
        return {
            "round": envelope.round_number,
            "attempt": 0 if envelope.stage == "identify" else self._attempt,
            "stage": envelope.stage,
            "node": envelope.label,
            "request": request_digest(message).hex(),
            "plan": envelope.plan.hex(),
            "order": self._order(*step),
            "since": self._time(),
        }

    def _answered(self, fact: dict[str, Any], reply: Message, *, late: bool) -> None:
        self._note(
            {
                "at": self._time(),
                "event": "answered",
                **{key: fact[key] for key in ("round", "attempt", "stage", "node")},
                "late": late,
                **_said(reply),
            }
        )
        if fact["order"] == REPLAY and reply.has_content() and not late:
            again = Message(fact["content"], reply.metadata.src_node_id, self._type(reply), ttl=60)
            self._send_probe("replay", again, fact)

    def _type(self, reply: Message) -> str:
        return reply.metadata.message_type

    def _probe(self, kind: str, message: Message, fact: dict[str, Any]) -> None:
        """Ask a device something wrong, before it is asked what is right."""
        content = isolated(message.content)
        if kind == "garble-request":
            record = dict(content[RECORD])
            record["message"] = bytes(byte ^ 0x5A for byte in record["message"][:-1])
            content[RECORD] = ConfigRecord(record)
        elif kind == "oversize-request":
            data = bytes(OVERSIZE)
            array = Array(dtype="uint8", shape=(len(data),), stype="junk", data=data)
            content["junk"] = ArrayRecord({"junk": array})
        else:
            record = dict(content[RECORD])
            record["round"] = max(1, record["round"] - 1)
            record["stage"] = "reveal" if record["stage"] != "reveal" else "upload"
            content[RECORD] = ConfigRecord(record)
        meta = message.metadata
        self._send_probe(kind, Message(content, meta.dst_node_id, meta.message_type, ttl=60), fact)

    def _send_probe(self, kind: str, message: Message, fact: dict[str, Any]) -> None:
        for key in super().push_messages([message]):
            if key:
                self._probes[key] = {**fact, "kind": kind}

    def _answered_probe(self, fact: dict[str, Any], reply: Message) -> None:
        self._note(
            {
                "at": self._time(),
                "event": "probed",
                **{key: fact[key] for key in ("round", "attempt", "stage", "node", "kind")},
                **_said(reply),
            }
        )

    def _spoiled(self, fact: dict[str, Any], reply: Message, asked: Message) -> Message:
        """Return a reply as a malicious device would have written it."""
        if fact["order"] not in ON_REPLIES or reply.has_error():
            return reply
        content = isolated(reply.content)
        change = {
            "garble-reply": lambda data: bytes(byte ^ 0x5A for byte in data),
            "cut-reply": lambda data: data[: len(data) // 2],
            "empty-reply": lambda data: b"",
            "oversize-reply": lambda data: data + bytes(OVERSIZE),
        }[fact["order"]]
        name = f"{RECORD}.{VECTOR}"
        if name in content:
            content[name][VECTOR].data = change(content[name][VECTOR].data)
        elif "message" in content.config_records.get(RECORD, {}):
            record = dict(content[RECORD])
            record["message"] = change(record["message"])
            content[RECORD] = ConfigRecord(record)
        return Message(content, reply_to=asked)


def _said(reply: Message) -> dict[str, Any]:
    if reply.has_error():
        return {"reply": None, "error": reply.error.code, "why": (reply.error.reason or "")[:300]}
    return {"reply": request_digest(reply).hex(), "error": None}


def orders_in(path: Path) -> Callable[[int, str, str], str | None]:
    """Return what the lines of a file order, each of them once."""
    done: set[int] = set()

    def order(round_number: int, stage: str, node: str) -> str | None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for place, line in enumerate(lines):
            wanted = json.loads(line)
            if place not in done and wanted["round"] <= round_number:
                done.add(place)
                if wanted["stage"] == stage and node in wanted["names"]:
                    return str(wanted["do"])
                done.discard(place)
        return None

    return order


def build_traced_app() -> ServerApp:
    """Return the deployed ServerApp, traced into the run's folder."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from experiments.deployed import app as deployed  # noqa: PLC0415 - only in a bundle

        folder = Path(str(context.run_config["output"]))
        with (folder / TRACE).open("a", encoding="utf-8") as file:

            def note(line: dict[str, Any]) -> None:
                kept = {key: value for key, value in line.items() if key != "content"}
                file.write(json.dumps(kept) + "\n")
                file.flush()

            note({"at": time.time(), "event": "began", "run": context.run_id})
            with unblocked(grid) as prompt:  # as it does where nothing is between
                traced = TracingGrid(prompt, note, orders_in(folder / ORDERS))
                deployed(grid=traced, context=context)

    return app


app = build_traced_app()
