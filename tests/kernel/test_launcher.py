"""The launcher and the daemon's end of it, with real processes."""

# ruff: noqa: ASYNC220, ASYNC230, ASYNC240
# Small files and processes of tests: nothing else waits meanwhile.

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import pytest
import trio
import trio.testing

from netnsd.errors import LauncherUnavailable, LaunchFailed
from netnsd.kernel import launcher
from netnsd.kernel._messages import HEADER, Kind, decode, encode, receive, sealed_memfd, send
from netnsd.kernel.processes import LauncherProcesses
from tests.kernel.launching import UID, PreparedProcesses, World, launching, needs_root, until

pytestmark = needs_root


@pytest.fixture(params=[LauncherProcesses, PreparedProcesses])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with launching(request.param) as world:
        yield world


# -- what a command finds -----------------------------------------------------------------------------------------


async def test_command_runs_as_its_user_with_its_groups_only(world: World) -> None:
    said = await world.run("id -u; id -g; id -G; grep Cap /proc/self/status", groups=(23456, 23457))
    lines = said.splitlines()
    assert lines[:3] == [str(UID), str(UID), f"{UID} 23456 23457"]
    assert {line.split()[1] for line in lines[3:] if not line.startswith("CapBnd")} == {"0" * 16}


async def test_only_three_descriptors_reach_a_command(world: World) -> None:
    said = await world.run("ls /proc/$$/fd; readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2")
    assert said.split() == ["0", "1", "2", "/dev/null", world.path("log"), world.path("log")]


async def test_signals_are_as_at_a_login(world: World) -> None:
    said = await world.run("grep -E 'Sig(Blk|Ign)' /proc/self/status")
    # glibc's posix_spawn ignores 32 and 33, its own; it takes them back where it uses them.
    own = 1 << 31 | 1 << 32
    assert [int(line.split()[1], 16) & ~own for line in said.splitlines()] == [0, 0]


@pytest.mark.parametrize(("setuid", "seen"), [(False, "1"), (True, "0")])
async def test_no_new_privs_unless_setuid(world: World, setuid: bool, seen: str) -> None:
    assert (await world.run("grep NoNewPrivs /proc/self/status", setuid=setuid)).split()[1] == seen


async def test_umask_session_and_environment_are_the_commands_own(world: World) -> None:
    env = {"PATH": "/bin:/usr/bin", "A": "ö\udcff b"}
    said = await world.run("umask; cut -d' ' -f1,6 /proc/$$/stat; env | grep -av ^PWD=", umask=0o027, env=env)
    umask, session, *variables = said.splitlines()
    assert int(umask, 8) == 0o027
    assert len(set(session.split())) == 1
    assert sorted(variables) == ["A=ö\udcff b", "PATH=/bin:/usr/bin"]


async def test_limits_are_soft_and_at_most_the_hard_ones(world: World) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    said = await world.run("ulimit -Sn; ulimit -Hn; ulimit -Sc", limits={"nofile": 100, "core": 0})
    assert said.split() == ["100", str(hard), "0"]
    assert (await world.run("ulimit -Sn", limits={"nofile": -1})).split() == [str(hard)]
    said = await world.run("ulimit -Hn; ulimit -Hc; ulimit -Sn", limits={"nofile": -1},
                           hard_limits={"nofile": 99, "core": 0})
    assert said.split() == ["99", "0", "99"]
    assert (await world.run("ulimit -Sn", limits={"nofile": hard + 1})).split() == [str(hard)]


async def test_without_limits_the_launchers_own_hold(world: World) -> None:
    assert (await world.run("ulimit -Sn")).split() == [str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])]


async def test_mounts_are_private_and_show_the_environments_files(world: World) -> None:
    with open("/etc/hosts") as file:
        hosts_before = file.read()
    with open("/proc/self/mountinfo") as file:
        mounts_before = file.read()
    resolv = world.write("resolv", "nameserver 192.0.2.1\n")
    script = "cat /etc/hosts /etc/resolv.conf; ls /sys/class/net; grep -c shared: /proc/self/mountinfo; pwd; ls"
    work = world.path("work")
    os.mkdir(work)
    world.write("work/here", "")
    said = await world.run(script + "|| true", cwd=work, resolv_file=resolv)
    assert said.splitlines() == ["127.0.0.1 localhost inside", "nameserver 192.0.2.1", "lo", "0", work, "here"]
    with open("/etc/hosts") as file:
        assert file.read() == hosts_before
    with open("/proc/self/mountinfo") as file:
        assert file.read() == mounts_before


async def test_cgroups_stay_visible_below_the_fresh_sys(world: World) -> None:
    said = await world.run("ls -d $0; cat /proc/self/cgroup".replace("$0", world.tree.root))
    assert world.tree.root in said
    assert said.rstrip().endswith(f"/{os.path.basename(world.tree.root)}/nd0/main")


async def test_host_name_is_the_environments(world: World) -> None:
    before = socket.gethostname()
    assert await world.run("hostname", hostname="shop") == "shop\n"
    assert socket.gethostname() == before


async def test_directory_is_entered_with_the_users_groups(world: World) -> None:
    os.mkdir(world.path("team"), 0o750)
    os.chown(world.path("team"), 0, 23456)
    assert (await world.run("pwd", cwd=world.path("team"), groups=(23456,))).strip() == world.path("team")


# -- what can go wrong --------------------------------------------------------------------------------------------


async def _failure(world: World, *argv: str, **changes: Any) -> tuple[str, str, str]:
    with pytest.raises(LaunchFailed) as caught:
        await world.processes.launch(world.order(*(argv or ("true",)), **changes))
    if "netns" not in changes:  # found before anything was ordered: a prepared child still waits
        assert world.tree.pids("") == []
    details = caught.value.details
    return details["stage"], details["errno"], caught.value.message


async def test_failures_name_stage_and_errno(world: World) -> None:
    secret = world.path("secret")
    os.mkdir(secret, 0o700)
    assert await _failure(world, cgroup="none") == (
        "cgroup", "ENOENT", f"cgroup: No such file or directory: {world.tree.root}/none")
    assert await _failure(world, cwd="/none") == ("chdir", "ENOENT", "chdir: No such file or directory: /none")
    assert await _failure(world, cwd=secret) == ("chdir", "EACCES", f"chdir: Permission denied: {secret}")
    assert (await _failure(world, netns=world.hosts))[:2] == ("setns", "EINVAL")
    assert (await _failure(world, netns="/none"))[:2] == ("setns", "ENOENT")
    assert (await _failure(world, hosts_file="/none"))[:2] == ("mounts", "ENOENT")
    assert (await _failure(world, hostname="x" * 65))[:2] == ("hostname", "EINVAL")
    assert (await _failure(world, limits={"fish": 1})) == ("limits", "EINVAL", "limits: Invalid argument: fish")


async def test_cgroup_that_refuses_processes_fails_in_its_stage(world: World) -> None:
    await world.tree.create("t/threaded")
    with open(world.tree.path("t/threaded") + "/cgroup.type", "w") as file:
        file.write("threaded")
    await world.tree.create("t/invalid")
    assert (await _failure(world, cgroup="t/invalid"))[:2] == ("cgroup", "ENOTSUP")


async def test_exec_failures_are_told_as_by_a_shell(world: World) -> None:
    plain = world.write("plain", "echo\n")
    script = world.write("script", "echo\n", 0o755)
    orphan = world.write("orphan", "#!/none\n", 0o755)
    os.mkdir(world.path("hidden"), 0o700)
    world.write("hidden/tool", "#!/bin/sh\n", 0o755)
    path = {"PATH": f"/none:{world.path('hidden')}:{world.directory}:/usr/bin:/bin"}
    assert await _failure(world, "none-such") == (
        "exec", "ENOENT", "exec: No such file or directory: none-such")
    assert (await _failure(world, ""))[:2] == ("exec", "ENOENT")
    assert (await _failure(world, plain))[:2] == ("exec", "EACCES")
    assert (await _failure(world, "plain", env=path))[:2] == ("exec", "EACCES")
    assert (await _failure(world, "tool", env=path))[:2] == ("exec", "ENOENT")
    assert (await _failure(world, "hidden", env=path))[:2] == ("exec", "ENOENT")
    assert (await _failure(world, world.path("hidden")))[:2] == ("exec", "EACCES")
    assert (await _failure(world, script))[:2] == ("exec", "ENOEXEC")
    assert await _failure(world, orphan) == ("exec", "ENOENT", f"exec: No such file or directory: {orphan}")
    assert (await _failure(world, "true", "x" * 200_000))[:2] == ("exec", "E2BIG")


async def test_malformed_messages_get_an_error_and_the_launcher_goes_on(world: World) -> None:
    pid = world.processes.launcher_pid
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(5)
        sock.connect(world.path("l.sock"))
        null = os.open("/dev/null", os.O_RDWR)
        order = sealed_memfd(b'{"argv": []}')
        deep = sealed_memfd(b"[" * 100_000)
        for message, fds in (
            (b"x", []),
            (HEADER.pack(99, 1, 5), []),
            (HEADER.pack(2, 77, 5) + b"{}", []),
            (HEADER.pack(2, Kind.SPAWN, 5) + b"[]", []),
            (HEADER.pack(2, Kind.SPAWN, 5) + b"{", []),
            (encode(Kind.SPAWN, 5), []),
            (encode(Kind.SPAWN, 5), [null] * 4),
            (encode(Kind.SPAWN, 5), [null] * 9),
            (encode(Kind.SPAWN, 5), [null, null, null, order]),
            (encode(Kind.SPAWN, 5), [null, null, null, deep]),
            (encode(Kind.ACKNOWLEDGE, 5, {"launch_id": 1}), []),
            (encode(Kind.HELLO, 5, {"x": "x" * 40_000}), []),
        ):
            send(sock, message, fds)
            kind, body = decode(receive(sock)[0])
            assert (kind, list(body)) == (Kind.ERROR, ["message"]), message[:40]
        send(sock, encode(Kind.HELLO, 6))
        assert decode(receive(sock)[0]) == (Kind.HELLO, {"protocol": 2, "pid": pid, "joins": True})
        for fd in (null, order, deep):
            os.close(fd)
    assert len([fd for fd in os.listdir(f"/proc/{pid}/fd") if int(fd) > 2]) <= 8


# -- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill $$", 143), ("kill -9 $$", 137)])
async def test_exit_codes(world: World, script: str, code: int) -> None:
    launch = world.shell(script)
    await world.processes.launch(launch)
    assert await world.ended(launch.launch_id) == code
    assert await world.processes.known() == ([], [])


async def test_daemonised_child_stays_in_its_cgroup_until_its_own_end(world: World) -> None:
    launch = world.shell("setsid sh -c 'sleep 0.3' & exit 0")
    await world.processes.launch(launch)
    assert await world.ended(launch.launch_id) == 0
    assert world.tree.populated("nd0/main")
    with trio.fail_after(5):
        await world.tree.empty("nd0/main")
    assert world.tree.pids("nd0") == []


_DAEMON = """
import json, os, sys, trio
sys.path.insert(0, os.getcwd())
from netnsd.core.interfaces import Launch
from netnsd.kernel.processes import LauncherProcesses
async def main():
    processes = LauncherProcesses(sys.argv[1], sys.argv[2], [])
    async with trio.open_nursery() as nursery:
        await nursery.start(processes.run)
        for fields in json.loads(sys.argv[3]):
            await processes.launch(Launch(**fields, log_fd=1))
        print("launched", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


async def test_exits_while_no_daemon_lives_are_kept_until_acknowledged(world: World) -> None:
    orders = [world.shell("exit 5"), world.shell(f"until test -e {world.path('go')}; do sleep 0.01; done; exit 6")]
    fields = [{k: v for k, v in asdict(o).items() if k != "log_fd"} for o in orders]
    arguments = [sys.executable, "-c", _DAEMON, world.path("l.sock"), world.tree.root, json.dumps(fields)]
    await world.disconnect()
    daemon = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    said = await trio.to_thread.run_sync(daemon.stdout.readline)
    assert said == b"launched\n"
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    world.write("go", "")
    await world.connect()
    with trio.fail_after(5):
        codes: dict[str, int | None] = {}
        while len(codes) < 2:
            exited = await world.processes.exits.receive()
            if exited is not None:
                codes[exited.launch_id] = exited.code
    assert codes == {orders[0].launch_id: 5, orders[1].launch_id: 6}
    assert len((await world.processes.known())[1]) == 2
    world.processes.acknowledge(orders[0].launch_id)
    assert [e.launch_id for e in (await world.processes.known())[1]] == [orders[1].launch_id]


async def test_death_of_the_launcher_is_told_and_servers_go_on(world: World) -> None:
    pid = await world.processes.launch(world.order("sleep", "60"))
    old = world.processes.launcher_pid
    assert old is not None
    os.kill(old, signal.SIGKILL)
    with trio.fail_after(5):
        assert await world.processes.exits.receive() is None
    assert await world.processes.known() == ([], [])
    assert world.processes.launcher_pid not in (None, old)
    await until(lambda: world.tree.pids("nd0/main") == [pid])
    assert await world.run("echo again") == "again\n"


async def test_launch_in_flight_fails_when_the_launcher_dies(world: World) -> None:
    pid = world.processes.launcher_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    async def fail() -> None:
        with pytest.raises(LauncherUnavailable):
            await world.processes.launch(world.order("true"))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(pid, signal.SIGKILL)


async def test_cancelled_launch_is_killed_when_it_starts_after_all(world: World) -> None:
    pid = world.processes.launcher_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with trio.move_on_after(0.05) as scope:
        await world.processes.launch(launch := world.order("sleep", "60"))
    assert scope.cancelled_caught
    os.kill(pid, signal.SIGCONT)
    assert await world.ended(launch.launch_id) == 137
    assert world.tree.pids("") == []


async def test_known_tells_more_than_a_packet_holds(world: World) -> None:
    launches = [world.order("true", launch_id=f"{'x' * 1000}{n}") for n in range(300)]
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for launch in launches:
                nursery.start_soon(world.processes.launch, launch)
        for _ in launches:
            await world.processes.exits.receive()
    running, exits = await world.processes.known()
    assert not running
    assert {e.launch_id for e in exits} == {launch.launch_id for launch in launches}


async def test_slow_start_of_one_command_does_not_hold_up_others(world: World) -> None:
    await world.tree.create("slow")
    with open(world.tree.path("slow") + "/cgroup.freeze", "w") as file:
        file.write("1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.processes.launch, world.order("true", cgroup="slow"))
        await until(lambda: world.tree.populated("slow"))
        assert await world.run("echo quick") == "quick\n"
        assert len((await world.processes.known())[0]) == 1
        with open(world.tree.path("slow") + "/cgroup.freeze", "w") as file:
            file.write("0")


async def test_launcher_started_by_somebody_else_is_used(world: World) -> None:
    other = LauncherProcesses(world.path("l.sock"), world.tree.root, [])
    pid = world.processes.launcher_pid
    await world.disconnect()
    async with trio.open_nursery() as nursery:
        await nursery.start(other.run)
        assert other.launcher_pid == pid
        nursery.cancel_scope.cancel()


async def test_launcher_ends_cleanly_on_sigterm_and_servers_go_on(world: World) -> None:
    assert os.stat(world.path("l.sock")).st_mode & 0o777 == 0o600
    with open(f"/proc/{world.processes.launcher_pid}/comm") as file:
        assert file.read() == "netnsd-launcher\n"
    pid = await world.processes.launch(world.order("sleep", "60"))
    await world.end_launcher()
    assert not os.path.exists(world.path("l.sock"))
    await until(lambda: world.tree.pids("nd0/main") == [pid])


_ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


async def test_listening_socket_of_systemd_is_taken(world: World) -> None:
    await world.end_launcher()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(world.path("l.sock"))
        listener.listen()
        command = [sys.executable, "-I", "-S", launcher.__file__, "--socket", world.path("l.sock")]
        arguments = [sys.executable, "-c", _ACTIVATE, str(listener.fileno()), *command]
        started = subprocess.Popen(arguments, pass_fds=[listener.fileno()])
    await world.connect()
    assert world.processes.launcher_pid == started.pid
    assert await world.run("echo here") == "here\n"
    await world.end_launcher()
    assert started.wait(5) == 0
    assert os.path.exists(world.path("l.sock"))  # its owner's to remove
    os.unlink(world.path("l.sock"))


_HOST = """
set -e
mount --make-rshared /
pins() { mkdir -p $1; mount --bind $1 $1; touch $1/pin; mount --bind /proc/self/ns/net $1/pin; }
pins $0/early
"$@" --hide $0/early --hide $0/late
pins $0/late
echo done
read end
"""


async def test_pins_are_not_copied_into_servers_mounts(world: World) -> None:
    await world.end_launcher()
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _HOST, world.directory]
    command += [sys.executable, "-I", "-S", launcher.__file__, "--detach", "--socket", world.path("l.sock")]
    host = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert host.stdin is not None
    assert host.stdout is not None
    try:
        assert await trio.to_thread.run_sync(host.stdout.readline) == b"done\n"
        await world.connect()
        with open(f"/proc/{host.pid}/mountinfo") as file:
            mounts = file.read()
        assert "/early/pin " in mounts
        assert "/late/pin " in mounts
        assert "/pin " not in await world.run("cat /proc/self/mountinfo")
    finally:
        host.kill()
        host.wait()
        host.stdin.close()
        host.stdout.close()
