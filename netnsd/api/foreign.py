"""Requests that somebody else's web page has a browser send: refused, whoever's browser it is.

A page can send requests to any address (cross-site request forgery), and where its own name leads to our address it can
read the answers too (DNS rebinding). Browsers tell of both, and programs have no reason to say such things.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from netnsd.errors import ForeignRequest

_HOST = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9._-]{1,253}))(?::[0-9]{1,5})?\Z")
_TOLD = frozenset({b"host", b"origin", b"referer", b"sec-fetch-site"})
_HINT = "Call the API from a program, at http://localhost/."


def require_own(headers: Iterable[tuple[bytes, bytes]], *, is_certified: bool) -> None:
    """Raise ForeignRequest where a request names another host, or comes from a page of another origin.

    Args:
        headers: of the request, names in lower case.
        is_certified: it came by TLS, where a browser compares the name with our certificate. Without that the daemon is
            ``localhost``, or an address of the loopback: it listens nowhere else then.

    See https://fetch.spec.whatwg.org/#origin-header and https://www.w3.org/TR/fetch-metadata/.
    """
    told = [(name, value.decode("latin-1").lower()) for name, value in headers if name in _TOLD]
    host = next((value for name, value in told if name == b"host"), "")
    if host and not is_certified and not _is_ours(host):
        raise ForeignRequest(f"{host[:80]!r} is not this daemon", hint=_HINT)
    for name, value in told:
        if name == b"sec-fetch-site" and value not in ("same-origin", "none"):
            raise ForeignRequest("a web page of elsewhere sent this request", hint=_HINT)
        # The same host at another port is anybody's: published ports are.
        if name in (b"origin", b"referer") and not _is_of(value, host):
            raise ForeignRequest(f"the request comes from {value[:80]!r}", hint=_HINT)


def _is_ours(host: str) -> bool:
    if host == "localhost":
        return True
    match = _HOST.match(host)
    if match is None:
        return False
    name = match[1] or match[2]
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_of(url: str, host: str) -> bool:
    """Whether an origin, or an address of a page, is that of this host and port."""
    scheme, separator, rest = url.partition("://")
    return bool(host and separator) and scheme in ("http", "https") and re.split(r"[/?#]", rest, maxsplit=1)[0] == host
