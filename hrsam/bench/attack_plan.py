"""What attackers send to the click page's server, by name: paths, foreign pages, other users' work, too much of everything."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrsam.bench.hostile_files import bomb, header_of, jpeg, png
from hrsam.bench.page_client import Client
from hrsam.demo.limits import Limits

PATHS = (
    "../secret.txt",
    "../../etc/passwd",
    "..%2fsecret.txt",
    "%2e%2e%2fsecret.txt",
    "%2e%2e/secret.txt",
    "..%252fsecret.txt",
    "..%5csecret.txt",
    "..\\secret.txt",
    "%5c%5chost%5cshare",
    "//host/share",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "C:%5cboot.ini",
    "C:/boot.ini",
    "page.html%00.png",
    "%00",
    ".",
    "..",
    "....//....//secret.txt",
    "%c0%ae%c0%ae%2fsecret.txt",
    "%uff0e%uff0e",
    "file:%2f%2f%2fetc%2fpasswd",
    "picture0.png",
    ".hidden.png",
    "link.png",
    "pipe.png",
    "%3cscript%3e",
    "~root",
    "%s%s%n",
    "A" * 3000,
)


@dataclass
class Ground:
    """Where attacks are made: two users of a server, a desk and a picture of the first one's, the folder that was opened."""

    us: Client
    them: Client
    picture: str
    desk: str
    folder: Path
    token: str
    limits: Limits

    def raw(self, text: str | bytes, wait: float = 2.0) -> tuple[int, bytes]:
        """Send bytes as they are; status and answer; 0 when it is closed without one, 100 when nothing happens."""
        host, port = self.us.host.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=wait) as connection:
            answer, late = b"", False
            try:
                connection.sendall(text.encode("latin-1") if isinstance(text, str) else text)
                while not _whole(answer) and (piece := connection.recv(65536)):
                    answer += piece
            except ConnectionError:
                pass
            except TimeoutError:
                late = not answer
        match = re.match(rb"HTTP/1\.1 (\d+)", answer)
        return (int(match[1]) if match else 100 if late else 0), answer

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        """GET with our cookie and other headers than a browser's, where given; ``_`` stands for ``-``."""
        sent = {"Host": self.us.host, "Cookie": self.us.cookie, "Connection": "close"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return self.raw(f"GET {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in sent.items() if v) + "\r\n")

    def post(self, path: str, body: bytes, kind: str = "application/octet-stream", **headers: str) -> tuple[int, bytes]:
        status, _, answer = self.us.ask("POST", path, body, kind, {k.replace("_", "-"): v for k, v in headers.items()})
        return status, answer

    def handshake(self, desk: str | None = None, **headers: str) -> tuple[int, bytes]:
        """Open a WebSocket by hand; the server closes those it refuses."""
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec_WebSocket_Version": "13",
            "Sec_WebSocket_Key": "AAAAAAAAAAAAAAAAAAAAAA==",
            "Origin": f"http://{self.us.host}",
        }
        return self.get(f"/api/desks/{desk or self.desk}/live", **{**upgrade, **headers})

    def message(self, text: str | bytes) -> tuple[int, bytes]:
        """What a WebSocket message is answered with, as if it were HTTP: 400 for an error, 0 when the connection is closed."""
        from websockets.exceptions import ConnectionClosed

        tab = self.us.open(self.desk)
        try:
            tab.socket.send(text)
            header, _ = tab.next()
            return (400 if "error" in header else 200), json.dumps(header).encode()
        except ConnectionClosed:
            return 0, b""
        finally:
            tab.close()


def _whole(answer: bytes) -> bool:
    """Whether nothing more belongs to an answer; a WebSocket that was opened is whole when it was closed again."""
    head, found, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    if b" 101 " in head[:14]:
        return b"\x88" in body
    return bool(found) and length is not None and len(body) >= int(length[1])


Attack = Callable[[], tuple[int, bytes]]


def plan(g: Ground) -> Iterator[tuple[str, Attack]]:
    """Every attack with its name."""
    yield from _paths(g)
    yield from _strangers(g)
    yield from _other_users(g)
    yield from _bodies(g)
    yield from _messages(g)
    yield from _uploads(g)


def _paths(g: Ground) -> Iterator[tuple[str, Attack]]:
    for path in PATHS:
        yield f"static {path[:40]}", lambda path=path: g.get(f"/static/{path}")
        yield f"picture {path[:40]}", lambda path=path: g.get(f"/api/pictures/{path}/tiles/0/0/0")
        yield f"export {path[:40]}", lambda path=path: g.get(f"/api/desks/{g.desk}/export/{path}")
    for name in (".hidden.png", "link.png", "pipe.png", "folder.png", "page.html"):
        yield f"listed {name}", lambda name=name: _listed(g, name)
    yield "swap for a link", lambda: _swapped(g)
    for place in ("-1/0/0", "99/0/0", "0/99/0", "0/0/99999999999999999999", "0/0/1e3", "0/0/0x0", "0/-1/0", "a/b/c"):
        yield f"tile {place}", lambda place=place: g.get(f"/api/pictures/{g.picture}/tiles/{place}")
        yield f"mask {place}", lambda place=place: g.get(f"/api/desks/{g.desk}/masks/1/0/{place}")
    for query in ("object=99", "object=../1", "fill=-1", "fill=1e99", "tolerance=nan", "evil=1", "object=1&object=a"):
        yield f"export ?{query}", lambda query=query: g.get(f"/api/desks/{g.desk}/export/mask.png?{query}")


def _listed(g: Ground, name: str) -> tuple[int, bytes]:
    names = [entry["name"] for entry in g.us.json("GET", "/api/pictures")]
    return (200 if name in names else 404), b""


def _swapped(g: Ground) -> tuple[int, bytes]:
    """A picture that was listed becomes a link to one outside before it is opened."""
    found = {entry["name"]: entry["id"] for entry in g.us.json("GET", "/api/pictures")}
    path = g.folder / "picture1.png"
    path.unlink()
    path.symlink_to(g.folder.parent / "outside.png")
    return g.get(f"/api/pictures/{found['picture1.png']}/tiles/0/0/0")


def _strangers(g: Ground) -> Iterator[tuple[str, Attack]]:
    host, port = g.us.host.split(":")
    hosts = (
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1.evil.example:{port}",
        f"localhost.evil.example:{port}",
        f"10.0.0.1:{port}",
        f"{host}:1",
        host,
        f"{g.us.host}@evil.example",
        f"evil.example\r\nHost: {g.us.host}",
        "",
        f"0.0.0.0:{port}",
        f"[::ffff:7f00:1]:{port}",
    )
    for name in hosts:
        yield f"host {name!r}", lambda name=name: g.get("/api/pictures", Host=name)
        yield f"websocket host {name!r}", lambda name=name: g.handshake(Host=name)
    origins = (
        "http://evil.example",
        "null",
        "",
        f"http://{host}:1",
        f"http://localhost.evil.example:{port}",
        f"ftp://{g.us.host}",
    )
    body = json.dumps({"picture": g.picture}).encode()
    for origin in origins:
        yield f"websocket origin {origin}", lambda origin=origin: g.handshake(Origin=origin)
        yield (
            f"post origin {origin}",
            lambda origin=origin: g.post("/api/desks", body, "application/json", Origin=origin),
        )
        yield f"upload origin {origin}", lambda origin=origin: g.post("/api/pictures", b"x", Origin=origin)
    for site in ("cross-site", "same-site"):
        yield f"fetched {site}", lambda site=site: g.get("/api/pictures", Sec_Fetch_Site=site)
    name, value = g.us.cookie.split("=")
    owner, signature = value.split(".")
    forged = (
        "",
        f"{name}=",
        f"{name}={owner}",
        f"{name}={owner}.",
        f"{name}={owner}.{'0' * 32}",
        f"{name}=x.{signature}",
        f"other={value}",
        f"{name}={g.token}",
        f"{name}={value[:-1]}",
        f"{name}=\xff.{signature}",
    )
    for cookie in forged:
        yield f"cookie {cookie[:30]}", lambda cookie=cookie: g.get("/api/pictures", Cookie=cookie)
        yield f"websocket cookie {cookie[:30]}", lambda cookie=cookie: g.handshake(Cookie=cookie)
    for token in ("", "x", g.token[:-1], g.token + "x", "%00", "\xe9"):
        yield f"token {token[:20]!r}", lambda token=token: g.get(f"/?token={token}", Cookie="")
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "CONNECT", "PROPFIND"):
        yield (
            f"method {method}",
            lambda method=method: g.raw(
                f"{method} /api/pictures HTTP/1.1\r\nHost: {g.us.host}\r\nOrigin: http://{g.us.host}\r\n"
                f"Cookie: {g.us.cookie}\r\nConnection: close\r\n\r\n"
            ),
        )


def _other_users(g: Ground) -> Iterator[tuple[str, Attack]]:
    """A second browser with a cookie of its own, and the first one's ids."""
    theirs = {"Cookie": g.them.cookie}
    for name in ("mask.png", "cutout.png", "coco.json", "log.json"):
        yield f"other user's {name}", lambda name=name: g.get(f"/api/desks/{g.desk}/export/{name}", **theirs)
    yield "other user's mask", lambda: g.get(f"/api/desks/{g.desk}/masks/1/0/0/0/0", **theirs)
    yield "other user's given", lambda: g.post(f"/api/desks/{g.desk}/given?object=1", b"x", **theirs)
    yield "other user's upload", lambda: g.get(f"/api/pictures/{_upload(g)}", **theirs)
    yield (
        "desk on another user's upload",
        lambda: g.post("/api/desks", json.dumps({"picture": _upload(g)}).encode(), "application/json", **theirs),
    )
    yield "other user's socket", lambda: (0 if b"gone" in g.handshake(**theirs)[1] else 200, b"")
    for desk in ("A" * 22, "..%2f" * 4 + "aa", "%00" * 22):
        yield f"guessed desk {desk}", lambda desk=desk: (0 if b'"state"' not in g.handshake(desk)[1] else 200, b"")


def _upload(g: Ground) -> str:
    status, answer = g.post("/api/pictures?name=mine.png", png(np.zeros((8, 8, 3), np.uint8)))
    assert status == 201
    return json.loads(answer)["id"]


def _bodies(g: Ground) -> Iterator[tuple[str, Attack]]:
    head = (
        f"POST /api/pictures HTTP/1.1\r\nHost: {g.us.host}\r\nOrigin: http://{g.us.host}\r\nCookie: {g.us.cookie}\r\n"
    )
    octets = head + "Content-Type: application/octet-stream\r\n"
    large = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    yield "length too large", lambda: g.post("/api/pictures", b"x" * (g.limits.upload_bytes + 1))
    yield (
        "chunks too large",
        lambda: g.raw(octets.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + 2 * large + b"0\r\n\r\n"),
    )
    yield "length that lies", lambda: g.raw(octets + f"Content-Length: {2**70}\r\n\r\nx")
    yield "length below zero", lambda: g.raw(octets + "Content-Length: -1\r\n\r\nx")
    yield "two lengths", lambda: g.raw(octets + "Content-Length: 1\r\nContent-Length: 5\r\n\r\nxxxxx")
    yield "length and chunks", lambda: g.raw(octets + "Content-Length: 5\r\nTransfer-Encoding: gzip\r\n\r\nxxxxx")
    yield "slow body", lambda: g.raw(octets + "Content-Length: 100\r\n\r\nx")
    yield "header too large", lambda: g.raw(octets + f"X-Large: {'x' * 100_000}\r\n\r\n")
    yield "headers too many", lambda: g.raw(octets + "".join(f"X-{i}: {i}\r\n" for i in range(10_000)) + "\r\n")
    yield "no HTTP", lambda: g.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100)
    yield "line without end", lambda: g.raw("GET /" + "a" * 100_000)
    yield "ranges", lambda: _ranges(g)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/html", ""):
        yield f"upload as {kind}", lambda kind=kind: g.post("/api/pictures", b"x", kind)
        yield (
            f"desk as {kind}",
            lambda kind=kind: g.post("/api/desks", json.dumps({"picture": g.picture}).encode(), kind),
        )
    for body in (
        b"",
        b"{",
        b"[]",
        b'{"picture": 1}',
        b'{"picture": "x", "more": 1}',
        b"[" * 50_000,
        b'{"picture": "\\ud800"}',
        b"\xff",
    ):
        yield f"desk {body[:20]!r}", lambda body=body: g.post("/api/desks", body, "application/json")
    yield "desk body too large", lambda: g.post("/api/desks", b" " * 100_000, "application/json")


def _ranges(g: Ground) -> tuple[int, bytes]:
    """A thousand ranges of a file must not become a thousand parts."""
    many = ",".join(f"{i}-" for i in range(1000))
    status, answer = g.get(f"/api/pictures/{g.picture}/tiles/0/0/0", Range=f"bytes={many}")
    return (206 if status == 206 or b"multipart" in answer else 416), b""


def _messages(g: Ground) -> Iterator[tuple[str, Attack]]:
    def command(**value: Any) -> str:
        return json.dumps({"seq": 1, "revision": 0, "command": value})

    texts: Mapping[str, str | bytes] = {
        "empty": "",
        "no JSON": "{",
        "list": "[]",
        "binary": b"\0\1\2",
        "nested": "[" * 20_000,
        "too large": "x" * (g.limits.message_bytes + 1),
        "seq below zero": '{"seq":-1,"revision":0,"command":{}}',
        "seq as text": '{"seq":"1","revision":0,"command":{}}',
        "seq too large": f'{{"seq":{2**60},"revision":0,"command":{{}}}}',
        "unknown key": '{"seq":1,"revision":0,"command":{},"x":1}',
        "no command": command(),
        "unknown command": command(do="eval", object=1),
        "prototype": command(do="__proto__"),
        "NaN": '{"seq":1,"revision":0,"command":{"do":"click","object":1,"x":NaN,"y":1,"positive":true}}',
        "infinity": '{"seq":1,"revision":0,"command":{"do":"click","object":1,"x":1e999,"y":1,"positive":true}}',
        "outside": command(do="click", object=1, x=1e9, y=1, positive=True),
        "text": command(do="click", object=1, x="1", y=1, positive=True),
        "label": command(do="click", object=1, x=1, y=1, positive=2),
        "object 0": command(do="click", object=0, x=1, y=1, positive=True),
        "object of JavaScript": command(do="click", object={"__class__": "x"}, x=1, y=1, positive=True),
        "no such object": command(do="undo", object=10**9),
        "box of no size": command(do="box", object=1, x0=5, y0=5, x1=5, y1=9),
        "name with a line break": command(do="describe", object=1, name="a\r\nSet-Cookie: b=c"),
        "long name": command(do="add", name="x" * 5000),
        "colour": command(do="add", colour="red;background:url(//evil.example)"),
        "mask of another size": command(do="given", object=1, rle={"size": [9, 9], "counts": "Q3"}),
        "mask of much memory": command(do="given", object=1, rle={"size": [10**9, 10**9], "counts": "0"}),
        "mask that lies": command(do="given", object=1, rle={"size": [192, 256], "counts": "~~~~"}),
    }
    for name, text in texts.items():
        yield f"message {name}", lambda text=text: g.message(text)


def _uploads(g: Ground) -> Iterator[tuple[str, Attack]]:
    picture = png(np.zeros((64, 64, 3), np.uint8))
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    files = {
        "SVG": svg,
        "SVG with BOM": b"\xef\xbb\xbf" + svg,
        "HTML": b"<!doctype html><script>alert(1)</script>",
        "PDF": b"%PDF-1.7\n" + b"x" * 99,
        "GIF": b"GIF89a" + b"\0" * 99,
        "ZIP": b"PK\3\4" + b"\0" * 99,
        "TAR": b"x" * 257 + b"ustar\0" + b"\0" * 249,
        "gzip": b"\x1f\x8b\x08" + b"\0" * 99,
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "FITS": b"SIMPLE  =                    T",
        "ELF": b"\x7fELF" + b"\0" * 99,
        "nothing": b"",
        "one byte": b"\x89",
        "cut PNG": picture[:60],
        "cut JPEG": jpeg()[:200],
        "PNG of no size": header_of(picture, 0, 5),
        "larger PNG": header_of(picture, 31_000, 31_000),
        "PNG that lies": header_of(picture, 20_000, 20_000),
        "pickle": b"\x80\x04cos\nsystem\n.",
        "link file": b"!<symlink>/etc/passwd",
    }
    for name, data in files.items():
        yield f"upload {name}", lambda data=data: g.post("/api/pictures?name=x.png", data)
        if name in ("SVG", "HTML", "cut PNG", "larger PNG", "nothing"):
            yield f"given {name}", lambda data=data: g.post(f"/api/desks/{g.desk}/given?object=1", data, "image/png")
    yield "upload PNG bomb", lambda: g.post("/api/pictures?name=x.png", bomb(19_000))
    yield "given PNG bomb", lambda: g.post(f"/api/desks/{g.desk}/given?object=1", bomb(6_000), "image/png")
    yield "given of another size", lambda: g.post(f"/api/desks/{g.desk}/given?object=1", picture, "image/png")
    yield (
        "given to no object",
        lambda: g.post(f"/api/desks/{g.desk}/given?object=77", png(np.zeros((192, 256), np.uint8)), "image/png"),
    )
    for name in ("../../evil.png", "..\\evil.png", "/etc/evil.png", "<script>.png", "a%00b.png", "%ff.png", "x" * 3000):
        yield f"name {name[:20]}", lambda name=name: _named(g, name)


def _named(g: Ground, name: str) -> tuple[int, bytes]:
    """An upload's name may only be shown, as text."""
    before = {path for path in g.folder.parent.rglob("*") if "evil" in path.name}
    path = f"/api/pictures?name={name.replace('<', '%3C').replace('>', '%3E')}"
    status, headers, answer = g.us.ask("POST", path, png(np.zeros((8, 8, 3), np.uint8)))
    if status >= 400:
        return status, answer
    shown = json.loads(answer)["name"]
    plain = not re.search(r"[/\\\x00-\x1f]", shown) and len(shown) <= 100
    kept = before == {path for path in g.folder.parent.rglob("*") if "evil" in path.name}
    typed = headers["content-type"] == "application/json" and headers["x-content-type-options"] == "nosniff"
    return (404 if plain and kept and typed else 200), b""
