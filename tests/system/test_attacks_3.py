"""What a hostile user's processes do to others' processes and netnsd's own: by files, variables, paths and groups."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.harness import ALICE, BOB, CAROL, MALLORY, Daemon, HostNamespace, User, wait_until
from tests.harness.daemon import program
from tests.harness.host import tool
from tests.system.api import FIELDS, Api
from tests.system.clients import PYTHON, Environment, inside, is_gone, main_of, nothing_left

# Where set-uid programs work: a host's /run lets none.
_SUID = "/run/test/suid"


@pytest.fixture(scope="module")
def shared_host() -> Iterator[HostNamespace]:
    """A host with a set-uid root program of its own, ``who``, which says whose rights it has."""
    with HostNamespace() as made:
        made.run(["sh", "-ec", (f"mkdir -p {_SUID}; mount -t tmpfs -o suid,mode=755 netnsd-test {_SUID};"
                                f"cp {tool('id')} {_SUID}/who; chmod 4755 {_SUID}/who")], check=True)
        assert made.run([f"{_SUID}/who", "-u"], user=ALICE, check=True).stdout == "0\n", "set-uid programs do not work"
        yield made


@pytest.fixture
def daemon(tidy_daemon: Daemon) -> Daemon:
    return tidy_daemon


def _said(daemon: Daemon, name: str, user: User = ALICE) -> str:
    return daemon.ctl("logs", name, user=user, check=True).stdout


def _ended(daemon: Daemon, name: str, user: User = ALICE) -> str:
    """What a server said until its end, which must be a good one."""
    daemon.ctl("wait", name, "--for", "exit", "--timeout", "10", user=user, check=True)
    return _said(daemon, name, user)


@contextmanager
def _session(daemon: Daemon, ref: str, user: User) -> Iterator[subprocess.Popen[bytes]]:
    """A command of ``user`` that runs in an environment until the end of the context."""
    session = daemon.host.popen([program("netnsctl"), "exec", ref, "--", "sh", "-c", "echo there; exec cat"], user=user,
                                env={"NETNSD_SOCKET": daemon.socket}, stdin=subprocess.PIPE)
    assert session.stdin is not None
    assert session.stdout is not None
    assert session.stdout.readline() == b"there\n"
    yield session
    session.stdin.close()
    session.wait(timeout=5)


# -- processes ----------------------------------------------------------------------------------------------------

# What can be done to a process by its number, as JSON: {pid: {way: errno's name, or "done"}}.
_MOLEST = """
import ctypes, errno, json, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
PIDFD_GETFD = 438
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def read_memory(pid):
    room = ctypes.create_string_buffer(8)
    ours, theirs = Vector(ctypes.addressof(room), 8), Vector(0x400000, 8)
    check(libc.process_vm_readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0))
def take_descriptor(pid):
    check(libc.syscall(PIDFD_GETFD, os.pidfd_open(pid), 0, 0))
def write(path, text):
    with open(path, "r+b", buffering=0) as file:
        file.write(text)
WAYS = {
    "signal": lambda pid: os.kill(pid, signal.SIGURG),
    "signal by pidfd": lambda pid: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGURG),
    "trace": lambda pid: check(libc.ptrace(16, pid, None, None)),
    "seize": lambda pid: check(libc.ptrace(0x4206, pid, None, None)),
    "memory": lambda pid: open(f"/proc/{pid}/mem", "rb").close(),
    "memory by call": read_memory,
    "descriptor": take_descriptor,
    "descriptors": lambda pid: os.listdir(f"/proc/{pid}/fd"),
    "variables": lambda pid: open(f"/proc/{pid}/environ", "rb").read(),
    "map": lambda pid: open(f"/proc/{pid}/maps", "rb").read(),
    "root": lambda pid: os.listdir(f"/proc/{pid}/root/"),
    "directory": lambda pid: os.listdir(f"/proc/{pid}/cwd/"),
    "program": lambda pid: write(f"/proc/{pid}/exe", b"x"),
    "limits": lambda pid: check(libc.prlimit(pid, 7, ctypes.create_string_buffer(16), None)),
    "oom": lambda pid: write(f"/proc/{pid}/oom_score_adj", b"1000"),
    "priority": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19),
    "namespace": lambda pid: os.stat(f"/proc/{pid}/ns/net"),
    "enter": lambda pid: check(libc.setns(os.pidfd_open(pid), 0x40000000)),
}
found = {}
for pid in map(int, sys.argv[1].split(",")):
    found[pid] = {}
    for name, way in WAYS.items():
        try:
            way(pid)
            found[pid][name] = "done"
        except OSError as error:
            found[pid][name] = errno.errorcode.get(error.errno, str(error.errno))
print(json.dumps(found))
"""


def test_a_users_processes_do_nothing_to_anothers_or_to_netnsds(daemon: Daemon) -> None:
    other = daemon.create_json("other", "sleep", "1000", user=BOB)
    daemon.create_json("web", user=ALICE)
    daemon.create_json("pooled", user=BOB)  # a process waits there to become Bob's next server
    with _session(daemon, "other", BOB), _session(daemon, "web", ALICE):
        # The daemon, the launcher, and those that the launcher forked: monitors of both sessions, and who waits.
        netnsds = [daemon.pid, *daemon.launcher_pids()]
        assert len(netnsds) >= 4, netnsds
        victims = [main_of(other)["pid"], *netnsds]
        found = json.loads(inside(daemon, "web", PYTHON, "-c", _MOLEST, ",".join(map(str, victims)), user=ALICE))
        assert set(found) == {str(pid) for pid in victims}
        done = {(pid, way) for pid, ways in found.items() for way, outcome in ways.items()
                if outcome not in ("EPERM", "EACCES")}
        assert done == set()
        assert not any(is_gone(pid) for pid in victims)
        # The same program does all that to a process of its own user's, but for what is root's and for the namespace.
        mine = daemon.create_json("mine", "sleep", "1000", user=ALICE)
        own = json.loads(inside(daemon, "web", PYTHON, "-c", _MOLEST, str(main_of(mine)["pid"]), user=ALICE))
        ways = own[str(main_of(mine)["pid"])]
        assert {ways[way] for way in ("signal", "variables", "root", "directory", "map", "limits")} == {"done"}
        assert ways["program"] in ("EACCES", "ETXTBSY", "EPERM")
        assert ways["enter"] == "EPERM"


# Enters a namespace by its name, as it is and as root of a user namespace of one's own.
_ENTER = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for own in (False, True):
    if own and libc.unshare(0x10000000):  # CLONE_NEWUSER
        print("no user namespaces")
        break
    for path in sys.argv[1:]:
        try:
            fd = os.open(path, os.O_RDONLY)
            print("entered" if libc.setns(fd, 0x40000000) == 0 else errno.errorcode[ctypes.get_errno()])
        except OSError as error:
            print(errno.errorcode[error.errno])
"""


def test_nobody_enters_anothers_namespace_by_its_name_or_pin_not_even_as_root_of_his_own(daemon: Daemon) -> None:
    daemon.create_json("other", user=BOB)
    daemon.create_json("web", user=ALICE)
    slots = f"{daemon.runtime_dir}/slots"
    pins = [f"{slots}/{name}" for name in os.listdir(daemon.host.path(slots))]
    assert pins
    said = inside(daemon, "web", PYTHON, "-c", _ENTER, "/run/netns/other", "/run/netns/web", *pins, user=ALICE)
    assert set(said.split("\n")) <= {"EPERM", "EACCES", "ENOENT", "EINVAL", "no user namespaces"}, said
    assert "EPERM" in said or "EINVAL" in said  # its name is there, and leads to no namespace in a server's mounts


_ABSTRACT = """
import errno, socket, sys
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    with socket.socket(socket.AF_UNIX, kind) as client:
        try:
            client.connect("\\0netnsd-test-" + str(int(kind)))
            print("connected")
        except OSError as error:
            print(errno.errorcode[error.errno])
"""
_ABSTRACT_SERVER = """
import socket, sys, time
held = []
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    server = socket.socket(socket.AF_UNIX, kind)
    server.bind("\\0netnsd-test-" + str(int(kind)))
    if kind == socket.SOCK_STREAM:
        server.listen()
    held.append(server)
print("ready", flush=True)
time.sleep(1000)
"""


def test_abstract_sockets_are_of_one_environment_and_netnsd_has_none(daemon: Daemon) -> None:
    for name in ("web", "empty"):
        daemon.create_json(name, user=ALICE)
    daemon.create_json("serves", PYTHON, "-c", _ABSTRACT_SERVER, user=ALICE)
    wait_until(lambda: "ready" in _said(daemon, "serves"), what="its sockets")
    assert inside(daemon, "serves", PYTHON, "-c", _ABSTRACT, user=ALICE).split() == ["connected"] * 2
    assert inside(daemon, "empty", PYTHON, "-c", _ABSTRACT, user=ALICE).split() == ["ECONNREFUSED"] * 2
    server = daemon.host.popen([PYTHON, "-c", _ABSTRACT_SERVER])
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        assert inside(daemon, "web", PYTHON, "-c", _ABSTRACT, user=ALICE).split() == ["ECONNREFUSED"] * 2
    finally:
        server.kill()
        server.wait()
    listening = daemon.host.run(["cat", "/proc/net/unix"], check=True).stdout
    assert [line for line in listening.splitlines() if "netnsd" in line and "@" in line] == []


# -- set-uid programs, and variables that loaders obey --------------------------------------------------------------


def test_a_setuid_program_gains_its_rights_only_where_that_was_asked_for(daemon: Daemon) -> None:
    for options, uid in (((), str(ALICE.uid)), (("--setuid",), "0")):
        daemon.create_json("web", f"{_SUID}/who", "-u", user=ALICE, options=options)
        assert _ended(daemon, "web").strip() == uid
        assert inside(daemon, "web", f"{_SUID}/who", "-u", user=ALICE, flags=options) == uid
        daemon.ctl("rm", "web", user=ALICE, check=True)


_SITE = """
import os
with open(os.path.join(os.path.dirname(__file__), "loaded"), "a") as file:
    file.write(f"{os.getuid()} {os.geteuid()}\\n")
"""


def test_variables_that_loaders_obey_act_on_their_users_programs_alone(daemon: Daemon) -> None:
    host = daemon.host
    where = f"{ALICE.home}/loader"
    host.directory(where, user=ALICE)
    host.write(f"{where}/sitecustomize.py", _SITE, user=ALICE)
    # The loader writes a file for each program that it loads with these; ``loaded`` is from each Python's start.
    variables = {"LD_DEBUG": "files", "LD_DEBUG_OUTPUT": f"{where}/ld", "LD_LIBRARY_PATH": where, "LD_PRELOAD": "",
                 "GLIBC_TUNABLES": "glibc.malloc.check=3", "PYTHONPATH": where, "PYTHONINSPECT": "1",
                 "BASH_ENV": f"{where}/sitecustomize.py", "PATH": "/usr/bin:/bin", "HOME": ALICE.home}
    alice = Api(daemon, ALICE)
    script = f"{PYTHON} -c ''; {_SUID}/who -u"
    logged = len(daemon.log())
    for setuid in (False, True):
        alice.create(f"web-{setuid}".lower(), command=["sh", "-c", script], env=variables, cwd="/", setuid=setuid,
                     health={"command": ["true"], "interval_seconds": 1.0})
        _ended(daemon, f"web-{setuid}".lower())
    alice.create("lab")
    inside(daemon, "lab", "sh", "-c", script, user=ALICE,
           flags=[part for name, value in variables.items() for part in ("--env", f"{name}={value}")])
    files = {path.name: path.stat() for path in host.path(where).iterdir() if path.name.startswith("ld.")}
    assert files, "the loader did not obey"
    assert {status.st_uid for status in files.values()} == {ALICE.uid}, "a program of somebody else's obeyed"
    netnsds = {f"ld.{pid}" for pid in (daemon.pid, *daemon.launcher_pids())}
    assert netnsds.isdisjoint(files)
    loaded = host.path(f"{where}/loaded").read_text().splitlines()
    assert set(loaded) == {f"{ALICE.uid} {ALICE.uid}"}
    assert len(loaded) == 3
    # A set-uid program says whose rights it had, and its loader obeyed only where it had none but Alice's.
    assert [line for line in _said(daemon, "web-true").splitlines() if line.isdecimal()] == ["0"]
    assert "Traceback" not in daemon.log()[logged:]
    for pid in (daemon.pid, *daemon.launcher_pids()):
        with open(f"/proc/{pid}/environ", "rb") as file:
            assert not {name.encode() for name in variables if name.startswith(("LD_", "PYTHON", "BASH"))} & {
                entry.partition(b"=")[0] for entry in file.read().split(b"\0")}


# -- paths ----------------------------------------------------------------------------------------------------------


def test_a_directory_behind_a_link_or_a_process_is_entered_as_the_user_or_not(daemon: Daemon) -> None:
    host = daemon.host
    host.directory("/run/test/closed", mode=0o700)
    host.run(["ln", "-sfn", "/run/test/closed", f"{ALICE.home}/link"], user=ALICE, check=True)
    host.run(["ln", "-sfn", BOB.home, f"{ALICE.home}/bobs"], user=ALICE, check=True)
    host.run(["chmod", "700", BOB.home], user=BOB, check=True)
    host.run(["ln", "-sfn", "loop", f"{ALICE.home}/loop"], user=ALICE, check=True)
    (launcher,) = daemon.launcher_pids()
    alice = Api(daemon, ALICE)
    for cwd, errno in ((f"{ALICE.home}/link", "EACCES"), (f"{ALICE.home}/bobs", "EACCES"),
                       (f"{ALICE.home}/../../test/closed", "EACCES"), (f"{ALICE.home}/loop", "ELOOP"),
                       (f"/proc/{daemon.pid}/cwd", "EACCES"), (f"/proc/{launcher}/root", "EACCES"),
                       (f"/proc/{launcher}/fd/3", "EACCES"), ("/dev/null", "ENOTDIR")):
        status, body = alice.ask("POST", "/v1/environments", {"name": "web", "command": ["true"], "cwd": cwd})
        assert (status, body["error"]["code"]) == (422, "launch_failed"), cwd
        assert body["error"]["details"] == {"stage": "chdir", "errno": errno}, cwd
    assert alice.names() == []
    host.run(["ln", "-sfn", ALICE.home, f"{ALICE.home}/home"], user=ALICE, check=True)
    alice.create("web", command=["pwd", "-P"], cwd=f"{ALICE.home}/home")
    assert _ended(daemon, "web").strip() == ALICE.home
    host.run(["chmod", "750", BOB.home], user=BOB, check=True)


_CROOKED = ["..", ".", "../x", "a/../b", "/etc/passwd", "a/b", "x\0y", "-", "-rf", "a b", "a\nb", "%2e%2e", "web.bob",
            "ünïcode", "\u0430lice", "\uff57\uff45\uff42", "\ufb01", "web\u202e", "\uff11", "a" * 64, "WEB", ".netnsd",
            "~root", "$(id)", "`id`", "*", "web;id", "\0", "con\\x00"]


# Asks what it reads from stdin as JSON, over one connection; prints statuses and bodies.
_ASKER = """
import http.client, json, socket, sys
connection = http.client.HTTPConnection("localhost")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
answers = []
for method, path, body in json.load(sys.stdin):
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    answers.append([answer.status, json.loads(answer.read())])
json.dump(answers, sys.stdout)
"""


def test_nothing_that_a_client_calls_something_becomes_another_path(daemon: Daemon) -> None:
    alice = Api(daemon, ALICE)
    alice.create("web")
    requests: list[tuple[str, str, Any]] = []
    for name in _CROOKED:
        requests += [
            ("POST", "/v1/environments", {**FIELDS, "name": name}),
            ("POST", "/v1/environments", {"name": "x", "services": [{"name": name, "command": ["true"]}]}),
            ("POST", "/v1/environments", {"name": "x", "template": name}),
            ("POST", "/v1/templates", {"name": name, "specification": {}}),
            ("POST", "/v1/environments", {"name": "x", "labels": {name + "/../": "x"}}),
            ("POST", "/v1/environments", {**FIELDS, "name": "x", "limits": {name: 1}}),
            ("GET", f"/v1/environments/web/logs?service={_quoted(name)}", None),
            *((method, f"/v1/environments/{_quoted(name)}", None) for method in ("GET", "DELETE")),
            ("POST", f"/v1/environments/{_quoted(name)}/stop", {}),
            ("DELETE", f"/v1/templates/{_quoted(name)}", None),
        ]
    # What only the daemon says of an environment: who sends it is refused.
    requests += [("POST", "/v1/environments", {**FIELDS, "name": "x", key: value}) for key, value in (
        ("id", "0" * 32), ("uid", 0), ("user", "root"), ("owner", {"uid": 0}), ("slot", 3), ("netns", "../x"),
        ("pid", 1), ("stock", "t"), ("request", "r"), ("groups", [0]), ("state", "ready"), ("created_at", ""),
        ("address", "10.203.0.9"))]
    with nothing_left(daemon.host):
        answers = json.loads(daemon.host.run([PYTHON, "-c", _ASKER, daemon.socket], user=ALICE, check=True,
                                             stdin=json.dumps(requests)).stdout)
        for (method, path, body), (status, answer) in zip(requests, answers, strict=True):
            assert 400 <= status < 500, (method, path, body, answer)
            assert answer["error"]["code"] in ("invalid_name", "invalid_request", "invalid_label", "invalid_command",
                                               "not_found", "no_route", "bad_request", "method_not_allowed",
                                               "bad_json"), (method, path, body, answer)
    assert alice.names() == ["web"]


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def test_a_log_that_its_user_gave_a_second_name_is_empty_and_closed_to_him_when_its_environment_is_gone(
        daemon: Daemon) -> None:
    host = daemon.host
    web = daemon.create_json("web", "echo", "hush", user=ALICE)
    assert _ended(daemon, "web") == "hush\n"
    log = f"{daemon.state_dir}/logs/{web['id']}/main.log"
    kept = f"{ALICE.home}/kept"
    host.run(["chmod", "711", f"{daemon.base}"], check=True)
    linked = host.run(["ln", log, kept], user=ALICE)
    assert linked.returncode == 0, "without that this shows nothing: " + linked.stderr
    directory = os.path.dirname(log)
    for attack in (["ln", "-s", "/etc/passwd", f"{directory}/other.log"], ["mv", log, f"{directory}/x"],
                   ["rm", "-f", log], ["mkdir", f"{directory}/d"], ["touch", f"{os.path.dirname(directory)}/x"]):
        assert "Permission denied" in host.run(attack, user=ALICE).stderr
    daemon.ctl("rm", "web", user=ALICE, check=True)
    status = os.stat(host.path(kept))
    assert (status.st_uid, status.st_nlink, status.st_size, status.st_mode & 0o7777) == (0, 1, 0, 0o600)
    for user in (ALICE, BOB):
        assert host.run(["sh", "-c", f"echo more >> {kept}"], user=user, cwd="/").returncode != 0
    host.path(kept).unlink()


# -- what is large ----------------------------------------------------------------------------------------------------


def test_giant_arguments_and_variables_are_failed_launches_and_cost_nobody_anything(daemon: Daemon) -> None:
    launchers = daemon.launcher_pids()
    alice = Api(daemon, ALICE)
    for fields in ({"command": ["true", "x" * 200_000]}, {"command": ["true"], "env": {"A": "x" * 200_000}},
                   {"command": ["true", *["x"] * 100_000], "limits": {"stack": 65536}}):
        status, body = alice.ask("POST", "/v1/environments", {**FIELDS, "name": "web", **fields})
        assert (status, body["error"]["code"]) == (422, "launch_failed")
        assert body["error"]["details"] == {"stage": "exec", "errno": "E2BIG"}
    alice.create("web", command=["sh", "-c", "echo $#", "sh", *["x"] * 50_000])
    assert _ended(daemon, "web").strip() == "50000"
    assert daemon.launcher_pids() == launchers


# -- rights that go -----------------------------------------------------------------------------------------------


def _groups_file(host: HostNamespace, old: str, new: str) -> None:
    """Change /etc/group in place: it is mounted."""
    path = host.path("/run/harness/group")
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("how", ["restart", "policy"])
def test_a_group_that_a_user_has_lost_is_not_had_by_what_is_started_again(daemon: Daemon, how: str) -> None:
    host = daemon.host
    script = "id -G; [ -e once ] || { touch once; exit 1; }; exec sleep 1000"
    host.path(f"{ALICE.home}/once").unlink(missing_ok=True)
    member = f"netnsdtest:x:61010:{ALICE.name}\n"
    assert member in host.path("/run/harness/group").read_text()
    if how == "restart":
        host.write(f"{ALICE.home}/once", "", user=ALICE)
        daemon.create_json("web", "sh", "-c", script, user=ALICE)
    else:
        # Taken away between the server's end and its next start.
        script = "id -G; [ -e go ] || { until [ -e go ]; do sleep 0.02; done; exit 1; }; exec sleep 1000"
        host.path(f"{ALICE.home}/go").unlink(missing_ok=True)
        daemon.create_json("web", "sh", "-c", script, user=ALICE, options=("--restart", "always"))
    wait_until(lambda: _said(daemon, "web"), what="its groups")
    _groups_file(host, member, member.replace(ALICE.name, ""))
    try:
        if how == "restart":
            daemon.ctl("restart", "web", "--grace", "0", user=ALICE, check=True)
        else:
            host.write(f"{ALICE.home}/go", "", user=ALICE)
        wait_until(lambda: len(_said(daemon, "web").splitlines()) == 2, seconds=10, what="the second start")
    finally:
        _groups_file(host, member.replace(ALICE.name, ""), member)
    first, second = (set(line.split()) for line in _said(daemon, "web").splitlines())
    assert first == {"61001", "61010", "61020"}
    assert second == {"61001", "61020"}


# -- the API from inside ------------------------------------------------------------------------------------------


def test_from_inside_an_environment_the_api_is_what_it_is_to_its_user_outside(daemon: Daemon) -> None:
    daemon.create_json("other", user=BOB)
    daemon.create_json("web", user=ALICE)
    env = ("--env", f"NETNSD_SOCKET={daemon.socket}")
    ctl = program("netnsctl")
    assert inside(daemon, "web", ctl, "ls", "--all", "-q", user=ALICE, flags=env) == "web"
    for verb in (("rm", "other"), ("exec", "other.bob", "--", "id")):
        done = daemon.ctl("exec", "web", *env, "--", ctl, *verb, user=ALICE)
        assert "no environment" in done.stderr
    assert daemon.ctl("ls", user=MALLORY).returncode == 7, "who is not in the group may not connect"
    # The launcher is spoken to by the daemon alone, whoever asks.
    launcher = f"{daemon.runtime_dir}/launcher.sock"
    knock = f"import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect({launcher!r})"
    for user in (ALICE, CAROL, MALLORY):
        assert "Permission denied" in daemon.host.run([PYTHON, "-c", knock], user=user).stderr
    environments: list[Environment] = daemon.ctl_json("ls", user=BOB)
    assert [e["name"] for e in environments] == ["other"]
