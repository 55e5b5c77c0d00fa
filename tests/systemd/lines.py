"""A server in an environment, and one TCP connection to it that is asked all the time whether it lives."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import Container, User

PORT = 3000
_SECONDS = 20.0

_PROGRAMS = Path(__file__).with_name("programs")
_SERVER, _CLIENT = ((_PROGRAMS / name).read_text(encoding="utf-8") for name in ("echo.py", "hold.py"))


@dataclass(frozen=True, slots=True)
class Server:
    """An environment with an echo server in it."""

    container: Container
    name: str
    user: User

    @classmethod
    def started(cls, container: Container, name: str, user: User) -> Server:
        """Create it, and wait until it listens."""
        command = ["python3", "-c", _SERVER, str(PORT)]
        container.ctl("create", name, "--port", str(PORT), "--wait", "--", *command, user=user)
        return cls(container, name, user)

    def shown(self) -> dict[str, Any]:
        """What netnsctl shows of it."""
        environment: dict[str, Any] = self.container.ctl_json("show", self.name, user=self.user)
        return environment

    def identity(self) -> tuple[Any, ...]:
        """What must stay the same while it lives: id, address, published port, its process."""
        shown = self.shown()
        (service,) = shown["services"]
        return shown["id"], shown["address"], shown["ports"][0]["published"], service["pid"], service["state"]

    def answers(self) -> bool:
        """Whether a new connection to its published port is answered."""
        with self.line():
            return True

    @contextlib.contextmanager
    def line(self) -> Iterator[None]:
        """One connection that must hold from the beginning of the block to its end."""
        published = self.shown()["ports"][0]["published"]
        client = self.container.popen(["python3", "-c", _CLIENT, str(published)], user=self.user,
                                      stdin=subprocess.PIPE)
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            readable, _, _ = select.select([client.stdout], [], [], _SECONDS)
            assert readable, "no connection came about"
            assert client.stdout.readline() == b"connected\n", client.stdout.read().decode()
            yield
        finally:
            client.stdin.close()
            client.wait(timeout=_SECONDS)
        said = client.stdout.read().decode()
        assert client.returncode == 0, f"the connection did not hold:\n{said}"
        answers, longest = said.split()
        assert int(answers) > 0
        assert float(longest) < 5.0

    def remove(self) -> None:
        """Remove the environment."""
        self.container.ctl("rm", self.name, user=self.user)


def messages(container: Container, unit: str) -> list[dict[str, Any]]:
    """What a unit's main process logged, as the objects that its lines are. Fails where a line is none.

    Why a start failed is said in words.
    """
    said = [entry["MESSAGE"] for entry in container.journal(unit) if entry.get("_TRANSPORT") == "stdout"]
    return [json.loads(line) for line in said if not line.startswith(("netnsd: ", "  hint: "))]
