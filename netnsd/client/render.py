"""Answers on stdout: tables for people, JSON and YAML for programs, names for scripts."""

from __future__ import annotations

import os
import sys

from netnsd.client.session import Session, printable, write
from netnsd.client.transport import Client
from netnsd.errors import NetnsdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_COLOURS = {"green": "32", "yellow": "33", "red": "31", "dim": "2", "bold": "1"}
_STATE_COLOURS = {"running": "green", "creating": "yellow", "starting": "yellow", "removing": "red",
                  "restarting": "yellow", "exited": "red", "stopped": "dim"}
_ENVIRONMENT_FIELDS = {"id": str, "name": str, "owner": dict, "state": str, "address": str, "ports": list,
                       "services": list, "labels": dict, "created_at": str}


def checked_environment(client: Client, value: Any) -> dict[str, Any]:
    """An answer that is to be an environment. Raises BadAnswer where it is none."""
    ok = isinstance(value, dict) and all(isinstance(value.get(k), t) for k, t in _ENVIRONMENT_FIELDS.items())
    ok = ok and all(isinstance(p, dict) and isinstance(p.get("published"), int) and "port" in p and "protocol" in p
                    for p in value["ports"])
    ok = ok and all(isinstance(s, dict) and isinstance(s.get("command"), list) and {"name", "state"} <= s.keys()
                    for s in value["services"])
    if not ok:
        raise client.bad_answer("not an environment")
    assert isinstance(value, dict)
    return value


def checked_environments(client: Client, value: Any) -> list[dict[str, Any]]:
    """An answer that is to be a list of environments. Raises BadAnswer where it is none."""
    found = value.get("environments") if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise client.bad_answer("not a list of environments")
    return [checked_environment(client, e) for e in found]


def emit(session: Session, value: Any, text: Callable[[], str], names: Sequence[str]) -> None:
    """Print an answer as ``-o`` asks: ``value`` for programs, ``text()`` for people, ``names`` one per line."""
    output = session.output or "table"
    if output == "json":
        import json

        shown = json.dumps(value, indent=2)
    elif output == "yaml":
        import yaml

        shown = yaml.safe_dump(value, sort_keys=False).rstrip("\n")
    elif output == "name":
        shown = "\n".join(printable(n) for n in names)
    else:
        shown = text()
    if shown:
        write(shown)


def delete_each(session: Session, refs: Sequence[str], path: Callable[[str], str], word: str) -> int:
    """Delete what is at the path of each reference, and print it behind ``word``; the first failure's code, or 0."""
    done: list[str] = []
    code = 0
    for ref in dict.fromkeys(refs):
        try:
            session.client.request("DELETE", path(ref))
            done.append(ref)
        except NetnsdError as error:
            session.fail(error)
            code = code or error.exit_code
    emit(session, {word: done}, lambda: "\n".join(f"{word} {printable(ref)}" for ref in done), done)
    return code


def is_coloured() -> bool:
    """Whether stdout is a terminal whose user wants colours (no-color.org)."""
    return (sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb")


def paint(text: str, colour: str) -> str:
    """Text in a colour, where colours are wanted."""
    return f"\033[{_COLOURS[colour]}m{text}\033[0m" if colour and is_coloured() else text


def state_colour(state: str) -> str:
    """The colour of a state, or nothing."""
    return _STATE_COLOURS.get(state, "")


def paint_state(text: str, state: str) -> str:
    """Text in its state's colour."""
    return paint(text, state_colour(state))


def table(rows: list[list[str]], colours: Callable[[int, int], str] = lambda _row, _column: "") -> str:
    """Rows under each other, the first in bold; ``colours(row, column)`` names a cell's colour or nothing."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for r, row in enumerate(rows):
        cells = []
        for c, cell in enumerate(row):
            # Nothing after the last column, so that lines end where their text does.
            padding = " " * (widths[c] - len(cell) + 3) if c + 1 < len(row) else ""
            cells.append(paint(cell, colours(r, c) if r else "bold") + padding)
        lines.append("".join(cells).rstrip())
    return "\n".join(lines)


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """``name  value`` lines; a value of several lines goes on below itself."""
    width = max(len(name) for name, _ in pairs)
    lines = []
    for name, value in pairs:
        first, *rest = value.split("\n")
        lines.append(f"{paint(name.ljust(width), 'bold')}   {first}".rstrip())
        lines += [f"{' ' * width}   {line}" for line in rest]
    return "\n".join(lines)


def age(created_at: str) -> str:
    """How long ago, in one unit: 5s, 3m, 2h, 4d. An unreadable time is ``?``."""
    from datetime import UTC, datetime

    try:
        created = datetime.fromisoformat(created_at)
    except ValueError:
        return "?"
    if created.tzinfo is None:
        created = created.replace(tzinfo=UTC)
    seconds = max(0, int((datetime.now(UTC) - created).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def ports(environment: dict[str, Any]) -> str:
    """``20007->3000, 20008->53/udp``."""
    return ", ".join(f"{p['published']}->{p['port']}" + ("" if p["protocol"] == "tcp" else f"/{p['protocol']}")
                     for p in environment["ports"])


def service_state(service: dict[str, Any]) -> str:
    """``running``, ``running (healthy)``, ``exited 1`` or ``restarting 1``."""
    code, health = service.get("exit_code"), service.get("health")
    ended = service["state"] in ("exited", "restarting") and code is not None
    return str(service["state"]) + (f" {code}" if ended else "") + (f" ({health})" if health else "")


def services(environment: dict[str, Any]) -> str:
    """``main: running, db: exited 1``."""
    return ", ".join(f"{s['name']}: {service_state(s)}" for s in environment["services"])


def size(count: float, step: int = 1024) -> str:
    """Bytes, or with a step of 1000 bits per second, as they are typed: 512M."""
    for unit in "TGMK":
        scale = step ** ("KMGT".index(unit) + 1)
        if count >= scale and count % (scale / 4) == 0:
            return f"{count / scale:g}{unit}"
    return f"{count:.15g}"


def limits(resources: dict[str, Any]) -> str:
    """``memory 512M, cpu 1.5, pids 60``."""
    shown = {"memory": size, "bandwidth": lambda rate: size(rate, 1000)}
    return ", ".join(f"{name} {shown.get(name, str)(limit)}" for name, limit in resources.items()
                     if isinstance(limit, int | float))


def addresses(environment: dict[str, Any]) -> list[str]:
    """Where each port is reached from the host. By ``localhost``: many dev servers refuse other host names."""
    found = []
    for p in environment["ports"]:
        shown = (f"http://localhost:{p['published']}/" if p["protocol"] == "tcp"
                 else f"localhost:{p['published']}/{p['protocol']}")
        found.append(f"{shown} -> {p['port']}")
    return found


def user_name(environment: dict[str, Any]) -> str:
    """The owner's user name."""
    return str(environment["owner"].get("user", "?"))


def ref_name(environment: dict[str, Any], uid: int) -> str:
    """What the user ``uid`` calls it: a name of its own, NAME.USER for somebody else's."""
    name = str(environment["name"])
    return name if environment["owner"].get("uid") == uid else f"{name}.{user_name(environment)}"


def overview(environments: list[dict[str, Any]], with_owner: bool) -> str:
    """A table of environments."""
    rows = [["NAME", "STATE", "ADDRESS", "PORTS", "SERVICES", "AGE"] + (["OWNER"] if with_owner else [])]
    for e in environments:
        row = [e["name"], e["state"], e["address"], ports(e) or "-", services(e) or "-", age(e["created_at"])]
        rows.append(row + ([user_name(e)] if with_owner else []))

    def colour(row: int, column: int) -> str:
        environment = environments[row - 1]
        if column == 1:
            return state_colour(environment["state"])
        failed = any((s["state"] in ("exited", "restarting") and s.get("exit_code") != 0)
                     or s.get("health") == "unhealthy" for s in environment["services"])
        return "red" if column == 4 and failed else ""

    return table(rows, colour)


def summary(environment: dict[str, Any]) -> str:
    """One environment in few lines: name, state, address, ended services, URLs."""
    state = environment["state"]
    name, address = printable(environment["name"]), printable(environment["address"])
    lines = [f"{paint(name, 'bold')} is {paint_state(printable(state), state)} at {address}"]
    lines += [f"  {printable(where)}" for where in addresses(environment)]
    lines += [f"  {printable(s['name'])} {paint_state(printable(service_state(s)), s['state'])}"
              for s in environment["services"] if s["state"] in ("exited", "restarting")]
    return "\n".join(lines)
