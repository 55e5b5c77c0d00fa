"""Stand-ins for the kernel, the launcher and the file system, which pass the same suite as the real ones do."""

from __future__ import annotations

from tests.fakes.faults import Faults
from tests.fakes.files import FakeClock, FakeFiles
from tests.fakes.firewall import FakeFirewall
from tests.fakes.network import FakeNetwork
from tests.fakes.probes import FakeProbes
from tests.fakes.processes import FakeCgroups, FakeProcesses
from tests.fakes.world import ALICE, BOB, CAROL, ROOT, World, actor

__all__ = ["ALICE", "BOB", "CAROL", "ROOT", "FakeCgroups", "FakeClock", "FakeFiles", "FakeFirewall", "FakeNetwork",
           "FakeProbes", "FakeProcesses", "Faults", "World", "actor"]
