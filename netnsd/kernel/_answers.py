"""What a launcher may say to the daemon: it can be of another version, or no launcher at all."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from netnsd.errors import LauncherUnavailable

T = TypeVar("T")
# Signals go to it: 0, -1 and 1 would be others.
Pid = Annotated[int, msgspec.Meta(gt=1, lt=1 << 31)]
_Code = Annotated[int, msgspec.Meta(ge=0, le=255)]


class Failure(msgspec.Struct, frozen=True):
    """A step of a start that failed: see ``_order.StageError``."""

    stage: str
    errno: str
    message: str
    hint: str


class Ended(msgspec.Struct, frozen=True):
    """An end: 128 + n for a death by signal n."""

    launch_id: str
    code: _Code


class Known(msgspec.Struct, frozen=True):
    """Pairs of launch id and pid, and of launch id and exit code."""

    running: list[tuple[str, Pid]]
    exits: list[tuple[str, _Code]]


def understood(value: object, kind: type[T]) -> T:
    """``value`` as one of these. Raises LauncherUnavailable."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise not_understood(error) from error


def not_understood(why: object) -> LauncherUnavailable:
    """The error for what is none of these."""
    return LauncherUnavailable(f"the launcher's answer is not understood: {why}",
                               hint="Restart it (systemctl restart netnsd-launcher): servers go on.")
