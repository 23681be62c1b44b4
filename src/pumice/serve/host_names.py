"""The names that a server answers to when only this machine reaches it and nobody needs a key.

A site can have its own name lead to 127.0.0.1 once its page is loaded (DNS rebinding). The browser
then takes the server here for that site and lets the page read all of it; nothing but the Host
header tells the two apart.
"""

from __future__ import annotations

import ipaddress
import re
import socket

from pumice.serve.errors import ApiError

# [::1]:8000, localhost:8000, and each without its port.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*))(?::\d*)?")


def local_host(host: str, listener: socket.socket) -> str | None:
    """The `host` that was asked for, where only this machine reaches the port; None elsewhere."""
    return host if _is_loopback(listener.getsockname()[0]) else None


def foreign_host(header: bytes, local: str) -> ApiError | None:
    """403 for a Host header that names neither this machine nor `local`; None for one that does."""
    given = header.decode("latin-1")
    found = _HOST.fullmatch(given)
    name = (found[1] or found[2] or "").lower().removesuffix(".") if found else ""
    if name in ("localhost", local.lower()) or _is_loopback(name):
        return None
    known = dict.fromkeys(
        ("localhost", "127.0.0.1", "[::1]", f"[{local}]" if ":" in local else local)
    )
    return ApiError(
        403,
        f"the request's Host header is {given!r:.80}; without an API key this server answers to "
        f"{', '.join(known)} alone, on any port, for a page of another site could come under any "
        f"other name. Use one of these, or start the server with --api-key KEY, or with --host "
        f"ADDRESS if others are to reach it.",
        code="host_not_allowed",
    )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
