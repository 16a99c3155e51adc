"""Who is let in, and what goes out: the guard alone, without a server."""

import asyncio
import json

import pytest

from hrsam.demo.guard import HEADERS, Guard, keyed, read_secret

PORT, SECRET = 8321, b"s" * 32


async def app(scope, receive, send):
    """Answers who asked; a WebSocket is accepted."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept", "headers": []})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"ALLOW")]})
    await send({"type": "http.response.body", "body": scope["owner"].encode()})


def ask(guard, path="/api/x", *, kind="http", method="GET", query=b"", **headers):
    """Status, headers, body; for a WebSocket whether it was accepted.  ``None`` leaves a header out, a tuple repeats it."""
    sent = []
    given = {"host": f"127.0.0.1:{PORT}", **headers}
    for name, value in given.items():
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                sent.append((name.replace("_", "-").encode(), one.encode("latin-1")))
    out = []

    async def send(message):
        out.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    scope = {"type": kind, "path": path, "query_string": query, "headers": sent, "method": method}
    asyncio.run(guard(scope, receive, send))
    if kind == "websocket":
        return out[0]["type"] == "websocket.accept"
    return out[0]["status"], {k.decode(): v.decode() for k, v in out[0]["headers"]}, out[1]["body"]


@pytest.fixture
def guard():
    return Guard(app, host="127.0.0.1", port=PORT, secret=SECRET)


def enter(guard, **headers):
    status, sent, _ = ask(guard, "/", query=f"token={guard.token}".encode(), **headers)
    assert status == 303
    return sent["set-cookie"].split(";")[0]


OURS = {"origin": f"http://127.0.0.1:{PORT}"}


def test_the_token_buys_a_cookie_and_the_cookie_lets_in(guard):
    status, headers, _ = ask(guard, "/", query=f"token={guard.token}".encode())
    assert (status, headers["location"]) == (303, "/")
    name, *options = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(options)
    status, _, owner = ask(guard, cookie=name)
    assert status == 200
    assert guard.token.encode() not in owner
    assert ask(guard, cookie=f"a=b; {name}; c=d")[2] == owner
    assert ask(guard, kind="websocket", cookie=name, **OURS)
    assert ask(guard, method="POST", cookie=name, **OURS)[0] == 200


def test_browsers_are_told_apart_and_recognised_after_a_restart(guard):
    first, second = enter(guard), enter(guard)
    assert ask(guard, cookie=first)[2] != ask(guard, cookie=second)[2]
    assert enter(guard, cookie=first) == first  # opening the address again keeps the work
    again = Guard(app, host="127.0.0.1", port=PORT, secret=SECRET)
    assert again.token != guard.token
    assert ask(again, cookie=first)[2] == ask(guard, cookie=first)[2]
    other = Guard(app, host="127.0.0.1", port=PORT, secret=b"t" * 32)
    assert ask(other, cookie=first)[0] == 403


@pytest.mark.parametrize("token", [b"", b"token=", b"token=x", b"token", b"\xff", b"token=%00", b"tok=x&token=y"])
def test_other_tokens_are_refused(guard, token):
    assert ask(guard, "/", query=token or b"x")[0] == 403


def test_nothing_without_a_cookie(guard):
    for path in ("/", "/static/page.js", "/api/about", "/favicon.ico"):
        status, headers, body = ask(guard, path)
        assert status == 403
        assert json.loads(body)["error"]["text"].startswith("open the address that hrsam demo printed")
        assert "set-cookie" not in headers
    assert not ask(guard, kind="websocket", **OURS)


@pytest.mark.parametrize(
    "change", [lambda c: c[:-1], lambda c: c + "0", lambda c: c.replace(".", "x."), lambda c: "x" + c]
)
def test_forged_cookies_are_refused(guard, change):
    assert ask(guard, cookie=change(enter(guard)))[0] == 403


@pytest.mark.parametrize(
    ("host", "name", "good"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "[::1]", True),
        ("127.0.0.1", "192.168.1.5", False),
        ("127.0.0.1", "evil.example", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "127.0.0.1.", False),
        ("0.0.0.0", "192.168.1.5", True),
        ("0.0.0.0", "[2001:db8::1]", True),
        ("0.0.0.0", "evil.example", False),
        ("box.local", "box.local", True),
        ("box.local", "other.local", False),
    ],
)
def test_names_it_answers_to(host, name, good):
    guard = Guard(app, host=host, port=PORT, secret=SECRET)
    cookie = enter(guard)
    assert (ask(guard, host=f"{name}:{PORT}", cookie=cookie)[0] == 200) == good
    assert ask(guard, host=f"{name}:{PORT + 1}", cookie=cookie)[0] == 421
    assert ask(guard, host=name, cookie=cookie)[0] == 421
    assert (
        ask(guard, kind="websocket", host=f"{name}:{PORT}", origin=f"http://{name.lower()}:{PORT}", cookie=cookie)
        == good
    )


def test_one_host_exactly(guard):
    cookie = enter(guard)
    for host in (None, "", ("127.0.0.1:8321", "evil.example:8321"), "127.0.0.1:8321 ", "x@127.0.0.1:8321"):
        assert ask(guard, host=host, cookie=cookie)[0] == 421
    assert (
        ask(Guard(app, host="127.0.0.1", port=80, secret=SECRET), host="127.0.0.1")[0] == 403
    )  # only the cookie is missing


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "null",
        "",
        "http://evil.example",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        "http://localhost:8321",
        ("a", "b"),
    ],
)
def test_foreign_pages_change_nothing_and_open_no_socket(guard, origin):
    cookie = enter(guard)
    assert not ask(guard, kind="websocket", cookie=cookie, origin=origin)
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert ask(guard, method=method, cookie=cookie, origin=origin)[0] == 403
    if origin is not None:
        assert ask(guard, cookie=cookie, origin=origin)[0] == 403


@pytest.mark.parametrize(
    ("site", "status"), [("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)]
)
def test_what_the_browser_says_of_the_page_counts(guard, site, status):
    assert ask(guard, cookie=enter(guard), sec_fetch_site=site)[0] == status


def test_every_answer_carries_the_headers(guard):
    cookie = enter(guard)
    answers = (
        ask(guard, cookie=cookie),
        ask(guard),
        ask(guard, host="x"),
        ask(guard, "/", query=f"token={guard.token}".encode()),
    )
    for _, headers, _ in answers:
        assert {name: headers[name] for name in HEADERS} == HEADERS  # ours win over the application's
        assert not any(name.startswith("access-control") for name in headers)
    policy = HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert HEADERS["x-content-type-options"] == "nosniff"


def test_the_address_that_is_printed():
    for host, shown in (
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "[::1]"),
        ("box.local", "box.local"),
    ):
        guard = Guard(app, host=host, port=PORT, secret=SECRET, token="T")
        assert guard.url == f"http://{shown}:{PORT}/?token=T"


def test_the_secret_outlives_the_process_and_is_ours_alone(tmp_path):
    first = read_secret(tmp_path / "secret")
    assert len(first) == 32
    assert read_secret(tmp_path / "secret") == first
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ValueError, match="is damaged; delete it"):
        read_secret(tmp_path / "secret")
    assert keyed(SECRET, "a", "x") != keyed(SECRET, "b", "x")
