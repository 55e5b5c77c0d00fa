"""Who asks, and what they may do to which environment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Actor:
    """A caller, as the kernel vouched for it when it connected. ``home`` and ``shell`` are the account's.

    ``how``: what says who it is, the Unix socket or a bearer token.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    user: str
    home: str
    shell: str
    is_admin: bool
    how: Literal["unix", "token"] = field(default="unix", compare=False)

    def may_see(self, uid: int) -> bool:
        """Whether environments of ``uid`` exist for this caller at all."""
        return self.is_admin or uid == self.uid


# The ids of a user ("user", name), or of all members of a group ("group", name); None where there is no such one.
Members = Callable[[str, str], Awaitable[tuple[int, ...] | None]]
# Who a user is now, with the groups that a login would give; None where there is no such account any more.
Account = Callable[[int], Awaitable[Actor | None]]
# The same by uid or by name, with an admin's rights where the account has them.
Login = Callable[[int | str], Awaitable[Actor | None]]
