"""Configuration: one frozen object from a TOML file and NETNSD_* variables. An unknown key is an error.

``[network] supernet`` in the file is ``NETNSD_NETWORK_SUPERNET`` in the environment, which wins.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from netnsd.core.addressing import Plan
from netnsd.core.pool import MOST_SLOTS
from netnsd.core.quotas import MOST
from netnsd.core.specification import LIMITS, RESOURCES
from netnsd.errors import ConfigError

DEFAULT_FILE = Path("/etc/netnsd/netnsd.toml")
_PREFIX = "NETNSD_"
# Variables of that prefix that are not settings: the client's, and what servers are given.
_NOT_SETTINGS = frozenset({"NETNSD_SOCKET", "NETNSD_NAME", "NETNSD_ID", "NETNSD_IP", "NETNSD_URL"})


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections."""


class Daemon(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[daemon]``: the process.

    ``socket_group``: the socket's group, by default netnsd where it exists. ``cgroup``: where environments' groups
    are made, below the mount of cgroup v2. ``creations_waiting``: of one user; more are refused.
    """

    socket_group: str | None = None
    socket_mode: str = "0660"
    admin_group: str = "netnsd-admin"
    cgroup: str = "netnsd"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    grace_seconds: float = 5.0
    connections_per_user: int = 128
    creations_waiting: int = 64


class Network(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[network]``: addresses. ``flows``: tracked connections of one environment at once."""

    supernet: str = "10.203.0.0/16"
    bridge_ports: int = 250
    mtu: int = 1500
    flows: int = 4096


class Ports(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[ports]``: host ports that are published, LOW-HIGH, both included."""

    range: str = "20000-29999"


class Services(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[services]``: the servers.

    ``log_bytes``: disk per log. ``allow_setuid``: whether --setuid is. ``hard_limits``: what no command's resource
    limits may exceed, by lower-case name (``nofile = 4096``).
    """

    log_bytes: int = 16 << 20
    allow_setuid: bool = True
    hard_limits: dict[str, int] = {}


class Pool(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[pool]``: namespaces made before demand.

    ``size``: kept ready, 0 for none. ``most``: up to so many while creations come fast. ``rate``: made per
    second, at most.
    """

    size: int = 8
    most: int = 64
    rate: float = 100.0


class Api(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[api]``: the API over TCP, with bearer tokens.

    ``listen``: ADDRESS:PORT, [ADDRESS]:PORT for IPv6; None: not at all. Anything but loopback needs TLS.
    ``requests_per_second``, ``requests_burst``: of one token. ``dev_users``: whose environments those of a ``dev_id``
    are, where an admin starts them.
    """

    listen: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    requests_per_second: float = 50.0
    requests_burst: int = 100
    dev_users: dict[str, str] = {}


class Quota(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[quota]``: what each user may have in all, unless an admin says otherwise; see ``wire.QuotaLimits``."""

    environments: int | None = None
    ports: int | None = None
    memory: int | None = None
    cpu: float | None = None
    creations_per_minute: int | None = None


class Resources(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[resources]``: what an environment may take of which its creator does not say; see ``wire.Resources``."""

    memory: int | None = None
    cpu: float | None = None
    pids: int | None = None
    bandwidth: int | None = None


class Config(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration."""

    daemon: Daemon = Daemon()
    network: Network = Network()
    ports: Ports = Ports()
    services: Services = Services()
    pool: Pool = Pool()
    api: Api = Api()
    quota: Quota = Quota()
    resources: Resources = Resources()

    @property
    def api_address(self) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int] | None:
        """Where the API listens. Raises ValueError."""
        if self.api.listen is None:
            return None
        match = re.fullmatch(r"(?:([0-9.]+)|\[([0-9A-Fa-f:.]+)\]):([0-9]{1,5})", self.api.listen)
        if match is None or not 1 <= int(match[3]) <= 65535:
            raise ValueError("is not ADDRESS:PORT, or [ADDRESS]:PORT for IPv6")
        return ipaddress.ip_address(match[1] or match[2]), int(match[3])

    @property
    def published_range(self) -> tuple[int, int]:
        """The first and the last port of the range."""
        low, _, high = self.ports.range.partition("-")
        return int(low), int(high)

    @property
    def plan(self) -> Plan:
        """How the supernet is cut."""
        return Plan(self.network.supernet, self.network.bridge_ports)

    @property
    def socket_permissions(self) -> int:
        """The socket's mode as a number."""
        return int(self.daemon.socket_mode, 8)


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """Read the configuration. Without ``path``, /etc/netnsd/netnsd.toml where it exists.

    Raises ConfigError, naming file (or variable) and key.
    """
    source = path if path is not None else DEFAULT_FILE if DEFAULT_FILE.exists() else None
    tree: dict[str, Any] = {}
    if source is not None:
        try:
            tree = tomllib.loads(source.read_text())
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}", hint="Name a file that root can read.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: {error}", hint="The file is TOML: https://toml.io.") from error
        _convert(tree, str(source), strict=True)
    variables = _from_environment(environ)
    for section, values in variables.items():
        tree = {**tree, section: {**tree.get(section, {}), **values}}
    config = _convert(tree, "NETNSD_* variables" if variables else str(source or "defaults"), strict=not variables)
    _check(config, str(source or "NETNSD_* variables"))
    return config


def _from_environment(environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    sections: dict[str, dict[str, str]] = {}
    for variable, value in environ.items():
        if not variable.startswith(_PREFIX) or variable in _NOT_SETTINGS:
            continue
        section, _, key = variable.removeprefix(_PREFIX).lower().partition("_")
        known = {f.name: f for f in msgspec.structs.fields(Config)}
        if section not in known or key not in {f.name for f in msgspec.structs.fields(known[section].type)}:
            raise ConfigError(f"variable {variable} names no setting",
                              hint=f"Settings are {_PREFIX}SECTION_KEY; the README lists them.", variable=variable)
        sections.setdefault(section, {})[key] = value
    return sections


def _convert(tree: dict[str, Any], source: str, *, strict: bool) -> Config:
    try:
        return msgspec.convert(tree, Config, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_plain(str(error))}", hint="The README lists every section and key.",
                          source=source) from error


def _plain(message: str) -> str:
    """msgspec's message with the key's whole name: ``unknown key `x` in [network]``."""
    match = re.match(r"Object contains unknown field `([^`]*)`(?: - at `\$\.?(.*)`)?", message)
    if match:
        where = f" in [{match[2]}]" if match[2] else ""
        return f"unknown key {match[1]!r}{where}"
    return re.sub(r" - at `\$\.(\w+)\.?(\w*)`", r" (key \2 in [\1])", message)


def _check(config: Config, source: str) -> None:
    def refuse(key: str, reason: str) -> ConfigError:
        return ConfigError(f"{source}: {key}: {reason}", hint="The README lists every section and key.", key=key)

    try:
        ipaddress.IPv4Network(config.network.supernet)
        if not 1 <= config.network.bridge_ports <= 1000:
            raise ValueError("bridge_ports is not from 1 to 1000")
        _ = config.plan
    except ValueError as error:
        raise refuse("[network] supernet", str(error)) from error
    if not re.fullmatch(r"[0-9]{1,5}-[0-9]{1,5}", config.ports.range):
        raise refuse("[ports] range", "is not LOW-HIGH")
    low, high = config.published_range
    if not 1024 <= low <= high <= 65535:
        raise refuse("[ports] range", "must lie in 1024-65535, low end first")
    _check_ephemeral(low, high, refuse)
    for name, limit in config.services.hard_limits.items():
        if name not in LIMITS or not 0 <= limit < 1 << 63:
            raise refuse("[services] hard_limits", f"{name} = {limit} is none of {', '.join(sorted(LIMITS))}")
    if not re.fullmatch(r"0?[0-7]{3}", config.daemon.socket_mode):
        raise refuse("[daemon] socket_mode", "is not three octal digits")
    _check_api(config, refuse)
    if any(part in ("", ".", "..") for part in config.daemon.cgroup.split("/")):
        raise refuse("[daemon] cgroup", "is not a path below the mount of cgroup v2")
    for key, value, least, most in (
        ("[network] mtu", config.network.mtu, 576, 65535), ("[network] flows", config.network.flows, 16, 1 << 20),
        ("[services] log_bytes", config.services.log_bytes, 1 << 16, 1 << 40),
        ("[daemon] grace_seconds", config.daemon.grace_seconds, 0, 600),
        ("[pool] size", config.pool.size, 0, MOST_SLOTS), ("[pool] most", config.pool.most, 0, MOST_SLOTS),
        ("[pool] rate", config.pool.rate, 0.1, 10_000),
        ("[daemon] creations_waiting", config.daemon.creations_waiting, 0, 100_000),
        ("[daemon] connections_per_user", config.daemon.connections_per_user, 1, 10_000),
        ("[api] requests_per_second", config.api.requests_per_second, 0.1, 100_000),
        ("[api] requests_burst", config.api.requests_burst, 1, 100_000),
        *((f"[quota] {name}", value, 0, MOST) for name, value in msgspec.structs.asdict(config.quota).items()),
        *((f"[resources] {name}", value, *RESOURCES[name][:2])
          for name, value in msgspec.structs.asdict(config.resources).items()),
    ):
        if value is not None and not least <= value <= most:
            raise refuse(key, f"{value} is not from {least} to {most}")


def _check_api(config: Config, refuse: Callable[[str, str], ConfigError]) -> None:
    try:
        where = config.api_address
    except ValueError as error:
        raise refuse("[api] listen", str(error)) from error
    given = {name: getattr(config.api, name) for name in ("tls_certificate", "tls_key")}
    for name, path in given.items():
        if path is None and any(given.values()):
            raise refuse(f"[api] {name}", "is missing: certificate and key belong together")
        if path is None and where is not None and not where[0].is_loopback:
            raise refuse(f"[api] {name}", f"is needed, as [api] listen {where[0]} is not a loopback address")
    if where is not None and where[0] in ipaddress.ip_network(config.network.supernet):
        raise refuse("[api] listen", f"{where[0]} lies in [network] supernet, whence nobody may ask")


def _check_ephemeral(low: int, high: int, refuse: Any) -> None:
    """Published ports never lie where the kernel picks ports for outgoing connections."""
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except OSError:
        return
    if low <= last and first <= high:
        raise refuse("[ports] range", f"{low}-{high} overlaps net.ipv4.ip_local_port_range ({first}-{last})")


def environment() -> Mapping[str, str]:
    """The process's environment."""
    return os.environ
