"""The click page's server: who listens where, for how long, and within which limits."""

from __future__ import annotations

import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from typing import Any

import uvicorn

from hrsam.demo import decoder
from hrsam.demo.guard import LOOPBACK, Guard
from hrsam.demo.routes import make_app
from hrsam.demo.site import Site


def listen(host: str, port: int | None) -> socket.socket:
    """A listening socket; without a ``port`` the first free one from 8321 on.  ``ValueError`` when there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(8321, 8341) if port is None else (port,):
        found = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":  # there it would share a port that is taken
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, candidate))
            found.listen(128)
        except (OSError, OverflowError) as error:
            found.close()
            if port is not None:
                raise ValueError(f"cannot listen on {host} port {port} ({error}); choose another --port") from None
            continue
        return found
    raise ValueError(f"cannot listen on {host}, ports 8321 to 8340 are taken; choose another with --port")


class Server(uvicorn.Server):
    """A web server for ``site``, guarded, within its limits.  ``url``: what opens the page; who knows it may use the server."""

    def __init__(self, site: Site, host: str, port: int):
        self.guard = Guard(make_app(site), host=host, port=port, secret=site.secret)
        self.url = self.guard.url
        limits = site.limits
        config = uvicorn.Config(
            self.guard, http="h11", log_level="warning", access_log=False, server_header=False, proxy_headers=False,
            limit_concurrency=limits.connections, h11_max_incomplete_event_size=limits.header_bytes,
            ws_max_size=limits.message_bytes, ws_per_message_deflate=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        super().__init__(config)


def serve(site: Site, host: str, listening: socket.socket, *, browser: bool, say: Callable[[str], Any]) -> None:
    """Answer until Ctrl-C.  ``host``: as a person named it.  ``browser``: open the page in one."""
    server = Server(site, host, listening.getsockname()[1])
    if host not in LOOPBACK:
        say("warning: other machines can reach this server, nothing is encrypted, and who knows the address may use it")
    say(f"click page: {server.url}")
    if browser:
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    decoder.start()
    try:
        server.run(sockets=[listening])
    finally:
        site.close()
