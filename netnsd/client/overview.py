"""What ``ls`` does, once its command line is read. Without click."""

from __future__ import annotations

import os
import sys

from netnsd.client import render
from netnsd.client.arguments import parse_labels
from netnsd.client.session import Session, say
from netnsd.client.transport import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def list_environments(session: Session, everyones: bool, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """The environments that match all of ``labels`` (``k=v``): the caller's own, or everyone's (admins)."""
    query = ["all=1"] if everyones else []
    query += [f"label={quote(f'{key}={value}')}" for key, value in parse_labels(labels).items()]
    answer = session.client.request("GET", "/v1/environments" + ("?" + "&".join(query) if query else ""))
    return render.checked_environments(session.client, answer)


def ls(session: Session, *, everyones: bool, labels: tuple[str, ...], quiet: bool) -> None:
    """List environments."""
    if quiet:
        session.output = "name"
    found = list_environments(session, everyones, labels)
    uid = os.getuid()
    render.emit(session, found, lambda: render.overview(found, everyones),
                [render.ref_name(e, uid) if everyones else e["name"] for e in found])
    if not found and session.output in (None, "table") and sys.stdout is not None and sys.stdout.isatty():
        say("  nothing yet: netnsctl create NAME --port 3000 -- COMMAND")
