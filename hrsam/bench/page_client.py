"""The click page's server in a thread, and a client in Python that speaks to it as the page does."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from hrsam.demo.messages import unpack
from hrsam.demo.server import Server, listen
from hrsam.demo.site import Site

SECONDS = 60.0  # a client waits for an answer


@contextmanager
def serving(site: Site) -> Iterator[str]:
    """Serve ``site`` on a free port of the loopback address; gives the address that opens the page."""
    listening = listen("127.0.0.1", 0)
    server = Server(site, "127.0.0.1", listening.getsockname()[1])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield server.url
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
        site.close()


class Client:
    """A browser that was given ``url``: it keeps the cookie and sends its Origin."""

    def __init__(self, url: str):
        self.url = url
        parts = urlsplit(url)
        self.host = parts.netloc
        status, headers, _ = self.ask("GET", f"{parts.path}?{parts.query}", cookie=None)
        if status != 303:
            raise ConnectionError(f"the server answered {status} to its own address")
        self.cookie = headers["set-cookie"].split(";")[0]

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        kind: str = "application/octet-stream",
        headers: Mapping[str, str] | None = None,
        cookie: str | None = "",
    ) -> tuple[int, dict[str, str], bytes]:
        """One request: status, headers, body.  ``headers``: on top of a browser's; ``cookie``: "" for ours, None for none."""
        sent = {"Host": self.host}
        if method not in ("GET", "HEAD"):
            sent |= {"Origin": f"http://{self.host}", "Content-Type": kind}
        if cookie is not None:
            sent["Cookie"] = cookie or self.cookie
        connection = http.client.HTTPConnection(self.host, timeout=SECONDS)
        try:
            connection.request(method, path, body, {**sent, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, value: Any = None) -> Any:
        """The answer to a request that must succeed."""
        body = None if value is None else json.dumps(value).encode()
        status, _, answer = self.ask(method, path, body, "application/json")
        if status >= 300:
            raise ConnectionError(f"{method} {path}: {status} {answer[:200]!r}")
        return json.loads(answer)

    def desk(self, picture: str | None = None) -> str:
        """A new desk on a picture, the first one unless given."""
        picture = picture or self.json("GET", "/api/pictures")[0]["id"]
        return self.json("POST", "/api/desks", {"picture": picture})["desk"]

    def open(self, desk: str) -> Tab:
        return Tab(self, desk)


class Tab:
    """A WebSocket to a desk.  ``masks``: the mask messages on connect, header and code; ``state``: what it said first.

    ``events``: what was said besides, how far a refine is for instance.
    """

    def __init__(self, client: Client, desk: str):
        from websockets.sync.client import connect

        self.seq = 0
        self._connection = connect(
            f"ws://{client.host}/api/desks/{desk}/live",
            origin=f"http://{client.host}",  # type: ignore[arg-type]
            additional_headers={"Cookie": client.cookie},
            max_size=None,
            compression=None,
        )
        self.socket = self._connection.__enter__()
        self.state: dict[str, Any] = {}
        self.masks: dict[int, tuple[dict[str, Any], bytes]] = {}
        self.events: list[dict[str, Any]] = []
        self._answers: dict[int, tuple[dict[str, Any], bytes]] = {}
        encoded = False
        while not (self.state and encoded):
            header, _ = self.next()
            encoded |= header.get("event") == "encoded"
            if "error" in header:
                raise ConnectionError(header["error"]["text"])
        self.revision = self.state["revision"]

    def next(self) -> tuple[dict[str, Any], bytes]:
        """The next message, of whatever kind."""
        message = self.socket.recv(SECONDS)
        assert isinstance(message, bytes)
        header, payload = unpack(message)
        if "state" in header:
            self.state = header["state"]
        elif "event" in header:
            self.events.append(header)
        elif "seq" in header:
            self._answers[header["seq"]] = header, payload
        elif "mask" in header:
            self.masks[header["object"]["id"]] = header, payload
        return header, payload

    def send(self, **command: Any) -> int:
        """Send a command; returns its number."""
        self.seq += 1
        self.socket.send(json.dumps({"seq": self.seq, "revision": self.revision, "command": command}))
        return self.seq

    def answer(self, seq: int) -> tuple[dict[str, Any], bytes]:
        """The answer to a command, with everything that comes before it read too."""
        while seq not in self._answers:
            self.next()
        header, payload = self._answers.pop(seq)
        self.revision = header.get("revision", self.revision)
        return header, payload

    def do(self, **command: Any) -> tuple[dict[str, Any], bytes]:
        """Send a command and wait for its answer."""
        return self.answer(self.send(**command))

    def click(self, x: float, y: float, positive: bool = True, object: int = 1) -> tuple[dict[str, Any], bytes]:
        return self.do(do="click", object=object, x=x, y=y, positive=positive)

    def close(self) -> None:
        self._connection.__exit__(None, None, None)
