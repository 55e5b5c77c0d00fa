"""One command to start, as it was ordered: decoded, checked, and encoded for exec. And what is said when a step fails.

Part of the launcher: standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import resource

TYPE_CHECKING = False  # typing itself would add a tenth to the launcher's memory, and forks cost by that
if TYPE_CHECKING:
    from typing import Any

_MAX_SUBJECT_BYTES = 512
_LIMITS = {name[7:].lower(): getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}


class StageError(Exception):
    """A step failed: its stage, an errno, and what it was about (a path, a name, or nothing)."""

    def __init__(self, stage: str, number: int, subject: str = "") -> None:
        super().__init__(stage, number, subject)
        self.stage = stage
        self.number = number
        # Users choose it: no answer may grow beyond a message for it, and the cut may go through a character.
        self.subject = subject.encode("utf-8", "replace")[:_MAX_SUBJECT_BYTES].decode("utf-8", "replace")

    @property
    def errno_name(self) -> str:
        """Such as EACCES."""
        return errno.errorcode.get(self.number, str(self.number))

    @property
    def message(self) -> str:
        """For people, such as ``chdir: Permission denied: /srv/x``."""
        reason = os.strerror(self.number) if self.number else "failed"
        return f"{self.stage}: {reason}" + (f": {self.subject}" if self.subject else "")

    @property
    def hint(self) -> str:
        """What to do next; empty where there is nothing to say."""
        return _HINTS.get((self.stage, self.number)) or _HINTS.get((self.stage, 0), "")

    def encode(self) -> bytes:
        """As it travels through a pipe, in one atomic write."""
        subject = _bytes(self.subject)[:_MAX_SUBJECT_BYTES]
        return b"\0".join((self.stage.encode(), str(self.number).encode(), subject))

    @classmethod
    def decode(cls, data: bytes) -> StageError:
        """The inverse of ``encode``."""
        stage, number, subject = data.split(b"\0", 2)
        return cls(stage.decode(), int(number), subject.decode("utf-8", "replace"))


_HINTS = {
    ("chdir", errno.ENOENT): "Create the directory, or name another with --cwd.",
    ("chdir", errno.EACCES): "The command's user may not enter that directory. Name another with --cwd.",
    ("exec", errno.ENOENT): "Check the command's name and PATH; of a script, check the interpreter in its first line.",
    ("exec", errno.EACCES): "The file is there, but the command's user may not execute it (chmod +x).",
    ("exec", errno.ENOEXEC): "A script needs a first line such as #!/bin/sh.",
    ("exec", errno.E2BIG): "Arguments and variables together are too large.",
    ("exec", errno.EAGAIN): "The user has as many processes as its limit allows.",
    ("fork", errno.EAGAIN): "The environment, or the host, has as many processes as its limit allows.",
    ("limits", 0): "Limits are named as in `ulimit`'s system calls: nofile, nproc, core ...",
    ("mounts", 0): "`netnsctl doctor` checks what this host lacks.",
}


class Order:
    """What a launch is made of.

    Raises StageError for a limit that does not exist, ValueError for anything else malformed.
    """

    __slots__ = ("argv", "cwd", "env", "gid", "groups", "hard_limits", "hostname", "hosts_file", "joins",
                 "limits",
                 "resolv_file", "setuid", "tty", "uid", "umask")

    def __init__(self, data: bytes) -> None:
        try:
            fields: dict[str, Any] = json.loads(data)
            self.argv = [_bytes(argument) for argument in fields["argv"]]
            self.env = {_bytes(name): _bytes(value) for name, value in fields["env"].items()}
            self.cwd = _text(fields["cwd"])
            self.uid = _id(fields["uid"])
            self.gid = _id(fields["gid"])
            self.groups = [_id(group) for group in fields["groups"]]
            self.umask = _whole(fields["umask"]) & 0o777
            self.limits = _limits(fields["limits"])
            self.hard_limits = _limits(fields["hard_limits"])
            self.setuid = bool(fields["setuid"])
            self.hosts_file = _text(fields["hosts_file"])
            self.resolv_file = None if fields["resolv_file"] is None else _text(fields["resolv_file"])
            self.hostname = _text(fields["hostname"])
            self.tty = bool(fields["tty"])
            self.joins = [_text(group) for group in fields.get("joins", ())]  # an earlier daemon knows none
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"malformed order: {error!r}") from error
        if not self.argv:
            raise ValueError("malformed order: no command")


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("malformed order: not a text without NUL")
    return value


def _bytes(value: Any) -> bytes:
    return _text(value).encode("utf-8", "surrogateescape")


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError("malformed order: not a whole number")  # noqa: TRY004  # malformed, as a value
    return value


def _id(value: Any) -> int:
    # -1 means "unchanged" to setresuid(2), which would leave the command with root's ids.
    if not isinstance(value, int) or not 0 <= value < 2**32 - 1:
        raise ValueError("malformed order: not a user or group id")
    return value


def _limits(wanted: dict[str, int]) -> list[tuple[int, int]]:
    for name, soft in wanted.items():
        if name not in _LIMITS:
            raise StageError("limits", errno.EINVAL, name)
        if not isinstance(soft, int) or soft < resource.RLIM_INFINITY:
            raise ValueError(f"malformed order: limit {name}")
    return [(_LIMITS[name], soft) for name, soft in wanted.items()]
