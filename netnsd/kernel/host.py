"""What the host offers, and what it lacks: probed, never assumed. ``doctor`` and the daemon's start say it."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from netnsd.errors import HostUnfit, NetnsdError
from netnsd.kernel import bridges, exit_info, inner, namespace_thread, ruleset
from netnsd.kernel.namespace_thread import NamespaceThread, Priority
from netnsd.kernel.nft import Nft, NftError

_SO_PASSRIGHTS = 83
_TMPFS = "tmpfs"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``error`` keeps the daemon from starting."""

    name: str
    ok: bool
    severity: Literal["error", "warning", "info"]
    message: str
    hint: str = ""


def features() -> dict[str, bool]:
    """What newer kernels offer, by name."""
    return {"passrights": _has_passrights(), "pidfd_exit_info": exit_info.is_known()}


def limits(has: dict[str, bool]) -> list[Finding]:
    """What there is to limit environments with, by the names that ``wire.Resources`` has."""
    return [Finding(f"limit_{name}", there, "info",
                    f"environments' {name} can be limited: {'yes' if there else 'no'}",
                    "" if there else f"Have the controller {name} handed on to netnsd's cgroup, or mount v1's.")
            for name, there in has.items()]


def boot_id() -> str:
    """Names this run of the kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def examine(thread: NamespaceThread, supernet: str) -> list[Finding]:
    """Look at everything. Makes and discards a scratch namespace."""
    return await thread.run(lambda: _examine(supernet), Priority.CHECK)


def _examine(supernet: str) -> list[Finding]:
    findings = [_cgroup(), _dev_null(), _hosts_file(), _pins_are_cheap(), _bridge_netfilter(), _forwarding(),
                *_other_firewalls()]
    findings += [
        _trial("links", "the kernel makes bridges and veth pairs", "Load the modules bridge and veth.", _try_links),
        _trial("nftables", "nftables takes the host's rules",
               "apt install nftables; load nf_tables, nft_chain_nat, nft_fib_ipv4, nft_connlimit.",
               lambda: _try_rules(supernet)),
        _trial("loopback", "servers on 127.0.0.1 can be reached", "Load the module nft_socket.", _try_inner),
    ]
    findings += [Finding(name, has, "info", f"kernel feature {name}: {'yes' if has else 'no, done without'}")
                 for name, has in features().items()]
    return findings


def require(findings: list[Finding]) -> None:
    """Raise HostUnfit for the first finding without which nothing works."""
    for finding in findings:
        if finding.severity == "error" and not finding.ok:
            raise HostUnfit(f"{finding.name}: {finding.message}", hint=finding.hint, check=finding.name)


def _trial(name: str, message: str, hint: str, attempt: Callable[[], None]) -> Finding:
    try:
        namespace_thread.enter_new()
        attempt()
    except (OSError, NetlinkError, NetnsdError) as error:
        return Finding(name, False, "error", f"{message}: no ({error})", hint)
    return Finding(name, True, "error", message)


def _try_links() -> None:
    with IPRoute() as route:
        route.link("add", ifname="b0", kind="bridge", br_mcast_snooping=0)
        index = route.link_lookup(ifname="b0")[0]
        route.link("add", ifname="v0", kind="veth", peer="eth0", master=index)
        route.brport("set", index=route.link_lookup(ifname="v0")[0], isolated=1)


def _try_rules(supernet: str) -> None:
    with Nft() as nft:
        nft.run(ruleset.reach(supernet=supernet) + ruleset.bounds(flows=16))


def _try_inner() -> None:
    with IPRoute() as route:
        route.link("add", ifname="eth0", kind="veth", peer="peer0")
    inner.furnish("10.0.0.1", [])


def _cgroup() -> Finding:
    mounted = any(line.split(" - ")[1].startswith("cgroup2 ")
                  for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return Finding("cgroup2", mounted, "error", "cgroup v2 is mounted" if mounted else "no cgroup v2 is mounted",
                   "" if mounted else "mount -t cgroup2 none /sys/fs/cgroup/unified")


def _dev_null() -> Finding:
    mode = stat.S_IMODE(os.stat("/dev/null").st_mode)
    good = mode & 0o006 == 0o006
    return Finding("dev-null", good, "warning", f"/dev/null has mode {mode:04o}",
                   "" if good else "chmod 666 /dev/null: users' programs cannot open it.")


def _hosts_file() -> Finding:
    present = os.path.exists("/etc/hosts")
    return Finding("hosts-file", present, "warning", f"/etc/hosts is {'there' if present else 'missing'}",
                   "" if present else "echo 127.0.0.1 localhost >/etc/hosts: each server gets its own, mounted there.")


def _pins_are_cheap() -> Finding:
    kind = _filesystem_of("/run/netns")
    return Finding("run-tmpfs", kind == _TMPFS, "warning", f"/run/netns is on {kind}",
                   "" if kind == _TMPFS else "Mount a tmpfs on /run: pins cost 30 times more elsewhere.")


def _bridge_netfilter() -> Finding:
    path = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    state = path.read_text().strip() if path.exists() else "absent"
    return Finding("br-netfilter", True, "info", f"bridge-nf-call-iptables is {state}; netnsd works with both")


def _forwarding() -> Finding:
    interfaces, _gateways = bridges.uplinks()
    if bridges.host_forwards():
        return Finding("forwarding", True, "info", "the host forwards between all its interfaces (ip_forward is 1)")
    text = f"forwarding is switched on for netnsd's bridges and {', '.join(interfaces) or 'no uplink'} only"
    return Finding("forwarding", True, "info", text)


def _other_firewalls() -> list[Finding]:
    """Base chains of others in the forward hook that drop by default: accepting in our table does not overrule them."""
    try:
        with Nft() as nft:
            listing = nft.run("list chains")
    except (NftError, HostUnfit) as error:
        return [Finding("other-firewalls", False, "warning", f"the host's rules cannot be listed: {error}",
                        "apt install nftables")]
    dropping, table = [], ""
    for line in listing.splitlines():
        if line.startswith("table "):
            table = line.removeprefix("table ").rstrip(" {")
        elif "hook forward" in line and "policy drop" in line and table != "ip netnsd":
            dropping.append(table)
    if not dropping:
        return [Finding("other-firewalls", True, "info", "no other firewall drops forwarded traffic by default")]
    return [Finding("other-firewalls", False, "warning",
                    f"{', '.join(dropping)} drops forwarded traffic: environments do not reach the outside",
                    "Accept traffic from and to ndbr* there (Docker: the chain DOCKER-USER; ufw: ufw route allow).")]


def _has_passrights() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS)
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                return False
            raise
    return True


def _filesystem_of(path: str) -> str:
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4]
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    return kind
