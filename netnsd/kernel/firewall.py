"""The host's rules: implements ``core.interfaces.Firewall``.

What they say is in ``ruleset``. Everything is loaded in one transaction, so there is no moment in which a part of it is
missing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import trio
from pyroute2.netlink.exceptions import NetlinkError

from netnsd.core.interfaces import Opening
from netnsd.core.judgement import Judgement
from netnsd.errors import KernelError
from netnsd.kernel import bridges, nfnetlink, ruleset, sockets, tracked
from netnsd.kernel.namespace_thread import NamespaceThread, Priority
from netnsd.kernel.nft import Nft, NftError
from netnsd.kernel.ruleset import BOUNDS, TABLE, Elements
from netnsd.kernel.seats import Seats

T = TypeVar("T")

_SETS = (*ruleset.KINDS, "allowed", "uplinks", "gateways")
_MAPS = ("published", "offered")
# Their messages fit what a socket takes at once (net.core.wmem_default).
_EACH = 500
# For each interval that is deleted the kernel looks at all of them: 500 of 500 take 150 ms, and 2000 of 2000 take 1.9
# seconds. Loading everything anew takes 27 microseconds for each, and is one step too.
_MOST_DELETED = 64


class NftFirewall:
    """The tables ``netnsd`` of the host.

    Args:
        thread: does everything; shared with the network.
        supernet: all environments' addresses, in CIDR form.
        flows_per_address: connections of one environment that the host tracks at once.
        forwarding: is switched on for the uplinks once the rules are there.
        seats: who may come from which port; shared with the network.
        record: a file that remembers, over restarts, what is loaded.
    """

    def __init__(self, thread: NamespaceThread, supernet: str, flows_per_address: int, *,
                 forwarding: bridges.Forwarding, seats: Seats, record: Path) -> None:
        self._thread = thread
        self._supernet = supernet
        self._flows = flows_per_address
        self._nft: Nft | None = None
        self._elements: nfnetlink.ElementSocket | None = None
        self._bounds: nfnetlink.ElementSocket | None = None
        # Adding elements does not wait for the thread, but must not meet a reload of the table.
        self._changing = threading.Lock()
        self._loaded = ""
        self._uplinks: list[str] = []
        self._gateways: list[str] = []
        self._desired: dict[str, Opening] = {}
        self._forwarding = forwarding
        self._seats = seats
        self._record = record
        self._seats_port = 0
        self._judgement = Judgement()

    async def start(self) -> None:
        """Open nftables in the host's namespace."""
        await self._thread.run(self._start, Priority.CREATE)

    async def stop(self, *, remove: bool) -> None:
        """Close; with ``remove`` the tables go too (no environment is left)."""
        await self._thread.run(lambda: self._stop(remove=remove), Priority.CREATE)

    async def open(self, opening: Opening) -> None:
        """See ``core.interfaces.Firewall``."""
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            if self._changing.acquire(blocking=False):
                try:
                    self._open(opening)
                finally:
                    self._changing.release()
            else:
                await self._thread.run(self._in_turn(lambda: self._open(opening)), Priority.CREATE)
        except FileNotFoundError:  # another tool took the table away a moment ago
            await self._thread.run(self._in_turn(lambda: self._open_anew(opening)), Priority.CREATE)

    async def alter(self, opening: Opening) -> None:
        """See ``core.interfaces.Firewall``."""
        await self._thread.run(self._in_turn(lambda: self._alter(opening)), Priority.CREATE)

    async def close(self, openings: Sequence[Opening]) -> None:
        """See ``core.interfaces.Firewall``."""
        await trio.to_thread.run_sync(self._in_turn(lambda: self._close(openings)))

    async def forget(self, addresses: Sequence[str]) -> None:
        """See ``core.interfaces.Firewall``. Looks at what is tracked only where the bounds have counted something."""
        await trio.to_thread.run_sync(self._forget, addresses)

    async def judge(self, judgement: Judgement) -> None:
        """See ``core.interfaces.Firewall``."""
        await self._thread.run(self._in_turn(lambda: self._judge(judgement)), Priority.CREATE)

    @property
    def senders(self) -> frozenset[int]:
        """The port ids of the sockets by which rules are changed here. libnftables' has the process's, as the first."""
        assert self._elements is not None
        assert self._bounds is not None
        return frozenset((os.getpid(), self._elements.port_id, self._bounds.port_id, self._seats_port))

    async def repair(self) -> bool:
        """Put back what somebody has just changed, before anything else is done; returns whether it had to be."""
        return await self._thread.run(self._in_turn(self._repair), Priority.RULES)

    async def restore(self, openings: Sequence[Opening]) -> bool:
        """See ``core.interfaces.Firewall``."""
        return await self._thread.run(self._in_turn(lambda: self._restore(openings)), Priority.CHECK)

    async def check(self) -> bool:
        """See ``core.interfaces.Firewall``."""
        return await self._thread.run(self._in_turn(self._put_right), Priority.CHECK)

    async def differences(self, openings: Sequence[Opening], moving: Sequence[Opening]) -> tuple[list[str], list[str]]:
        """See ``core.interfaces.Firewall``."""
        return await self._thread.run(self._in_turn(lambda: self._differences(openings, moving)), Priority.CHECK)

    def is_listening(self, protocol: str, port: int) -> bool:
        """See ``core.interfaces.Firewall``."""
        try:
            return sockets.is_listening(protocol, port)
        except OSError as error:
            raise KernelError.at("port", error) from error

    def _judge(self, judgement: Judgement) -> None:
        before, self._judgement = self._judgement, judgement
        if not self._loaded:  # at the start: a daemon before may have left others, and all is loaded in a moment
            return
        try:
            self._change(ruleset.of_judgement(before), ruleset.of_judgement(judgement))
        except BaseException:
            self._judgement = before
            raise

    def _alter(self, opening: Opening) -> None:
        before = self._desired.get(opening.address)
        if before is None:  # it was closed meanwhile
            return
        self._desired[opening.address] = opening
        try:
            self._change(ruleset.of_openings([before]), ruleset.of_openings([opening]))
        except BaseException:
            self._desired[opening.address] = before
            raise

    def _change(self, before: Elements, after: Elements) -> None:
        """Have other elements, in one step: what is in both stays. Anew where somebody has taken some of them away."""
        assert self._elements is not None
        deleted, added = _without(before, after), _without(after, before)
        if len(deleted.get("allowed", ())) > _MOST_DELETED:
            self._run(self._reach(self._elements_of(self._desired.values())))
            return
        try:
            self._elements.change(ruleset.packed(deleted), ruleset.packed(added))
        except FileNotFoundError:
            self._put_right()
        except OSError as error:
            raise KernelError.at("nftables", error) from error

    def _in_turn(self, change: Callable[[], T]) -> Callable[[], T]:
        def locked() -> T:
            with self._changing:
                return change()

        return locked

    def _start(self) -> None:
        self._nft = Nft()
        self._run("list tables")  # now it has its port id, the process's, which the first socket gets
        self._elements = nfnetlink.ElementSocket(TABLE)
        self._bounds = nfnetlink.ElementSocket(BOUNDS)
        self._seats_port = self._seats.start()

    def _stop(self, *, remove: bool) -> None:
        try:
            if remove:
                self._forwarding.switch_back()
                self._record.unlink(missing_ok=True)
                self._run(ruleset.removal())
        finally:
            if self._nft is not None:
                self._nft.close()
                self._nft = None
            if self._elements is not None:
                self._elements.close()
                self._elements = None
            if self._bounds is not None:
                self._bounds.close()
                self._bounds = None
            self._seats.stop()

    def _run(self, commands: str, *, output_flags: int = 0) -> str:
        assert self._nft is not None
        return self._nft.run(commands, output_flags=output_flags)

    def _open(self, opening: Opening) -> None:
        assert self._elements is not None
        try:
            self._elements.add(ruleset.packed(ruleset.of_openings([opening])))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise KernelError.at("nftables", error) from error
        self._desired[opening.address] = opening

    def _open_anew(self, opening: Opening) -> None:
        """Load the table with it: whoever takes the table away in a loop may have done so again."""
        try:
            self._open(opening)
        except FileNotFoundError:
            self._desired[opening.address] = opening
            try:
                self._put_right()
            except BaseException:
                del self._desired[opening.address]
                raise

    def _close(self, openings: Sequence[Opening]) -> None:
        assert self._elements is not None
        for opening in openings:
            self._desired.pop(opening.address, None)
        packed = ruleset.packed(ruleset.of_openings(openings))
        try:
            if not self._delete(packed):
                for name, elements in packed.items():
                    for element in elements:
                        self._delete({name: [element]})
        except OSError as error:
            raise KernelError.at("nftables", error) from error

    def _forget(self, addresses: Sequence[str]) -> None:
        try:
            with self._changing:
                had = [address for address in addresses if self._counted_out(address)]
            if had:
                tracked.forget(had)
        except OSError as error:
            raise KernelError.at("conntrack", error) from error

    def _counted_out(self, address: str) -> bool:
        """Whether connections of an address were counted; they are not any more."""
        assert self._bounds is not None
        try:
            self._bounds.delete({"flows": [nfnetlink.Element(socket.inet_aton(address))]})
        except FileNotFoundError:
            return False
        return True

    def _delete(self, elements: dict[str, list[nfnetlink.Element]]) -> bool:
        """Delete elements, all or nothing; returns False where one is missing."""
        assert self._elements is not None
        try:
            self._elements.delete(elements)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def _restore(self, openings: Sequence[Opening]) -> bool:
        self._desired = {opening.address: opening for opening in openings}
        return self._put_right()

    def _repair(self) -> bool:
        is_gone = False
        if self._loaded:
            try:
                if is_gone := not self._listing():
                    self._close_off(list(self._desired.values()))
            except OSError as error:
                raise _unusable(error) from error
        return self._put_right() or is_gone

    def _close_off(self, openings: Sequence[Opening]) -> None:
        """Put back tables that are gone: first what keeps users apart, then who may all the same.

        The rules alone take a millisecond, and as text a thousand elements take 20 more.
        """
        assert self._elements is not None
        closing = {name: some for name, some in ruleset.of_judgement(self._judgement).items() if name != "allowed"}
        self._load(closing)
        with contextlib.suppress(FileNotFoundError):  # gone again, and told again
            self._seats.load()
            for first in range(0, len(openings), _EACH):
                self._elements.add(ruleset.packed(ruleset.of_openings(openings[first:first + _EACH])))
            passages = ruleset.of_judgement(self._judgement).get("allowed", [])
            for first in range(0, len(passages), _EACH):
                self._elements.add(ruleset.packed({"allowed": passages[first:first + _EACH]}))

    def _put_right(self) -> bool:
        """Compare what is loaded with what should be, as it is now: this thread does every change in turn."""
        try:
            return self._load_if_wrong()
        except (OSError, ValueError, NetlinkError) as error:
            raise _unusable(error) from error

    def _load_if_wrong(self) -> bool:
        interfaces, gateways = bridges.uplinks()
        # A host that forwards anyway is let; where only netnsd needs it, it must not become a router between uplinks.
        uplinks = [] if bridges.host_forwards() else interfaces
        self._uplinks, self._gateways = uplinks, gateways
        self._loaded = self._loaded or self._recalled()
        if self._loaded:
            self._forwarding.switch_on(uplinks)
        is_right = self._loaded and self._listing() == self._loaded
        if is_right and self._present() == self._wanted(self._desired.values()):
            return False
        self._load(self._elements_of(self._desired.values()))
        # Once and for all: later, somebody else may have put something in before it is listed.
        if not self._loaded:
            self._loaded = self._listing()
            self._record_loaded()
        self._forwarding.switch_on(uplinks)
        return True

    def _differences(self, openings: Sequence[Opening], moving: Sequence[Opening]) -> tuple[list[str], list[str]]:
        present, wanted = self._present(), self._wanted(openings)
        if present is None or self._listing() != self._loaded:
            return ["tables netnsd of ip and bridge and ip netnsd_bounds, or rules of them"], []
        missing, surplus = wanted - present, present - wanted - _compared(ruleset.of_openings(moving))
        return ([f"{name} {{ {element} }}" for name, element in sorted(missing)],
                [f"{name} {{ {element} }}" for name, element in sorted(surplus)])

    def _elements_of(self, openings: Iterable[Opening]) -> Elements:
        return {**ruleset.of_openings(openings), **ruleset.of_judgement(self._judgement), "seats": self._seats.elements}

    def _wanted(self, openings: Iterable[Opening]) -> set[tuple[str, str]]:
        return (_compared(self._elements_of(openings)) | {("uplinks", name) for name in self._uplinks}
                | {("gateways", address) for address in self._gateways})

    def _load(self, elements: Elements) -> None:
        self._run(self._reach(elements) + ruleset.bounds(flows=self._flows, gateways=self._gateways))

    def _reach(self, elements: Elements) -> str:
        return ruleset.reach(supernet=self._supernet, elements=elements, uplinks=self._uplinks)

    def _recalled(self) -> str:
        """The listing of these very rules, as they were when an earlier run of the daemon had loaded them; or empty.

        What is right is not loaded again: connections that policies let would be refused for an instant, as the kernel
        puts intervals into a set a moment after the rules that ask for them.
        """
        try:
            rules, _, listing = self._record.read_text().partition("\n")
        except OSError:
            return ""
        return listing if rules == self._rules() else ""

    def _record_loaded(self) -> None:
        fresh = self._record.with_name(f"{self._record.name}.new")
        with contextlib.suppress(OSError):  # the next run loads them again
            fresh.write_text(f"{self._rules()}\n{self._loaded}")
            fresh.replace(self._record)

    def _rules(self) -> str:
        """Names the rules, without their elements."""
        text = ruleset.reach(supernet=self._supernet) + ruleset.bounds(flows=self._flows)
        return hashlib.sha256(text.encode()).hexdigest()

    def _listing(self) -> str:
        try:
            return "".join(self._run(f"list table {family} {name}", output_flags=Nft.TERSE)
                           for family, name in ruleset.TABLES)
        except NftError as error:
            if error.is_missing:
                return ""
            raise

    def _present(self) -> set[tuple[str, str]] | None:
        """The elements that are there; None where a set is taken away meanwhile."""
        found: set[tuple[str, str]] = set()
        for name in _SETS:
            kind = "map" if name in _MAPS else "set"
            try:
                text = self._run(f"list {kind} {ruleset.table_of(name)} {name}",
                                 output_flags=Nft.JSON | Nft.NUMERIC_PROTO)
            except NftError as error:
                if error.is_missing:
                    return None
                raise
            for entry in json.loads(text)["nftables"]:
                found.update((name, ruleset.listed(name, element)) for element in entry.get(kind, {}).get("elem", []))
        return found


def _unusable(error: Exception) -> KernelError:
    return KernelError(f"firewall: {error}", stage="firewall", errno="",
                       hint="`netnsctl doctor` checks what this host lacks.")


def _compared(elements: Elements) -> set[tuple[str, str]]:
    return {(name, ruleset.comparable(name, fields)) for name, some in elements.items() for fields in some}


def _without(elements: Elements, others: Elements) -> Elements:
    """Those of ``elements`` that are not in ``others``."""
    return {name: left for name, some in elements.items()
            if (left := list((Counter(some) - Counter(others.get(name, []))).elements()))}
