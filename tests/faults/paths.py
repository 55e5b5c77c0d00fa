"""The paths on which netnsd changes the world: what is there before, what is asked, and what may come of it."""

from __future__ import annotations

import enum
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.faults.world import SETTLE_SECONDS, Reply, World
from tests.harness import wait_until
from tests.system.clients import echo_server

NUMBER = 20500
_ENVIRONMENTS = "/v1/environments"
_BARE = {"cwd": "/", "env": {"PATH": "/usr/bin:/bin"}}
_PORTS = [{"port": 3000}, {"port": 3000, "protocol": "udp", "publish": NUMBER}]
WHOLE = {"name": "web", "command": echo_server("web", 3000), "ports": _PORTS, **_BARE}
WITHOUT = {"name": "web", "ports": [{"port": 3000}]}
# Limits, a check, what it reaches outside and a policy: what a plain one does without.
LOOKED_AFTER = {**WHOLE, "egress": "deny", "restart": "on-failure", "health": {"tcp": 3000, "interval_seconds": 1.0},
                "resources": {"memory": 256 << 20, "cpu": 1, "pids": 64, "bandwidth": 10**9}}
TEMPLATE = {"name": "tpl", "warm": 1, "specification": {
    "command": echo_server("web", 3000), "ports": [{"port": 3000}], **_BARE}}
TOKEN = {"name": "t", "scope": "write"}
_MANY = ("web-1", "web-2", "web-3", "web-4", "web-5")


class Fate(enum.Enum):
    """What may have become of a path's environments when its daemon was killed, or a step of it failed."""

    MADE = "whole or gone"
    KEPT = "there, and whole once it is started"


def _nothing(world: World) -> None:
    """There is nothing to do."""


@dataclass(frozen=True)
class Path:
    """One path. ``order`` is what ``asker`` (alice, root) asks.

    ``prepare`` makes what is there before. ``fulfilled`` waits for what goes on behind a good answer. ``again`` does it
    all once more after a failure, and must work.
    """

    name: str
    order: dict[str, Any]
    prepare: Callable[[World], None] = _nothing
    fate: Fate = Fate.MADE
    fulfilled: Callable[[World], None] = _nothing
    asker: str = "alice"
    names: tuple[str, ...] = ("web",)
    fails: frozenset[str] = field(default_factory=frozenset)
    again: Callable[[World], None] = _nothing

    def begin(self, world: World) -> None:
        """Ask."""
        (world.alice if self.asker == "alice" else world.root).begin(**self.order)

    def reply(self, world: World) -> Reply:
        """What was answered."""
        return (world.alice if self.asker == "alice" else world.root).reply()

    @property
    def makes(self) -> bool:
        """Whether its environments are not there when it answers with an error."""
        return self.fate is Fate.MADE and self.order.get("path") == _ENVIRONMENTS


class DaemonStart(Path):
    """The daemon starts, on what another left that was killed. Answers 200, or 0 with what it said at its end."""

    def begin(self, world: World) -> None:
        try:
            world.daemon.start()
        except AssertionError as error:
            world.said = str(error)
        else:
            world.said = ""

    def reply(self, world: World) -> Reply:
        if "was not ready" in world.said:
            return Reply(0, world.said)
        return Reply(200, None) if not world.said else Reply(503, {"error": {"code": "ended at its start"}})


class DaemonStop(Path):
    """The daemon is asked to end. Answers 200 where it ended well, 0 where it did not end."""

    def begin(self, world: World) -> None:
        assert world.daemon.process is not None
        world.daemon.process.send_signal(signal.SIGTERM)

    def reply(self, world: World) -> Reply:
        assert world.daemon.process is not None
        if not world.await_end(SETTLE_SECONDS):
            return Reply(0, "SIGTERM did not end it")
        code = world.daemon.process.returncode
        return Reply(200, None) if code == 0 else Reply(503, {"error": {"code": f"exit code {code}"}})


def _create(world: World, body: dict[str, Any] = WHOLE) -> None:
    world.alice.good("POST", _ENVIRONMENTS, body)


def _create_again(body: dict[str, Any]) -> Callable[[World], None]:
    def again(world: World) -> None:
        if "web" not in world.environments():
            _create(world, body)

    return again


def _create_stopped(world: World) -> None:
    _create(world)
    world.alice.good("POST", f"{_ENVIRONMENTS}/web/stop", {"grace_seconds": 5})


def _create_many(world: World) -> None:
    world.alice.good("POST", _ENVIRONMENTS, {"name": "web", "count": len(_MANY), "command": ["sleep", "1000"],
                                             "ports": [{"port": 3000}], **_BARE})


def _filled(size: int) -> Callable[[World], None]:
    def fill(world: World) -> None:
        world.root.good("PATCH", "/v1/pools/slots", {"size": size})
        wait_until(lambda: _ready(world, "slots") == size, seconds=SETTLE_SECONDS, what="a full pool")

    return fill


def _emptied(world: World) -> None:
    _filled(0)(world)


def _ready(world: World, name: str) -> int:
    pools = world.alice.good("GET", "/v1/pools")["pools"]
    return next((int(pool["ready"]) for pool in pools if pool["name"] == name), -1)


def _stocked(world: World) -> None:
    wait_until(lambda: _ready(world, "template/tpl") == 1, seconds=SETTLE_SECONDS, what="a full stock")


def _add_template(world: World) -> None:
    world.alice.good("POST", "/v1/templates", TEMPLATE)
    _stocked(world)


def _claim_of_template_again(world: World) -> None:
    if "web" not in world.environments():
        world.alice.good("POST", _ENVIRONMENTS, {"name": "web", "template": "tpl"})
    _stocked(world)


def _verb_again(verb: str) -> Callable[[World], None]:
    def again(world: World) -> None:
        world.alice.good("POST", f"{_ENVIRONMENTS}/web/{verb}", {"grace_seconds": 5} if verb != "start" else None)

    return again


def _share_again(world: World) -> None:
    for share in ("owner", "lan"):
        world.alice.good("PATCH", f"{_ENVIRONMENTS}/web", {"share": share})


def _template_again(world: World) -> None:
    if world.alice.ask("GET", "/v1/templates/tpl").status == 404:
        world.alice.good("POST", "/v1/templates", TEMPLATE)
    _stocked(world)


def _add_token(world: World) -> None:
    world.alice.good("POST", "/v1/tokens", TOKEN)


def _token_again(world: World) -> None:
    if not world.alice.good("GET", "/v1/tokens")["tokens"]:
        _add_token(world)


class Repair(Path):
    """Somebody removes a file beside the state file, and the daemon puts all of it back. Answers 200 when it is."""

    def begin(self, world: World) -> None:
        world.host.path(self._file(world)).unlink()
        world.hang_up()

    def reply(self, world: World) -> Reply:
        try:
            wait_until(lambda: self.is_done(world) or world.control.fired or not world.is_alive,
                       seconds=SETTLE_SECONDS, what="the state's return")
        except AssertionError as error:
            return Reply(0, str(error))
        return Reply(200, None)

    @classmethod
    def is_done(cls, world: World) -> bool:
        return world.host.path(cls._file(world)).exists()

    @staticmethod
    def _file(world: World) -> str:
        return f"{world.daemon.state_dir}/netnsd.db-shm"


def _repaired(world: World) -> None:
    wait_until(lambda: Repair.is_done(world), seconds=SETTLE_SECONDS, what="the state's return")


def _healthy(world: World) -> None:
    def is_healthy() -> bool:
        return any(s["health"] == "healthy" for s in world.environments()["web"]["services"])

    wait_until(is_healthy, seconds=SETTLE_SECONDS, what="a healthy server")


def _left_by_another(world: World) -> None:
    """What serves, a stock, a slot of a pool, an environment that was half-made and one half-removed; and no daemon."""
    _all_in_use(world)
    for name in ("creating", "removing"):
        _create(world, {**WHOLE, "name": name, "ports": []})
    world.daemon.kill()
    for name in ("creating", "removing"):
        world.change_state("UPDATE environments SET state = name WHERE name = ?", name)


def _all_in_use(world: World) -> None:
    _add_template(world)
    _create(world)
    _filled(1)(world)


def _never_started(world: World) -> None:
    if world.is_alive:
        assert world.daemon.stop() == 0
    world.host.run(["rm", "-rf", world.daemon.state_dir], check=True)


def _used(world: World) -> None:
    world.be_new()
    _create(world)
    world.alice.good("DELETE", f"{_ENVIRONMENTS}/web")


def _set_quota(world: World) -> None:
    world.root.good("PUT", "/v1/quotas/alice", {"environments": 5})


def _reset_quota(world: World) -> None:
    world.root.good("DELETE", "/v1/quotas/alice")


def _policy(ingress: list[Any]) -> dict[str, Any]:
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "in"},
            "spec": {"podSelector": {}, "ingress": ingress}}


_POLICY = {"policies": [_policy([{"from": [{"podSelector": {}}]}])]}


def _under_a_policy(world: World) -> None:
    _create(world)
    world.alice.good("POST", "/v1/policies", _POLICY)


def _policy_again(world: World) -> None:
    world.alice.good("POST", "/v1/policies", {"policies": [_policy([])]})
    world.alice.good("DELETE", "/v1/policies/in")


def _post(path: str, body: Any = None) -> dict[str, Any]:
    return {"method": "POST", "path": path, "body": body}


_GRACE = {"grace_seconds": 5}
PATHS = (
    Path("create", _post(_ENVIRONMENTS, WHOLE), again=_create_again(WHOLE)),
    Path("create bare", _post(_ENVIRONMENTS, WITHOUT), again=_create_again(WITHOUT)),
    Path("create looked after", _post(_ENVIRONMENTS, LOOKED_AFTER), fulfilled=_healthy,
         again=_create_again(LOOKED_AFTER)),
    Path("create in vain", _post(_ENVIRONMENTS, {**WHOLE, "command": ["/missing"]}), fails=frozenset({"launch_failed"}),
         again=_create_again(WHOLE)),
    Path("start", _post(f"{_ENVIRONMENTS}/web/start"), _create_stopped, Fate.KEPT, again=_verb_again("start")),
    Path("stop", _post(f"{_ENVIRONMENTS}/web/stop", _GRACE), _create, Fate.KEPT, again=_verb_again("stop")),
    Path("restart", _post(f"{_ENVIRONMENTS}/web/restart", _GRACE), _create, Fate.KEPT, again=_verb_again("restart")),
    Path("share", {"method": "PATCH", "path": f"{_ENVIRONMENTS}/web", "body": {"share": "lan", "labels": {"a": "b"}}},
         _create, Fate.KEPT, again=_share_again),
    Path("delete", {"method": "DELETE", "path": f"{_ENVIRONMENTS}/web"}, _create),
    Path("delete many", {"method": "DELETE", "path": f"{_ENVIRONMENTS}?" + "&".join(f"ref={n}" for n in _MANY)},
         _create_many, names=_MANY),
    Path("claim", _post(_ENVIRONMENTS, WHOLE), _filled(1), fulfilled=_filled(1), again=_create_again(WHOLE)),
    Path("claim bare", _post(_ENVIRONMENTS, WITHOUT), _filled(1), fulfilled=_filled(1), again=_create_again(WITHOUT)),
    Path("claim of a template", _post(_ENVIRONMENTS, {"name": "web", "template": "tpl"}), _add_template,
         fulfilled=_stocked, again=_claim_of_template_again),
    Path("refill", {"method": "PATCH", "path": "/v1/pools/slots", "body": {"size": 2}}, fulfilled=_filled(2),
         asker="root", names=(), again=_filled(2)),
    Path("drain", {"method": "PATCH", "path": "/v1/pools/slots", "body": {"size": 0}}, _filled(2), fulfilled=_emptied,
         asker="root", names=(), again=_emptied),
    Path("refill of a template", _post("/v1/templates", TEMPLATE), fulfilled=_stocked, names=(),
         again=_template_again),
    Path("removal of a template", {"method": "DELETE", "path": "/v1/templates/tpl"}, _add_template, names=()),
    Path("token", _post("/v1/tokens", TOKEN), names=(), again=_token_again),
    Path("revocation of a token", {"method": "DELETE", "path": "/v1/tokens/t"}, _add_token, names=()),
    Path("quota", {"method": "PUT", "path": "/v1/quotas/alice", "body": {"environments": 5}}, names=(), asker="root",
         again=_set_quota),
    Path("end of a quota", {"method": "DELETE", "path": "/v1/quotas/alice"}, _set_quota, names=(), asker="root",
         again=_reset_quota),
    Path("policy", _post("/v1/policies", _POLICY), _create, Fate.KEPT, again=_policy_again),
    Path("removal of a policy", {"method": "DELETE", "path": "/v1/policies/in"}, _under_a_policy, Fate.KEPT,
         again=_policy_again),
    Repair("repair of the state", {}, _create, Fate.KEPT, again=_repaired),
    DaemonStart("start of the daemon", {}, _left_by_another, Fate.KEPT, again=World.be_new),
    DaemonStop("stop of the daemon", {}, _all_in_use, Fate.KEPT, again=World.be_new),
)

# Where nobody has anything: what is made once, and taken away again.
FIRST_PATHS = (
    DaemonStart("first start of the daemon", {}, _never_started, names=(), again=World.be_new),
    Path("first create", _post(_ENVIRONMENTS, WHOLE), World.be_new, again=_create_again(WHOLE)),
    DaemonStop("last stop of the daemon", {}, _used, names=(), again=World.be_new),
)


def clean(world: World) -> None:
    """Remove what a trial left; each removal must work."""
    for template in world.alice.good("GET", "/v1/templates")["templates"]:
        world.alice.good("DELETE", f"/v1/templates/{template['name']}")
    _reset_quota(world)
    for token in world.alice.good("GET", "/v1/tokens")["tokens"]:
        world.alice.good("DELETE", f"/v1/tokens/{token['id']}")
    for policy in world.alice.good("GET", "/v1/policies")["policies"]:
        world.alice.good("DELETE", f"/v1/policies/{policy['name']}")
    for name in world.environments():
        world.alice.good("DELETE", f"{_ENVIRONMENTS}/{name}")
    if world.root.good("GET", "/v1/info")["pool_size"]:
        _emptied(world)


def examine(world: World, path: Path, *, starts: bool = False) -> list[str]:
    """Whether the path's environments are what they may be. Starts what is stopped, where that may be."""
    there = world.environments()
    found = [f"{name} came from nowhere" for name in there
             if name not in path.names and not name.startswith("tpl-")]
    if path.fate is Fate.KEPT and "web" not in there:
        return [*found, "web is gone"]
    for name in path.names:
        if name not in there:
            continue
        environment = there[name]
        if (starts or path.fate is Fate.KEPT) and environment["state"] == "stopped":
            if path.fails:  # it cannot be started, whatever happens
                continue
            started = world.alice.ask("POST", f"{_ENVIRONMENTS}/{name}/start")
            if not started.is_good:
                found.append(f"{name} cannot be started: {started}")
                continue
            environment = started.body
        wanted = environment if path.name != "delete many" else {**environment, "ports": []}
        found += world.complaints_of(wanted)
    return found
