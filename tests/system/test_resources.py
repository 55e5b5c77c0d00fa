"""What an environment may take is all that it takes: memory, processors and its link, each environment for itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.harness import ALICE, BOB, Daemon, cgroups, wait_until
from tests.system.clients import PYTHON, Environment, ask, echo_server, inside, main_of, nothing_left, published

MIB = 1 << 20
# Takes so many MiB, and says so; the other goes on.
TAKES = "import sys, time; held = bytearray(int(sys.argv[1]) << 20); print(len(held) >> 20, flush=True)"
EATS = f"{TAKES}; time.sleep(1000)"
# Does nothing but work for so many seconds; says how much of them it worked.
WORKS = """
import sys, time
end, began = time.monotonic() + float(sys.argv[1]), time.process_time()
while time.monotonic() < end:
    pass
print((time.process_time() - began) / float(sys.argv[1]))
"""
BULK = (Path(__file__).parents[1] / "systemd" / "programs" / "bulk.py").read_text(encoding="utf-8")


@pytest.fixture
def daemon(tidy_daemon: Daemon) -> Daemon:
    """The module's."""
    return tidy_daemon


def _told(daemon: Daemon, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == kind]


def _shown(daemon: Daemon, name: str) -> Environment:
    shown: Environment = daemon.ctl_json("show", name, user=ALICE)
    return shown


# -- memory -----------------------------------------------------------------------------------------------------


def test_who_needs_more_memory_than_its_environment_may_have_is_ended_and_that_is_said(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        neighbour = daemon.create_json("web", *echo_server("bob", 3000), user=BOB, ports=[3000], wait=True)
        before = len(_told(daemon, "oom_killed"))
        web = daemon.create_json("web", PYTHON, "-c", EATS, "200", user=ALICE, options=("--memory", "64M"))
        assert web["resources"]["memory"] == 64 * MIB
        done = daemon.ctl("wait", "web", "--for", "exit", "--timeout", "10", user=ALICE)
        assert done.returncode == 137
        shown = _shown(daemon, "web")
        assert (main_of(shown)["state"], main_of(shown)["exit_code"], shown["oom_kills"]) == ("exited", 137, 1)
        [event] = _told(daemon, "oom_killed")[before:]
        assert (event["service"], event["count"], event["memory"], event["uid"]) == ("main", 1, 64 * MIB, ALICE.uid)
        text = daemon.ctl("show", "web", user=ALICE).stdout
        assert "memory 64M" in text
        assert "1 for lack of memory" in text
        assert ask(daemon.host, "tcp", "127.0.0.1", published(neighbour), user=BOB) == "bob heard hello"
        daemon.ctl("rm", "web", user=ALICE, check=True)
        daemon.ctl("rm", "web", user=BOB, check=True)


def test_what_fits_runs_and_all_commands_of_an_environment_share_what_there_is(daemon: Daemon) -> None:
    daemon.create_json("web", PYTHON, "-c", EATS, "60", user=ALICE, options=("--memory", "96M"))
    wait_until(lambda: daemon.ctl("logs", "web", user=ALICE).stdout == "60\n", what="its memory")
    before = len(_told(daemon, "oom_killed"))
    # The kernel ends who has most of it: the server, perhaps, and not the command.
    daemon.ctl("exec", "web", "--", PYTHON, "-c", TAKES, "80", user=ALICE)
    wait_until(lambda: _shown(daemon, "web")["oom_kills"] >= 1, what="a notice, whoever it was")
    assert len(_told(daemon, "oom_killed")) > before
    held = inside(daemon, "web", PYTHON, "-c", TAKES, "8", user=ALICE)
    assert held == "8"


def test_a_command_that_is_ended_for_lack_of_memory_is_noticed_and_the_count_outlives_the_daemon(
        daemon: Daemon) -> None:
    daemon.create_json("lab", user=ALICE, options=("--memory", "32M"))
    done = daemon.ctl("exec", "lab", "--", PYTHON, "-c", EATS, "100", user=ALICE)
    assert done.returncode == 137
    wait_until(lambda: _shown(daemon, "lab")["oom_kills"] == 1, what="the notice of a command that is no service")
    event = _told(daemon, "oom_killed")[-1]
    assert (event["service"], event["name"]) == ("", "lab")
    told = len(_told(daemon, "oom_killed"))
    daemon.kill()
    daemon.start()
    assert _shown(daemon, "lab")["oom_kills"] == 1
    assert daemon.ctl("exec", "lab", "--", PYTHON, "-c", EATS, "100", user=ALICE).returncode == 137
    wait_until(lambda: _shown(daemon, "lab")["oom_kills"] == 2, what="the next one")
    assert len(_told(daemon, "oom_killed")) == told + 1


def test_the_smallest_limit_of_memory_has_room_for_a_small_command(daemon: Daemon) -> None:
    daemon.create_json("tiny", "sleep", "1000", user=ALICE, options=("--memory", "4M"))
    assert inside(daemon, "tiny", "echo", "well", user=ALICE) == "well"
    assert main_of(_shown(daemon, "tiny"))["state"] == "running"


# -- processors -------------------------------------------------------------------------------------------------


def test_processors_are_held_for_all_of_an_environment_and_others_are_not_slowed(daemon: Daemon) -> None:
    daemon.create_json("slow", user=ALICE, options=("--cpus", "0.1"))
    daemon.create_json("fast", user=ALICE)
    running = [daemon.host.popen([*_ctl(daemon), "exec", name, "--", PYTHON, "-c", WORKS, "2"], user=ALICE,
                                 env={"NETNSD_SOCKET": daemon.socket}) for name in ("slow", "slow", "fast")]
    first, second, unlimited = (float(process.communicate(timeout=30)[0]) for process in running)
    assert 0.01 < first + second < 0.2
    assert unlimited > 2 * (first + second)


def _ctl(daemon: Daemon) -> list[str]:
    return [os.path.join(os.path.dirname(daemon.command[0]), "netnsctl")]


# -- bandwidth --------------------------------------------------------------------------------------------------


def _transfer(daemon: Daemon, direction: str, environment: Environment,
              seconds: float = 1.0) -> subprocess.Popen[bytes]:
    return daemon.host.popen([PYTHON, "-c", BULK, direction, environment["address"], str(seconds)], user=ALICE)


def _bulk(daemon: Daemon, name: str, *options: str) -> Environment:
    return daemon.create_json(name, PYTHON, "-c", BULK, "serve", user=ALICE, ports=[3000], wait=True, options=options)


def _rates(transfers: list[subprocess.Popen[bytes]]) -> list[float]:
    return [float(process.communicate(timeout=30)[0]) for process in transfers]


def test_bandwidth_is_held_both_ways_for_each_environment_by_itself(daemon: Daemon) -> None:
    with nothing_left(daemon.host):
        limited = {rate: _bulk(daemon, f"web-{rate}", "--bandwidth", f"{rate}M") for rate in (10, 50)}
        free = _bulk(daemon, "free")
        for direction in ("to", "from"):
            low, high = _rates([_transfer(daemon, direction, each) for each in limited.values()])
            assert 3e6 < low < 13e6, direction
            assert 15e6 < high < 65e6, direction
            [unlimited] = _rates([_transfer(daemon, direction, free, 0.5)])
            assert unlimited > 5 * 65e6, direction
        daemon.ctl("rm", "--all", "--yes", user=ALICE, check=True)


def test_bandwidth_is_held_again_where_a_link_was_made_anew_and_where_the_daemon_was(daemon: Daemon) -> None:
    web = _bulk(daemon, "web", "--bandwidth", "10M")
    name = _buckets(daemon)[0]
    daemon.kill()
    daemon.start()
    assert _buckets(daemon) == [name, "eth0"]
    assert 3e6 < _rates([_transfer(daemon, "from", web)])[0] < 13e6
    daemon.host.run(["ip", "link", "delete", name], check=True)
    wait_until(lambda: _buckets(daemon) == [name, "eth0"], what="the limit, as it was")
    assert 3e6 < _rates([_transfer(daemon, "to", web)])[0] < 13e6
    done = daemon.ctl("exec", "web", "--", "tc", "qdisc", "del", "dev", "eth0", "root", user=ALICE)
    assert done.returncode != 0
    assert _buckets(daemon) == [name, "eth0"]


def _buckets(daemon: Daemon) -> list[str]:
    """The links with token buckets, on the host and in alice's web."""
    found = [json.loads(daemon.host.run([*enter, "tc", "-j", "qdisc", "show"]).stdout or "[]")
             for enter in ([], ["ip", "netns", "exec", "web"])]
    return [qdisc["dev"] for qdiscs in found for qdisc in qdiscs if qdisc["kind"] == "tbf"]


@pytest.mark.parametrize("pool", [0, 2])
def test_limits_hold_for_environments_of_the_pool_too(daemon: Daemon, pool: int) -> None:
    daemon.ctl("pool", "resize", str(pool), check=True)
    if pool:
        wait_until(lambda: daemon.ctl_json("pool", "ls")[0]["ready"] >= pool, what="a full pool")
    try:
        daemon.create_json("web", PYTHON, "-c", EATS, "1", user=ALICE,
                           options=("--bandwidth", "10M", "--memory", "32M", "--cpus", "0.5", "--pids", "20"))
        assert len(_buckets(daemon)) == 2
        pid = main_of(_shown(daemon, "web"))["pid"]
        groups = daemon.host.run(["cat", f"/proc/{pid}/cgroup"]).stdout
        groups_by_controller = {name: line for line in groups.splitlines() for name in line.split(":")[1].split(",")}
        for controller in ("memory", "cpu", "pids"):  # v2 is the one without a name
            group = groups_by_controller.get(controller) or groups_by_controller[""]
            assert daemon.host.daemon_cgroup_name in group
        daemon.create_json("bare", user=ALICE, options=("--bandwidth", "20M"))
        daemon.ctl("rm", "web", "bare", user=ALICE, check=True)
        assert not any(os.path.basename(path).startswith("nd")
                       for group in cgroups.limits_of(daemon.host.daemon_cgroup_name)
                       for path, _, _ in os.walk(group))
    finally:
        daemon.ctl("pool", "drain", check=True)


# -- quotas -----------------------------------------------------------------------------------------------------


def test_a_users_quota_holds_over_restarts_and_is_for_admins_to_change(daemon: Daemon) -> None:
    daemon.ctl("quota", "set", "alice", "--environments", "2", "--memory", "100M", check=True)
    for args in (("set", "alice", "--environments", "100"), ("reset", "alice"), ("show", "bob")):
        assert daemon.ctl("quota", *args, user=ALICE).returncode == 7, args
    assert daemon.ctl("create", "web", user=ALICE).returncode == 7, "it would have no limit of memory"
    daemon.create_json("a", user=ALICE, options=("--memory", "60M"))
    done = daemon.ctl("create", "b", "--memory", "60M", user=ALICE)
    assert done.returncode == 7
    assert "your quota of memory is 104857600: you have 62914560, and ask for 62914560" in done.stderr
    daemon.kill()
    daemon.start()
    daemon.create_json("b", user=ALICE, options=("--memory", "40M"))
    assert daemon.ctl("create", "c", "--memory", "4M", user=ALICE).returncode == 7
    assert daemon.ctl("create", "many", "--count", "3", "--memory", "4M", user=ALICE).returncode == 7
    shown = daemon.ctl("quota", "show", user=ALICE).stdout.splitlines()[1]
    assert [cell.strip() for cell in shown.split("   ") if cell] == ["alice", "2 of 2", "0", "100M of 100M", "0", "-"]
    daemon.ctl("rm", "--all", "--yes", user=ALICE, check=True)
    assert daemon.ctl_json("quota", "show", user=ALICE)[0]["used"]["environments"] == 0
    daemon.ctl("quota", "reset", "alice", check=True)
    daemon.create_json("free", user=ALICE)


def test_what_the_host_can_limit_is_said(daemon: Daemon) -> None:
    features = daemon.ctl_json("info")["features"]
    assert {name for name, has in features.items() if has} >= {"limit_memory", "limit_cpu", "limit_pids"}
    checks = {check["name"]: check["ok"] for check in daemon.ctl_json("doctor")["checks"]}
    assert {name: checks[name] for name in features} == features
