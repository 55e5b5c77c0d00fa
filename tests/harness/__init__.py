"""Disposable hosts for tests: a machine of one's own in a few milliseconds, and proof that nothing is left of it."""

from __future__ import annotations

from tests.harness.container import Container
from tests.harness.daemon import Daemon
from tests.harness.host import HostNamespace, Place
from tests.harness.snapshot import RUN_ID, Snapshot, differences, settle
from tests.harness.users import ALICE, BOB, CAROL, MALLORY, ROOT, USERS, User
from tests.harness.waiting import DeadlineError, wait_until

__all__ = [
    "ALICE", "BOB", "CAROL", "MALLORY", "ROOT", "RUN_ID", "USERS", "Container", "Daemon", "DeadlineError",
    "HostNamespace", "Place", "Snapshot", "User", "differences", "settle", "wait_until",
]
