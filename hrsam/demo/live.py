"""One WebSocket: a tab that shows a desk.  Answers go out in the order in which the commands came."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from hrsam.demo.desk import Desk, Done, View
from hrsam.demo.engine import Refusal, Work
from hrsam.demo.limits import Limits
from hrsam.demo.messages import SHOWN, describe, draw, pack, read_request

log = logging.getLogger("hrsam")

NO_SUCH_DESK, TOO_MANY, PICTURE_GONE, TRY_LATER = 4404, 4408, 4409, 1013  # close codes
WRONG = "something went wrong; the window in which hrsam demo runs says more"


class Cut(Exception):
    """The connection is to be closed with ``code``."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Painter:
    """Draws masks beside the event loop, so that nothing waits for it."""

    def __init__(self, executor: Executor, limits: Limits):
        self._executor, self._limits = executor, limits

    async def __call__(self, view: View, id: int) -> tuple[dict[str, Any], dict[str, Any], bytes]:
        """The object and its mask as the page knows them, and the code of its outline."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._draw, view, id)

    def _draw(self, view: View, id: int) -> tuple[dict[str, Any], dict[str, Any], bytes]:
        thing, version = view.objects[id], view.versions[id]
        return describe(thing, version), *draw(thing, version, self._limits.mask_side, self._limits.mask_bytes)


class Bucket:
    """``rate`` a second, ``burst`` at once."""

    def __init__(self, rate: float, burst: int):
        self._rate, self._burst = rate, burst
        self._left, self._then = float(burst), time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._left = min(self._burst, self._left + self._rate * (now - self._then))
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Live:
    """Sockets of the same desk hear of each other's changes.

    ``shows``: it is a page that will say when its picture is on the screen; so long the encode waits.
    """

    def __init__(self, socket: WebSocket, desk: Desk, paint: Painter, limits: Limits, *, shows: bool = False):
        self._socket, self._desk, self._paint, self._limits = socket, desk, paint, limits
        self._shown = asyncio.Event()
        if not shows:
            self._shown.set()
        self._pen = asyncio.Lock()  # one message at a time
        self._mentions: set[asyncio.Future[None]] = set()  # a loop holds its tasks weakly
        self._out: asyncio.Queue[Awaitable[list[bytes]]] = asyncio.Queue(4 * limits.waiting_a_desk)

    async def run(self) -> None:
        """Until the page goes away."""
        await self._socket.accept()
        self._desk.sockets.add(self)
        tasks = [asyncio.create_task(job) for job in (self._send(), self._greet_and_read())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._desk.sockets.discard(self)
            for task in tasks:
                task.cancel()
            for end in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(end, Exception) and not isinstance(end, WebSocketDisconnect):
                    log.error("a connection ended", exc_info=end)
            while not self._out.empty():
                if isinstance(left := self._out.get_nowait(), asyncio.Task):
                    left.add_done_callback(lambda task: task.cancelled() or task.exception())

    def hear(self, message: bytes) -> None:
        """Send what another socket changed; who does not read is cut off and will connect again."""
        if self._out.full():
            asyncio.create_task(self.close(TOO_MANY))  # noqa: RUF006 - nobody waits for it
        else:
            self._out.put_nowait(_now(message))

    async def close(self, code: int) -> None:
        if self._socket.application_state == WebSocketState.CONNECTED:
            await self._socket.close(code)

    async def _send(self) -> None:
        while True:
            try:
                messages = await asyncio.shield(await self._out.get())  # others hear of it even if this one goes
            except Cut as cut:
                await self.close(cut.code)
                return
            except Refusal as refusal:
                await self._socket.send_bytes(error_message(None, refusal))
                if refusal.kind == "gone":
                    await self.close(PICTURE_GONE)
                    return
                continue
            for message in messages:
                if self._socket.application_state != WebSocketState.CONNECTED:
                    return
                async with self._pen:
                    await self._socket.send_bytes(message)

    async def _mention(self, header: dict[str, Any]) -> None:
        """Send what is of use now or not at all: before what waits, and not to who does not read."""
        if self._socket.application_state == WebSocketState.CONNECTED and not self._pen.locked():
            async with self._pen:
                with suppress(RuntimeError, WebSocketDisconnect):  # it went away
                    await self._socket.send_bytes(pack(header))

    async def _greet_and_read(self) -> None:
        desk = self._desk
        if not desk.encoded:
            await self._say({"event": "encoding"})
        try:
            woken = desk.wake()
        except Refusal as refusal:
            await self._out.put(_now(error_message(None, refusal)))
            await self._out.put(_failed(Cut(TRY_LATER)))
            await self._read()
            return
        await self._out.put(asyncio.create_task(self._state(woken)))
        await self._out.put(asyncio.create_task(self._encoded(woken)))
        await self._read()

    async def _state(self, woken: Work) -> list[bytes]:
        view: View = await result(woken)
        objects = [describe(thing, view.versions[id]) for id, thing in view.objects.items()]
        state = {
            "desk": self._desk.id,
            "picture": self._desk.picture,
            "revision": view.revision,
            "objects": objects,
        }
        messages = [pack({"state": state})]
        for id, thing in view.objects.items():
            if thing.rounds:
                shown, mask, code = await self._paint(view, id)
                messages.append(pack({"revision": view.revision, "object": shown, "mask": mask}, code))
        return messages

    async def _encoded(self, woken: Work) -> list[bytes]:
        await result(woken)
        if not self._desk.encoded:
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._shown.wait(), self._limits.first_frame_seconds)
        seconds = 0.0 if self._desk.encoded else await result(self._desk.encode())
        return [pack({"event": "encoded", "ms": round(1000 * seconds)})]

    async def _read(self) -> None:
        bucket = Bucket(self._limits.messages_per_second, self._limits.message_burst)
        refused = 0
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if bucket.take():
                refused = 0
                await self._ask(message.get("text") or "")
                continue
            refused += 1
            if refused > self._limits.refused_in_a_row:
                await self._out.put(_failed(Cut(TOO_MANY)))  # behind what was answered
                await asyncio.sleep(self._limits.chunk_seconds)
                return
            await self._out.put(_now(error_message(None, Refusal("busy", "too many messages a second; send fewer"))))

    async def _ask(self, text: str) -> None:
        """Submit a command here and now, so that they are in the order in which they came, and answer later."""
        self._shown.set()  # whoever wants something does not wait for the screen
        if text == SHOWN:
            return
        seq = None
        try:
            request = read_request(text)
            seq = request.seq
            work = self._desk.submit(request.command, self._tells(request.seq))
        except ValueError as error:
            await self._out.put(_now(error_message(seq, Refusal("refused", str(error)))))
        except Refusal as refusal:
            await self._out.put(_now(error_message(seq, refusal)))
        else:
            await self._out.put(asyncio.create_task(self._answer(request.seq, work)))

    async def _answer(self, seq: int, work: Work) -> list[bytes]:
        try:
            done: Done = await result(work)
            return [await announce(self._desk, done, self._paint, self, {"seq": seq}, work.waited)]
        except Refusal as refusal:
            return [error_message(seq, refusal)]
        except Exception:
            log.exception("a command failed")
            return [error_message(seq, Refusal("refused", WRONG))]

    def _tells(self, seq: int) -> Callable[[tuple[int, int]], None]:
        """What a refine calls in the engine's thread: the page hears how far it is."""
        loop = asyncio.get_running_loop()

        def mention(header: dict[str, Any]) -> None:
            task = asyncio.ensure_future(self._mention(header))
            self._mentions.add(task)
            task.add_done_callback(self._mentions.discard)

        def tell(regions: tuple[int, int]) -> None:
            header = {"event": "refining", "command": seq, "done": regions[0], "of": regions[1]}
            with suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(mention, header)

        return tell

    async def _say(self, header: dict[str, Any]) -> None:
        await self._out.put(_now(pack(header)))


async def announce(
    desk: Desk,
    done: Done,
    paint: Painter,
    by: Live | None = None,
    head: dict[str, Any] | None = None,
    queue: float = 0.0,
) -> bytes:
    """The answer to a command that was accepted; the other sockets of the desk hear the same without ``head``."""
    async with desk.turn:
        started = time.perf_counter()
        code = b""
        news: dict[str, Any] = {"revision": done.view.revision}
        if done.removed:
            news["removed"] = done.object
        else:
            news["object"], news["mask"], code = await paint(done.view, done.object)
        seconds = {"queue": queue, "encode": done.encode, "decode": done.decode, "mask": time.perf_counter() - started}
        news["ms"] = {name: round(1000 * value, 1) for name, value in seconds.items()}
        if done.unchanged:
            news["unchanged"] = True
        elif others := [socket for socket in desk.sockets if socket is not by]:
            message = pack(news, code)
            for socket in others:
                socket.hear(message)
    return pack({**(head or {}), **news}, code)


async def result(work: Work) -> Any:
    """What ``work`` came to; raises what it raised."""
    return await asyncio.shield(asyncio.wrap_future(work.future))  # who goes away does not take the work back


def error_message(seq: int | None, refusal: Refusal) -> bytes:
    """A refusal as a message; ``seq`` of the command, None for none in particular."""
    error = {"error": {"kind": refusal.kind, "text": refusal.text}}
    return pack(error if seq is None else {"seq": seq, **error})


def _failed(error: Exception) -> Awaitable[list[bytes]]:
    failed = asyncio.get_running_loop().create_future()
    failed.set_exception(error)
    return failed


def _now(message: bytes) -> Awaitable[list[bytes]]:
    done = asyncio.get_running_loop().create_future()
    done.set_result([message])
    return done
