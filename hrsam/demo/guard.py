"""Who may speak to the server: cookie, Host, Origin, and the headers that keep a browser from doing harm.

A browser that sits on the same machine carries every web page its user visits up to this server.  So nothing is answered
without a cookie that only the printed address gives, to a Host that is not ours (DNS rebinding), or, where something is
changed or a WebSocket opened, to another Origin.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from hrsam.checkpoint import write_atomically

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

SAFE_METHODS = ("GET", "HEAD")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "worker-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::(\d{1,5}))?")


def read_secret(path: Path) -> bytes:
    """32 random bytes that outlive the process, so that a page finds its work again; made when missing."""
    if not path.exists():
        write_atomically(path, lambda file: file.write(secrets.token_bytes(32)), mode=0o600)
    secret = path.read_bytes()
    if len(secret) != 32:
        raise ValueError(f"{path} is damaged; delete it, then open the page with the address that is printed")
    return secret


class Guard:
    """ASGI middleware around ``app``.

    ``host``: the address listened on; ``port``; ``secret`` signs cookies; ``token`` opens the page, new with each start.
    Requests that pass have ``scope["owner"]``: the browser they come from, as a string that says nothing else.
    """

    def __init__(self, app: App, *, host: str, port: int, secret: bytes, token: str | None = None):
        self.app = app
        self.host, self.port = host, port
        self.token = secrets.token_urlsafe(32) if token is None else token
        self.cookie = f"hrsam_{port}"  # a cookie belongs to a host with all its ports
        self._secret = secret

    @property
    def url(self) -> str:
        """The address that opens the page."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "localhost") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/?token={self.token}"

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] in ("http", "websocket"):
            await self._guarded(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Callable, send: Callable) -> None:
        socket = scope["type"] == "websocket"

        async def hardened(message: Any) -> None:
            if message["type"] in ("http.response.start", "websocket.accept") and not socket:
                given = [(name, value) for name, value in message["headers"] if name.decode("latin-1") not in HEADERS]
                message = {**message, "headers": given + [(n.encode(), v.encode()) for n, v in HEADERS.items()]}
            await send(message)

        refused = self._refusal(scope)
        if refused is None and not socket and scope["path"] == "/" and scope["query_string"]:
            await self._enter(scope, hardened)
            return
        if refused is None:
            owner = self._owner(scope)
            if owner is not None:
                scope["owner"] = owner
                await self.app(scope, receive, hardened)
                return
            refused = 403, "open the address that hrsam demo printed; this browser has no cookie of this server"
        if socket:
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": ""})  # before it is accepted: HTTP 403
        else:
            await _answer(hardened, *refused)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for requests that come from elsewhere."""
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return 421, "this server does not answer to that name; use the address that hrsam demo printed"
        origins = _values(scope, b"origin")
        asks = scope["type"] == "http" and scope["method"] in SAFE_METHODS
        if not asks or origins:
            ours = {f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"}
            if len(origins) != 1 or origins[0].lower() not in ours:
                return 403, "this request comes from another page; only the click page itself may send it"
        site = _values(scope, b"sec-fetch-site")
        if scope["path"] != "/" and any(value not in ("same-origin", "none") for value in site):
            return 403, "this request comes from another page; only the click page itself may send it"
        return None

    def _is_ours(self, value: str) -> bool:
        match = _HOST.fullmatch(value.lower())
        if match is None or int(match[2] or 80) != self.port:
            return False
        name = match[1].strip("[]")
        if name in LOOPBACK or name == self.host.lower():
            return True
        if self.host in LOOPBACK:
            return False
        try:
            ipaddress.ip_address(name)  # rebinding needs a name
        except ValueError:
            return False
        return True

    async def _enter(self, scope: Scope, send: Callable) -> None:
        """``/?token=…``: a cookie for the right token."""
        try:
            given = parse_qs(scope["query_string"].decode("ascii"), strict_parsing=True, max_num_fields=4)
        except ValueError:
            given = {}
        token = given.get("token", [""])[-1]
        if scope["method"] != "GET" or not hmac.compare_digest(token.encode(), self.token.encode()):
            await _answer(send, 403, "this address is not the one that hrsam demo printed, or of an earlier start")
            return
        name = self._name(scope)
        headers = [(b"location", b"/"), (b"cache-control", b"no-store"), (b"content-length", b"0")]
        if name is None:  # a browser that was here before keeps its work
            name = secrets.token_urlsafe(16)
        value = f"{self.cookie}={name}.{self._sign(name)}; Path=/; HttpOnly; SameSite=Strict; Max-Age=2592000"
        headers.append((b"set-cookie", value.encode()))
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _owner(self, scope: Scope) -> str | None:
        name = self._name(scope)
        return None if name is None else self._digest("owner", name)

    def _name(self, scope: Scope) -> str | None:
        """The browser's name out of a cookie that we signed."""
        for header in _values(scope, b"cookie"):
            try:
                morsel = SimpleCookie(header).get(self.cookie)
            except CookieError:
                continue
            if morsel is None:
                continue
            name, _, signature = morsel.value.partition(".")
            if hmac.compare_digest(signature.encode(), self._sign(name).encode()):
                return name
        return None

    def _sign(self, name: str) -> str:
        return self._digest("cookie", name)

    def _digest(self, purpose: str, text: str) -> str:
        return keyed(self._secret, purpose, text)


def keyed(secret: bytes, purpose: str, text: str) -> str:
    """32 hexadecimal digits that only ``secret`` makes out of ``text``; different for each purpose."""
    return hmac.new(secret, f"{purpose}\0{text}".encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def _answer(send: Callable, status: int, text: str) -> None:
    body = json.dumps({"error": {"kind": "refused", "text": text}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": status, "headers": [*headers, (b"cache-control", b"no-store")]}
    )
    await send({"type": "http.response.body", "body": body})
