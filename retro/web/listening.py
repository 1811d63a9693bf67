"""Where a server listens, and the token it asks for."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

API_KEY = "RETRO_API_KEY"


def read_api_key(file: str | None) -> str | None:
    """The bearer token: the file's content, else that of the environment's RETRO_API_KEY; None if there is neither."""
    key = os.environ.get(API_KEY) if file is None else Path(file).read_text(encoding="utf-8", errors="replace").strip()
    if key is None:
        return None
    if not key or not all("!" <= letter <= "~" for letter in key):
        raise ValueError(f"the token in {file or API_KEY} is empty or not ASCII without spaces; write another.")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host} port {port} ({error}); give another --host or --port.") from None


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def names_of(bound: socket.socket, host: str, api_key: str | None) -> list[str] | None:
    """The names by which a server without a token may be called on its own machine; None if any will do.

    Warns of one that others can reach and that asks for no token.
    """
    local = ipaddress.ip_address(bound.getsockname()[0]).is_loopback
    if not local and api_key is None:
        logger.warning("anyone who reaches %s may ask, and read the stores; give --api-key-file.", host)
    names = dict.fromkeys([f"[{host}]" if ":" in host else host, "127.0.0.1", "localhost", "[::1]"])
    return list(names) if local and api_key is None else None


def run(app: FastAPI, bound: socket.socket, grace_seconds: float) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what has begun, for at most `grace_seconds`; what is left then ends
    with an error."""
    from retro.web.connections import make_server

    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after its shutdown, which is a good end
    make_server(app, grace_seconds).run(sockets=[bound])
