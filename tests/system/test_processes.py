"""Servers and commands run as whoever asked, from where they asked; they end as they should, and leave nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
from typing import Any

import pytest

from tests.harness import ALICE, BOB, ROOT, Daemon, User, wait_until
from tests.harness.daemon import program
from tests.system.clients import PYTHON, inside, is_gone, main_of, nothing_left

# What a process can tell of itself, as JSON.
_ABOUT = """
import json, os, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
umask = os.umask(0)
print(json.dumps({
    "uid": os.getresuid(), "gid": os.getresgid(), "groups": sorted(os.getgroups()), "cwd": os.getcwd(),
    "env": dict(os.environ), "umask": umask, "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
    "core": resource.getrlimit(resource.RLIMIT_CORE)[0], "no_new_privs": status["NoNewPrivs"].strip(),
    "capabilities": status["CapEff"].strip(), "descriptors": [fd for fd in os.listdir("/proc/self/fd") if
        os.path.exists(f"/proc/self/fd/{fd}")], "session": os.getsid(0), "pid": os.getpid(),
    "mounts": os.readlink("/proc/self/ns/mnt"), "devices": sorted(os.listdir("/sys/class/net")),
    "pins": [line.split()[4] for line in open("/proc/self/mountinfo") if "nsfs" in line],
    "oom": int(open("/proc/self/oom_score_adj").read()),
}), flush=True)
"""
_HARD_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _about(daemon: Daemon, user: User, *options: str, by: str = "service", shell: str = "",
           **run: Any) -> dict[str, Any]:
    """What a server, or a command beside it, finds. ``shell`` is done before netnsctl."""
    ctl = [program("netnsctl")]
    if by == "service":
        ctl += ["create", "about", "--port", "3000", "--port", "53/udp", *options, "--", PYTHON, "-c", _ABOUT]
    else:
        daemon.create_json("about", user=user, ports=[3000, "53/udp"])
        ctl += ["exec", "about", *options, "--", PYTHON, "-c", _ABOUT]
    done = daemon.host.run(["sh", "-ec", f'{shell or ":"}; exec "$@"', "sh", *ctl], user=user, check=True,
                           env={"NETNSD_SOCKET": daemon.socket, **run.pop("env", {})}, **run)
    said = done.stdout
    if by == "service":
        assert daemon.ctl("wait", "about", "--for", "exit", "--timeout", "5", user=user).returncode == 0
        said = daemon.ctl("logs", "about", user=user, check=True).stdout
    about: dict[str, Any] = json.loads(said)
    return about


def _error(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])["error"]
    return error


# -- what a command finds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["service", "exec"])
def test_a_command_has_its_callers_ids_groups_directory_umask_and_limits(tidy_daemon: Daemon, by: str) -> None:
    about = _about(tidy_daemon, ALICE, by=by, cwd=ALICE.home, shell="umask 027; ulimit -Sn 123; ulimit -Sc 0")
    assert about["uid"] == [ALICE.uid] * 3
    assert about["gid"] == [ALICE.gid] * 3
    assert about["groups"] == [61001, 61010, 61020], "netnsdtest and netnsd, as the caller has"
    assert about["cwd"] == ALICE.home
    assert about["umask"] == 0o027
    assert about["nofile"] == [123, _HARD_FILES]
    assert about["core"] == 0
    assert about["capabilities"] == "0" * 16
    assert about["oom"] == 0


@pytest.mark.parametrize("by", ["service", "exec"])
def test_a_command_has_three_descriptors_a_private_view_and_no_way_to_more_rights(tidy_daemon: Daemon, by: str) -> None:
    about = _about(tidy_daemon, ALICE, by=by)
    assert sorted(about["descriptors"]) == ["0", "1", "2"]
    assert about["no_new_privs"] == "1"
    assert about["devices"] == ["eth0", "lo"], "its own, in /sys"
    assert about["pins"] == [], "no copy of a namespace's pin, which would keep it alive"
    host = tidy_daemon.host
    assert about["mounts"] != host.run(["readlink", "/proc/self/ns/mnt"]).stdout.strip()
    if by == "service":
        assert about["session"] == about["pid"]


@pytest.mark.parametrize("by", ["service", "exec"])
def test_setuid_programs_work_only_when_asked_for(tidy_daemon: Daemon, by: str) -> None:
    assert _about(tidy_daemon, ALICE, "--setuid", by=by)["no_new_privs"] == "0"


@pytest.mark.parametrize("by", ["service", "exec"])
def test_a_command_has_its_callers_variables_and_netnsds(tidy_daemon: Daemon, by: str) -> None:
    about = _about(tidy_daemon, ALICE, "--env", "EXTRA=a b=c", by=by, env={
        "OWN": "ö", "PORT": "1", "NETNSD_IP": "192.0.2.1"})
    environment = tidy_daemon.ctl_json("show", "about", user=ALICE)
    tcp = next(p["published"] for p in environment["ports"] if p["protocol"] == "tcp")
    env = about["env"]
    assert {name: env[name] for name in ("OWN", "EXTRA", "HOME", "USER")} == {
        "OWN": "ö", "EXTRA": "a b=c", "HOME": ALICE.home, "USER": "alice"}
    assert {name: env[name] for name in env if name.startswith("NETNSD_") and name != "NETNSD_SOCKET"} == {
        "NETNSD_NAME": "about", "NETNSD_ID": environment["id"], "NETNSD_IP": environment["address"],
        "NETNSD_URL": f"http://localhost:{tcp}/"}
    assert (env["PORT"], env["HOST"]) == ("3000", "0.0.0.0")
    assert "NOTIFY_SOCKET" not in env, "nothing of the daemon's"


def test_a_private_directory_is_entered_as_its_owner_and_by_nobody_else(tidy_daemon: Daemon) -> None:
    host = tidy_daemon.host
    host.path(ALICE.home).chmod(0o755)
    private = host.directory(f"{ALICE.home}/private", user=ALICE, mode=0o700)
    try:
        assert _about(tidy_daemon, ALICE, "--cwd", private)["cwd"] == private
        with nothing_left(host):
            for user in (BOB, ROOT):
                done = tidy_daemon.ctl("create", "spy", "--cwd", private, "-o", "json", "--", "ls", user=user)
                if user is ROOT:
                    assert done.returncode == 0, "root may"
                    tidy_daemon.ctl("rm", "spy", check=True)
                    continue
                assert done.returncode == 1
                assert _error(done)["details"] == {"stage": "chdir", "errno": "EACCES"}
    finally:
        host.path(ALICE.home).chmod(0o750)


# -- what cannot be started -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "cwd", "stage", "errno"), [
    (["no-such-command"], "", "exec", "ENOENT"),
    (["./absent"], "", "exec", "ENOENT"),
    (["./plain"], "", "exec", "EACCES"),
    (["./without-shebang"], "", "exec", "ENOEXEC"),
    (["./lost-interpreter"], "", "exec", "ENOENT"),
    (["/"], "", "exec", "EACCES"),
    (["true"], "absent", "chdir", "ENOENT"),
    (["true"], "plain", "chdir", "ENOTDIR"),
])
def test_what_cannot_be_started_names_stage_and_reason_and_leaves_nothing(
        tidy_daemon: Daemon, command: list[str], cwd: str, stage: str, errno: str) -> None:
    host = tidy_daemon.host
    for name, text, mode in (("plain", "#!/bin/sh\n", 0o644), ("without-shebang", "echo x\n", 0o755),
                             ("lost-interpreter", "#!/nowhere\n", 0o755)):
        host.write(f"{ALICE.home}/{name}", text, user=ALICE, mode=mode)
    where = ["--cwd", f"{ALICE.home}/{cwd}"] if cwd else []
    with nothing_left(host):
        done = tidy_daemon.ctl("create", "web", "-p", "3000", *where, "-o", "json", "--", *command, user=ALICE)
        assert done.returncode == 1
        error = _error(done)
        assert error["code"] == "launch_failed"
        assert error["details"] == {"stage": stage, "errno": errno}
        assert error["message"].startswith(f"{stage}: ")
        assert tidy_daemon.ctl_json("ls", user=ALICE) == []
    free = tidy_daemon.ctl_json("info")
    assert (free["environments"], free["published_ports"]) == (0, 0)


def test_a_server_whose_program_is_gone_stays_stopped_and_says_why(tidy_daemon: Daemon) -> None:
    script = tidy_daemon.host.write(f"{ALICE.home}/server", "#!/bin/sh\nexec sleep 1000\n", user=ALICE, mode=0o755)
    before = tidy_daemon.create_json("web", script, user=ALICE, ports=[3000])
    tidy_daemon.host.path(script).unlink()
    done = tidy_daemon.ctl("restart", "web", "-o", "json", user=ALICE)
    assert _error(done)["details"] == {"stage": "exec", "errno": "ENOENT"}
    after = tidy_daemon.ctl_json("show", "web", user=ALICE)
    assert (after["state"], main_of(after)["pid"]) == ("stopped", None)
    assert (after["address"], after["ports"]) == (before["address"], before["ports"])


# -- stopping and starting ----------------------------------------------------------------------------------------


def test_stop_start_and_restart_keep_address_port_and_log(tidy_daemon: Daemon) -> None:
    made = tidy_daemon.create_json("web", "sh", "-c", "echo began; exec sleep 1000", user=ALICE, ports=[3000])
    stopped = tidy_daemon.ctl_json("stop", "web", user=ALICE)
    assert (stopped["state"], main_of(stopped)["state"], main_of(stopped)["pid"]) == ("stopped", "stopped", None)
    assert main_of(stopped)["exit_code"] == 128 + signal.SIGTERM
    assert is_gone(main_of(made)["pid"])
    assert tidy_daemon.ctl_json("stop", "web", user=ALICE) == stopped, "twice is fine"
    started = tidy_daemon.ctl_json("start", "web", user=ALICE)
    assert (started["state"], main_of(started)["exit_code"]) == ("running", None)
    assert tidy_daemon.ctl_json("start", "web", user=ALICE) == started, "twice is fine"
    restarted = tidy_daemon.ctl_json("restart", "web", user=ALICE)
    assert len({main_of(environment)["pid"] for environment in (made, started, restarted)}) == 3
    assert {(e["id"], e["address"], e["ports"][0]["published"]) for e in (made, stopped, started, restarted)} == {
        (made["id"], made["address"], made["ports"][0]["published"])}
    wait_until(lambda: tidy_daemon.ctl("logs", "web", user=ALICE).stdout == "began\n" * 3, what="three beginnings")


def test_a_server_that_ignores_sigterm_is_killed_with_its_children_after_the_grace_time(tidy_daemon: Daemon) -> None:
    code = "trap '' TERM; sleep 1000 & echo ready; while :; do sleep 1000; done"
    tidy_daemon.create_json("web", "sh", "-c", code, user=ALICE)
    wait_until(lambda: tidy_daemon.ctl("logs", "web", user=ALICE).stdout == "ready\n", what="the trap")
    stopped = tidy_daemon.ctl_json("stop", "web", "--grace", "0.2", user=ALICE)
    assert (stopped["state"], main_of(stopped)["exit_code"]) == ("stopped", 128 + signal.SIGKILL)
    left = [pid for pid in tidy_daemon.host.processes() if "sleep" in _command_line(pid)]
    assert left == []


@pytest.mark.parametrize(("ending", "code"), [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -9 $$", 137)])
def test_exit_code_of_a_server_is_told(tidy_daemon: Daemon, ending: str, code: int) -> None:
    tidy_daemon.create_json("web", "sh", "-c", ending, user=ALICE)
    assert tidy_daemon.ctl("wait", "web", "--for", "exit", "--timeout", "5", user=ALICE).returncode == code
    shown = tidy_daemon.ctl_json("show", "web", user=ALICE)
    assert (shown["state"], main_of(shown)["state"], main_of(shown)["exit_code"]) == ("stopped", "exited", code)


@pytest.mark.parametrize(("ending", "code"), [("exit 0", 0), ("exit 42", 42), ("kill -TERM $$", 143)])
def test_exec_passes_streams_and_exit_code_through(tidy_daemon: Daemon, ending: str, code: int) -> None:
    environment = tidy_daemon.create_json("web", user=ALICE)
    done = tidy_daemon.ctl("exec", "web", "--", "sh", "-c", f"cat; echo $NETNSD_IP; echo err >&2; {ending}", user=ALICE,
                           stdin="in\n")
    assert (done.returncode, done.stdout, done.stderr) == (code, f"in\n{environment['address']}\n", "err\n")


def test_exec_of_what_cannot_be_started_has_a_shells_exit_codes(tidy_daemon: Daemon) -> None:
    tidy_daemon.create_json("web", user=ALICE)
    assert tidy_daemon.ctl("exec", "web", "--", "no-such-command", user=ALICE).returncode == 127
    assert tidy_daemon.ctl("exec", "web", "--", "/etc/hostname", user=ALICE).returncode == 126
    assert tidy_daemon.ctl("exec", "web", "--", "true", user=BOB).returncode in (4, 125), "not his"


# -- ending all of it -------------------------------------------------------------------------------------------


def _command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_removal_ends_what_daemonised_itself_and_what_others_put_into_the_namespace(tidy_daemon: Daemon) -> None:
    host = tidy_daemon.host
    with nothing_left(host):
        tidy_daemon.create_json("web", "sh", "-c", "setsid -f sleep 1001; setsid -f sleep 1002; exec sleep 1003",
                                user=ALICE)
        inside(tidy_daemon, "web", "sh", "-c", "setsid -f sleep 1004 >/dev/null 2>&1 </dev/null", user=ALICE)
        lodger = host.popen(["ip", "netns", "exec", "web", "sleep", "1005"])  # in no cgroup of netnsd's

        def sleepers() -> set[str]:
            return set(re.findall(r"sleep (100\d)", "\n".join(map(_command_line, host.processes()))))

        wait_until(lambda: sleepers() == {"1001", "1002", "1003", "1004", "1005"}, what="five processes")
        tidy_daemon.ctl("rm", "web", user=ALICE, check=True)
        assert lodger.wait(timeout=5) == -signal.SIGKILL
        assert sleepers() == set()


def test_a_server_whose_first_process_ended_runs_until_the_last_one_does(tidy_daemon: Daemon) -> None:
    code = "setsid -f sh -c 'until [ -e go ]; do sleep 0.02; done'; exit 5"
    tidy_daemon.create_json("web", "sh", "-c", code, user=ALICE)
    wait_until(lambda: main_of(tidy_daemon.ctl_json("show", "web", user=ALICE))["exit_code"] == 5, what="the first end")
    shown = tidy_daemon.ctl_json("show", "web", user=ALICE)
    assert shown["state"] == "running"
    assert not is_gone(main_of(shown)["pid"])
    go = tidy_daemon.host.write(f"{ALICE.home}/go", "", user=ALICE)
    tidy_daemon.ctl("wait", "web", "--for", "exit", "--timeout", "5", user=ALICE)
    assert tidy_daemon.ctl_json("show", "web", user=ALICE)["state"] == "stopped"
    os.unlink(tidy_daemon.host.path(go))
