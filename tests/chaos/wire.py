"""A wire that can be cut, slowed and damaged: a TCP proxy in a thread of its own."""

import asyncio
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random

CHUNK = 16 << 10


@dataclass(frozen=True)
class Condition:
    """How a wire is.

    Attributes:
        cut: Nothing passes; what is open is closed, and what comes is refused.
        stalled: Connections stay open, and nothing passes.
        delay: Seconds by which every chunk is late.
        bandwidth: Bytes a second; 0 for no limit.
        damaged: Fraction of the chunks in which a bit is flipped.
    """

    cut: bool = False
    stalled: bool = False
    delay: float = 0.0
    bandwidth: float = 0.0
    damaged: float = 0.0


class Wire:
    """Passes on what arrives at a port of loopback, under a condition that may change.

    Args:
        target: Port to pass it on to.
        seed: Of what is damaged.
    """

    def __init__(self, target: int, seed: int = 0) -> None:
        self.condition = Condition()
        self._target, self._random = target, Random(seed)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    def set(self, **changes: object) -> None:
        """Change the condition; a cut closes what is open."""
        self.condition = replace(Condition(), **changes)
        if self.condition.cut:
            self._loop.call_soon_threadsafe(self._close_all)

    def close(self) -> None:
        """End the wire."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        self._close_all()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _close_all(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()
        self._open.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.condition.cut:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        try:
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in (writer, back):
                self._open.discard(end)
                end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            while self.condition.stalled:
                await asyncio.sleep(0.05)
            now = self.condition
            if now.delay:
                await asyncio.sleep(now.delay)
            if now.bandwidth:
                await asyncio.sleep(len(data) / now.bandwidth)
            if now.damaged and self._random.random() < now.damaged:
                place = self._random.randrange(len(data))
                data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            writer.write(data)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()
