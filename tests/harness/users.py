"""The users that every disposable host has, beside the machine's own."""

from __future__ import annotations

from dataclasses import dataclass

HOMES = "/run/home"
GROUPS = {"netnsdtest": 61010, "netnsd": 61020, "netnsd-admin": 61021}


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who calls netnsctl. ``groups`` are supplementary; the primary group has the user's name."""

    name: str
    uid: int
    gid: int
    home: str
    groups: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def _user(name: str, uid: int, *groups: str) -> User:
    return User(name, uid, uid, f"{HOMES}/{name}", groups)


ROOT = User("root", 0, 0, "/root")
ALICE = _user("alice", 61001, "netnsd", "netnsdtest")
BOB = _user("bob", 61002, "netnsd")
CAROL = _user("carol", 61003, "netnsd", "netnsd-admin")  # an admin who is not root
MALLORY = _user("mallory", 61004)  # in no group of netnsd's
USERS = {user.name: user for user in (ALICE, BOB, CAROL, MALLORY)}


def passwd_lines() -> str:
    """What /etc/passwd gains."""
    return "".join(f"{u.name}:x:{u.uid}:{u.gid}:{u.name}:{u.home}:/bin/sh\n" for u in USERS.values())


def group_lines() -> str:
    """What /etc/group gains."""
    own = "".join(f"{u.name}:x:{u.gid}:\n" for u in USERS.values())
    shared = (f"{name}:x:{gid}:{','.join(u.name for u in USERS.values() if name in u.groups)}\n"
              for name, gid in GROUPS.items())
    return own + "".join(shared)
