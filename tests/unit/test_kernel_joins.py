"""Daemons and launchers of different versions meet at every upgrade: none starts a command without its limit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from netnsd.core.interfaces import Launch
from netnsd.errors import LauncherUnavailable
from netnsd.kernel._order import Order
from netnsd.kernel.processes import LauncherProcesses

ORDER = {"argv": ["true"], "env": {}, "cwd": "/", "uid": 1, "gid": 1, "groups": [], "umask": 18, "limits": {},
         "hard_limits": {}, "setuid": False, "hosts_file": "/", "resolv_file": None, "hostname": "", "tty": False}


def test_an_order_of_an_earlier_daemon_joins_nothing() -> None:
    assert Order(json.dumps(ORDER).encode()).joins == []
    assert Order(json.dumps({**ORDER, "joins": ["/a", "/b"]}).encode()).joins == ["/a", "/b"]


@pytest.mark.parametrize("joins", [["a\0b"], [1], "x\0", 7])
def test_groups_that_cannot_be_are_malformed(joins: object) -> None:
    with pytest.raises(ValueError, match="malformed order"):
        Order(json.dumps({**ORDER, "joins": joins}).encode())


@pytest.mark.parametrize("knows", [False, True])
def test_a_launcher_that_knows_no_limits_is_not_asked_for_one(tmp_path: Path, knows: bool) -> None:
    processes = LauncherProcesses(str(tmp_path / "socket"), str(tmp_path), [])
    processes._joins = knows
    (tmp_path / "group").mkdir()
    (tmp_path / "netns").touch()
    launch = Launch(launch_id="l", netns=str(tmp_path / "netns"), cgroup="group", hostname="h", argv=("x",), env={},
                    cwd="/", uid=1, gid=1, groups=(), umask=0, limits={}, setuid=False, hosts_file="/",
                    resolv_file=None, joins=("/v1/group",))
    with open("/dev/null", "rb") as log:
        if knows:
            fds, _body, order = processes._order(launch, log.fileno())
            assert json.loads(order)["joins"] == ["/v1/group"]
            for fd in fds:
                os.close(fd)
        else:
            with pytest.raises(LauncherUnavailable, match="earlier version") as caught:
                processes._order(launch, log.fileno())
            assert "restart netnsd-launcher" in caught.value.hint
