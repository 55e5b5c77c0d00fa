"""A bridge takes 1023 ports (BR_MAX_PORTS, net/bridge/br_private.h): the next is refused, whoever made the others."""

from __future__ import annotations

import pytest

from tests.harness import ALICE, Daemon
from tests.harness.host import tool
from tests.system.api import Api
from tests.system.clients import nothing_left

pytestmark = pytest.mark.root
_MOST = 1023


@pytest.mark.timeout(120)
def test_on_a_full_bridge_a_creation_is_refused_and_leaves_nothing(daemon: Daemon) -> None:
    host, api = daemon.host, Api(daemon, ALICE)
    api.create("kept")
    with nothing_left(host):
        lines = [f"link add f{n} type veth peer name g{n}\nlink set f{n} master ndbr0" for n in range(_MOST - 1)]
        host.run([tool("ip"), "-batch", "-"], stdin="\n".join(lines) + "\n", check=True, timeout=60)
        for command in (None, ["sleep", "1000"]):
            status, answer = api.ask("POST", "/v1/environments", {
                "name": "web", "command": command, "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/"})
            assert (status, answer["error"]["code"]) == (500, "kernel_error")
            assert answer["error"]["details"] == {"stage": "veth", "errno": "EXFULL"}
            assert api.names() == ["kept"]
        # The others' go all at once, by a group.
        host.run([tool("ip"), "-batch", "-"], check=True, timeout=60, stdin="".join(
            f"link set f{n} group 7\n" for n in range(_MOST - 1)) + "link delete group 7\n")
        assert api.create("web")["state"] == "running"
        api.good("DELETE", "/v1/environments/web")
