"""Creation on the real adapters that fails at any step, or in the kernel below a step, leaves nothing."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from netnsd import wire
from netnsd.api import peer
from netnsd.core.environments import Environments
from netnsd.core.interfaces import Adapters
from netnsd.core.reconcile import faults
from netnsd.core.registry import Settings
from netnsd.errors import LaunchFailed, NetnsdError
from netnsd.kernel import bridges, libc, namespace_thread, rtnetlink
from netnsd.kernel.network import KernelNetwork
from tests.conformance.conftest import IS_REAL
from tests.conformance.subjects import PLAN, RealSubjects, Subjects, environment
from tests.fakes import FakeClock, Faults, actor
from tests.fakes.faults import cancelling, failing

pytestmark = pytest.mark.skipif(not IS_REAL, reason="runs on the disposable host")
ALICE = actor(61001, "alice")
REQUEST = wire.CreateRequest(
    name="web", cwd="/", ports=[wire.PortRequest(port=3000), wire.PortRequest(port=53, protocol="udp")],
    services=[wire.ServiceRequest(name="one", command=["/bin/sleep", "60"]),
              wire.ServiceRequest(name="two", command=["/bin/sleep", "60"])])
IMPOSSIBLE = wire.CreateRequest(name="web", cwd="/", ports=REQUEST.ports, services=[
    wire.ServiceRequest(name="one", command=["/bin/sleep", "60"]), wire.ServiceRequest(name="two",
                                                                                       command=["/missing"])])


@asynccontextmanager
async def service(subjects: Subjects, faults: Faults) -> AsyncIterator[Environments]:
    wrap = faults.wrap
    adapters = Adapters(wrap(subjects.network, "network"), wrap(subjects.firewall, "firewall"),
                        wrap(subjects.processes, "processes"), wrap(subjects.cgroups, "cgroups"),
                        wrap(subjects.store, "store"), wrap(subjects.files, "files"), FakeClock(),
                        wrap(subjects.probes, "probes"))
    environments = Environments(adapters, PLAN, Settings((20000, 20009), True, "b"), lambda *_, **__: None,
                                account=peer.account, members=peer.members)
    async with trio.open_nursery() as nursery:
        await nursery.start(environments.run)
        yield environments
        nursery.cancel_scope.cancel()


async def held(subjects: Subjects, environments: Environments) -> dict[str, Any]:
    """What the host has of environments, seen from outside of the adapters."""
    async def output(*command: str) -> str:
        done = await trio.run_process(command, capture_stdout=True)
        return done.stdout.decode()

    links = await output("ip", "-o", "link")
    found = {
        "links": [line.split(": ")[1] for line in links.splitlines()
                  if line.split(": ")[1].startswith("nd") and not line.split(": ")[1].startswith("ndbr")],
        "neighbours": await output("ip", "neighbour", "show", "nud", "permanent"),
        "names": os.listdir("/run/netns"), "pins": os.listdir(subjects.directory / "run" / "slots"),
        "elements": (await output("nft", "list", "map", "ip", "netnsd", "published")).count(" : 10.203")
        + (await output("nft", "list", "set", "ip", "netnsd", "owners")).count("61001"),
        "cgroups": subjects.cgroups.observe(), "files": subjects.files.observe(), "rows": subjects.store.environments(),
        "ports": environments.registry.published, "slots": PLAN.slots - environments.registry.addresses_free,
        "running": list((await subjects.processes.known())[0]),
    }
    return {name: value for name, value in found.items() if value}


async def test_creation_that_fails_at_any_step_leaves_nothing(subjects: Subjects) -> None:
    faults = Faults()
    async with service(subjects, faults) as environments:
        assert await held(subjects, environments) == {}
        with faults.recording() as steps:
            made = await environments.create(REQUEST, ALICE)
            count = len(steps)
        await environments.remove(made)
        descriptors = len(os.listdir("/proc/self/fd"))
        for number in range(count):
            with faults.fail_at(number, failing) as steps:
                with pytest.raises(NetnsdError, match="planted"):
                    await environments.create(REQUEST, ALICE)
            await trio.testing.wait_all_tasks_blocked()
            assert await held(subjects, environments) == {}, (number, steps[number])
        assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_creation_that_is_cancelled_at_any_step_leaves_nothing(subjects: Subjects, after: bool) -> None:
    faults, number = Faults(), 0
    async with service(subjects, faults) as environments:
        while True:
            with trio.CancelScope() as scope, faults.fail_at(number, cancelling(scope), after=after) as steps:
                await environments.create(REQUEST, ALICE)
            await trio.testing.wait_all_tasks_blocked()
            if not scope.cancelled_caught:
                await environments.remove(environments.registry.find("web", ALICE))
            assert await held(subjects, environments) == {}, (number, steps[number:number + 1])
            if not scope.cancel_called:
                break
            number += 1
        assert number > 15


async def test_creation_below_which_the_kernel_fails_leaves_nothing(
    subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(subjects, RealSubjects)
    faults = Faults()

    def plant(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def planted(*arguments: Any, **named: Any) -> Any:
            then = faults.enter(f"{getattr(owner, '__name__', owner)}.{name}")
            result = call(*arguments, **named)
            if then is not None and name == "transact":  # others do all or nothing
                then()
            return result

        monkeypatch.setattr(owner, name, planted)

    for owner, name in ((libc, "unshare"), (libc, "mount"), (namespace_thread, "pin"), (namespace_thread, "open_own"),
                        (rtnetlink.RouteSocket, "transact"), (bridges.Bridges, "ensure"), (os, "fchown"),
                        (os, "makedirs"), (namespace_thread, "enter")):
        plant(owner, name)
    seen: set[str] = set()
    codes: set[str] = set()
    async with service(subjects, Faults()) as environments:
        for done_then_failed in (False, True):
            number = 0
            while True:
                fired: list[str] = []

                def action(step: str, fired: list[str] = fired) -> None:
                    fired.append(step)
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

                try:
                    with faults.fail_at(number, action, after=done_then_failed) as steps:
                        made = await environments.create(REQUEST, ALICE)
                except NetnsdError as error:
                    codes.add(error.code)
                else:
                    await environments.remove(made)
                await trio.testing.wait_all_tasks_blocked()
                assert await held(subjects, environments) == {}, (number, fired, done_then_failed)
                if number >= len(steps):
                    break
                seen.update(fired)
                number += 1
        assert len(seen) >= 7, seen
        assert codes == {"kernel_error"}


async def test_a_service_that_cannot_start_takes_everything_along(subjects: Subjects) -> None:
    async with service(subjects, Faults()) as environments:
        for _ in range(3):
            with pytest.raises(LaunchFailed):
                await environments.create(IMPOSSIBLE, ALICE)
            assert await held(subjects, environments) == {}


async def test_a_bridge_that_is_there_is_neither_forgotten_nor_made_anew_by_a_mistake(
    subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(subjects, RealSubjects)
    network = subjects.network
    assert isinstance(network, KernelNetwork)
    slots = [PLAN.slot(index) for index in range(3)]
    await network.wire(slots[0], "e0")

    def unable(_index: int) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(socket, "if_indextoname", unable)
        with pytest.raises(NetnsdError):
            await network.mend_bridges([slots[0].bridge])
    await network.wire(slots[1], "e1")
    network._bridges._present.clear()  # whatever mistake it was
    await network.wire(slots[2], "e2")
    wiring = await network.survey()
    for number, slot in enumerate(slots):
        assert faults(environment(slot, f"e{number}"), wiring) == ()
