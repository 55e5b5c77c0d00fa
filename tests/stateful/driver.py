"""What the machine asks of the two worlds that it runs in: the service on fakes, and a real daemon on a real host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

ALICE, BOB, CAROL = "alice", "bob", "carol"  # carol is an admin


class Driver(Protocol):
    """Users are given by name. Nothing here knows what should be."""

    numbers: tuple[int, int]

    def begin(self) -> None:
        """Have a daemon that runs, with nothing in it."""
        ...

    def ask(self, user: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """A request: status and answer. What it began behind the answer may go on."""
        ...

    def specification(self, command: str) -> dict[str, Any]:
        """The fields of a service that runs one of the model's commands."""
        ...

    def execute(self, user: str, ref: str, code: int) -> int | str:
        """Run a command that ends with ``code``: how it ended, or the error's code."""
        ...

    def end(self, pids: Sequence[int]) -> int:
        """Kill servers; returns the exit code that they end with, where somebody can tell."""
        ...

    def crash(self, meanwhile: Callable[[], None], *, launcher: bool) -> None:
        """Kill the daemon, and with ``launcher`` that too, do something, and start it again."""
        ...

    def crash_during(self, user: str, method: str, path: str, body: Any, moment: int) -> None:
        """Begin a request, kill the daemon in the middle of it, and start it again. ``moment``: 0 to 60, how late."""
        ...

    def restart(self) -> None:
        """Stop it in peace, and start it again."""
        ...

    def lose_launcher(self) -> None:
        """Kill the launcher under a daemon that runs."""
        ...

    def flush(self) -> None:
        """Take the firewall's rules away, as another tool does; they come back by themselves."""
        ...

    def greeting(self, user: str, number: int) -> str:
        """The id of the environment whose server answers at a published TCP port, or what else there is."""
        ...

    def is_alive(self, pid: int) -> bool:
        """Whether that process runs."""
        ...

    def agree(self, differences: Callable[[], list[str]]) -> None:
        """Find none within the time that it may take. Raises AssertionError with those that stay."""
        ...

    def inside(self, visible: int, published: int) -> list[str]:
        """How store, registry and kernel differ from each other, and from so many environments with so many ports."""
        ...

    def residue(self) -> list[str]:
        """What there is, where nothing should be."""
        ...
