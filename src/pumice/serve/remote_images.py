"""Images from web addresses, off unless hosts are named: only those hosts, and never inwards.

A server that fetches what a stranger names can be made to read its own network. So every address,
also of a redirect, must be http or https, on the list, and resolve to public addresses alone; the
connection goes to the very address that was checked.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from pumice.core.errors import DataError

MAX_REDIRECTS = 3
_CHUNK = 2**16
# Nothing ends a look-up from outside. One whose time is over goes on by itself until the system
# gives it up, and if so many do, others wait for them.
_MAX_LOOKUPS = 16
_lookups = threading.BoundedSemaphore(_MAX_LOOKUPS)
# IPv6 addresses that lead on to an IPv4 one, which may lie inside; and site-local ones.
_GATEWAYS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "::/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2001::/32",
        "2002::/16",
        "fec0::/10",
    )
)
_MOVED = (301, 302, 303, 307, 308)


def fetch_image(url: str, hosts: frozenset[str], *, max_bytes: int, seconds: float) -> bytes:
    """The bytes behind a web address; DataError for what is not allowed, too large or too slow."""
    deadline = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        parts = _checked(url, hosts)
        found = _get(url, parts, max_bytes, deadline)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise DataError(f"the image {url[:80]} is redirected more than {MAX_REDIRECTS} times.")


def _checked(url: str, hosts: frozenset[str]) -> SplitResult:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise DataError(f"the image {url[:80]!r} is no web address: {error}.") from error
    allowed = ", ".join(sorted(hosts)) or "none"
    if parts.scheme not in ("http", "https") or parts.username or parts.password:
        raise DataError(
            f"the image {url[:80]!r} cannot be fetched; http and https addresses without a "
            f"password are allowed. Send it as a data URI."
        )
    if host.lower() not in hosts or port not in (None, 80, 443):
        raise DataError(
            f"the image {url[:80]!r} lies on {host!r}, which is not a host to fetch from "
            f"(allowed: {allowed}; ports 80 and 443). Send it as a data URI."
        )
    return parts


def _public_address(host: str, port: int, deadline: float) -> str:
    try:
        found = _looked_up(host, port, deadline)
    except TimeoutError as error:
        raise DataError(
            f"the image's host {host!r} took too long to look up: its name was not answered in "
            f"time. Send the image as a data URI."
        ) from error
    except OSError as error:
        raise DataError(f"the image's host {host!r} is not found: {error}.") from error
    addresses = [str(entry[4][0]) for entry in found]
    inward = [address for address in addresses if not _is_public(address)]
    if inward or not addresses:
        raise DataError(
            f"the image's host {host!r} is {inward[0] if inward else 'nowhere'}, an address that "
            f"is not public; nothing is fetched from there. Send the image as a data URI."
        )
    return addresses[0]


def _looked_up(host: str, port: int, deadline: float) -> list[Any]:
    """What getaddrinfo says; TimeoutError where it says nothing before the deadline."""
    if not _lookups.acquire(timeout=_left(deadline)):
        raise TimeoutError("too many other look-ups hang")
    found: Future[list[Any]] = Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:  # ValueError: a name that no DNS could hold
            found.set_exception(error)
        finally:
            _lookups.release()

    threading.Thread(target=look_up, name="look-up", daemon=True).start()
    return found.result(timeout=_left(deadline))


def _left(deadline: float) -> float:
    """Seconds; not none at all, which would mean no limit to some and no waiting to others."""
    return max(0.1, deadline - time.monotonic())


def _is_public(address: str) -> bool:
    """Whether an address, and the IPv4 one that an IPv6 one may stand for, is on the open net."""
    found = ipaddress.ip_address(address.split("%")[0])
    if any(found in network for network in _GATEWAYS if network.version == found.version):
        return False
    return found.is_global and not found.is_multicast


def _get(url: str, parts: SplitResult, max_bytes: int, deadline: float) -> bytes | str:
    """The body, or the address a redirect names."""
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    connection = http.client.HTTPConnection(host, port)
    try:
        address = _public_address(host, port, deadline)
        raw = socket.create_connection((address, port), timeout=_left(deadline))
        with _cut_off(raw, deadline):
            connection.sock = (
                ssl.create_default_context().wrap_socket(raw, server_hostname=host)
                if secure
                else raw
            )
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "pumice"})
            response = connection.getresponse()
            if response.status in _MOVED:
                return response.headers.get("Location", "")
            if response.status != 200:
                raise DataError(f"the image {url[:80]!r} answers with HTTP {response.status}.")
            return _read(url, response, max_bytes, deadline)
    except DataError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() > deadline:
            raise DataError(f"the image {url[:80]!r} took too long to fetch.") from error
        raise DataError(f"the image {url[:80]!r} cannot be fetched: {error}.") from error
    finally:
        connection.close()


@contextmanager
def _cut_off(connected: socket.socket, deadline: float) -> Iterator[None]:
    """Shuts a connection down at the deadline.

    Its own timeout begins anew with every byte, so that a drip of them would never end.
    """
    with connected.dup() as same:  # wrapping in TLS takes the socket itself away

        def shut() -> None:
            with suppress(OSError):
                same.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, deadline - time.monotonic()), shut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _read(url: str, response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    """The body; after the deadline, when it may have been cut off, TimeoutError."""
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise DataError(f"the image {url[:80]!r} has more than {max_bytes} bytes.")
    if time.monotonic() > deadline:
        raise TimeoutError("its end is missing")
    return bytes(body)
