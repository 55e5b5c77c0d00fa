"""Slots made before demand: unseen until claimed, as good as any then, and gone with the daemon, however it ends."""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness import ALICE, BOB, CAROL, ROOT, Daemon, HostNamespace, Snapshot, User, settle, wait_until
from tests.system.api import Api, netns_names
from tests.system.clients import (
    PYTHON,
    Environment,
    ask,
    echo_server,
    inside,
    is_gone,
    main_of,
    nothing_left,
    published,
)

SIZE = 6
# An HTTP server on 127.0.0.1 alone.
HTTP = "from http.server import *; HTTPServer(('127.0.0.1', 3000), SimpleHTTPRequestHandler).serve_forever()"
# The command's own NETNSD_URL, called from inside.
ASK_SELF = """
import os, socket, urllib.parse
url = urllib.parse.urlsplit(os.environ["NETNSD_URL"])
connection = socket.create_connection((url.hostname, url.port), 3)
connection.send(b"me")
print(connection.recv(99).decode())
"""
# All that a process can see of how it was started.
LOOK_AROUND = """
ip -br -4 address; ip route; ip neighbour; cat /etc/hosts /etc/resolv.conf; hostname; ulimit -a; ulimit -aH; umask
cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range conf/eth0/route_localnet
cat /proc/sys/net/ipv6/conf/all/disable_ipv6; env | sort; id; ls /sys/class/net /proc/self/fd
cut -d: -f3 /proc/self/cgroup; cut -d" " -f5- /proc/self/mountinfo | sed "s/ [a-z]*:[0-9]*//g"
grep -E "^(Cap|NoNewPrivs|Groups|Sig[IBC]|Umask|Seccomp|Uid|Gid|Cpus_allowed:)" /proc/self/status
cat /proc/self/oom_score_adj /proc/self/coredump_filter /proc/self/timerslack_ns; cut -d" " -f19 /proc/self/stat
ps -o nice= -o sid= -p $$ | sed "s/ $$//"; readlink /proc/self/cwd /proc/self/root; echo the end
"""
# Creates from a full pool as fast as one client can.
CREATE_ON = """
import http.client, json, socket, sys
connection = http.client.HTTPConnection("localhost")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
for number in range(1000):
    body = {"name": f"k{number}", "command": ["sleep", "1000"], "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/"}
    connection.request("POST", "/v1/environments", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().read()
"""


@pytest.fixture
def daemon(host: HostNamespace) -> Iterator[Daemon]:
    """One with a full pool."""
    with Daemon(host, config={"pool": {"size": SIZE}}) as started:
        Api(started).filled(size=SIZE)
        yield started


def links(daemon: Daemon) -> list[str]:
    """The host's ends of environments' and slots' links."""
    shown = json.loads(daemon.host.run(["ip", "-j", "link"], check=True).stdout)
    return [link["ifname"] for link in shown if re.fullmatch(r"nd\d+", link["ifname"])]


def restart_without_pool(daemon: Daemon) -> None:
    """Start it after its end; it makes no slots now."""
    daemon.configure({"pool": {"size": 0}})
    daemon.start()


def claimed(daemon: Daemon, user: User, name: str, *command: str, **options: object) -> Environment:
    """Create from a full pool, and see that the pool was used."""
    before = Api(daemon).filled()["claimed"]
    environment = daemon.create_json(name, *command, user=user, **options)  # type: ignore[arg-type]
    assert Api(daemon).pool()["claimed"] == before + 1
    return environment


def test_a_full_pool_has_links_and_no_names(daemon: Daemon) -> None:
    assert len(links(daemon)) == SIZE
    assert netns_names(daemon) == []
    assert daemon.ctl_json("ls", "--all") == []
    info = Api(daemon, ALICE).good("GET", "/v1/info")
    assert (info["pool_size"], info["pool_ready"], info["environments"]) == (SIZE, SIZE, 0)


def test_a_claimed_environment_is_reached_by_its_owner_only_and_by_itself(daemon: Daemon) -> None:
    host = daemon.host
    for user, other in ((ALICE, BOB), (BOB, ALICE)):
        web = claimed(daemon, user, "web", *echo_server(str(user), 3000), ports=[3000], wait=True)
        for kind in ("tcp", "udp"):
            answer = f"{user} heard hello"
            assert ask(host, kind, web["address"], 3000, user=user) == answer
            assert ask(host, kind, web["address"], 3000, user=other) in ("ECONNREFUSED", "EPERM")
            if kind == "tcp":
                assert ask(host, kind, "127.0.0.1", published(web), user=user) == answer
                assert ask(host, kind, "127.0.0.1", published(web), user=other) == "ECONNREFUSED"
        assert inside(daemon, "web", PYTHON, "-c", ASK_SELF, user=user) == f"{user} heard me"
    assert netns_names(daemon) == ["web", "web.bob"]
    filled = Api(daemon).filled()
    assert (filled["claimed"], filled["missed"]) == (2, 0)


def test_an_http_server_on_loopback_in_a_claimed_environment_answers(daemon: Daemon) -> None:
    web = claimed(daemon, ALICE, "web", PYTHON, "-c", HTTP, ports=[3000], wait=True)
    for address in (f"http://localhost:{published(web)}/", f"http://{web['address']}:3000/"):
        assert daemon.host.get(address, user=ALICE)[0] == 200
        assert daemon.host.get(address, user=BOB)[0] == 0


def test_inside_a_claimed_environment_all_is_as_in_one_that_was_made_for_its_owner(daemon: Daemon) -> None:
    """For its server, which is started in another way there, and for a command that its owner runs."""
    def seen(environment: Environment) -> list[str]:
        name = environment["name"]
        log = wait_until(lambda: text if "the end" in (text := daemon.ctl("logs", name, user=ALICE).stdout) else "",
                         what="the server's look around")
        text = log + "AND THE COMMAND\n" + inside(daemon, name, "sh", "-c", LOOK_AROUND, user=ALICE)
        slot = re.search(r"/(nd\d+)/", text)
        assert slot is not None
        for own, common in ((environment["address"], "ADDRESS"), (environment["id"], "ID"), (name, "NAME"),
                            (slot[1], "SLOT"), (f":{published(environment)}/", ":PUBLISHED/")):
            text = text.replace(own, common)
        return re.sub(r"eth0@\S+|lladdr \S+", "", text).splitlines()

    look = ["sh", "-c", LOOK_AROUND + "; exec sleep 1000"]
    warm = seen(claimed(daemon, ALICE, "warm", *look, ports=[3000]))
    Api(daemon).resized(0)
    cold = seen(daemon.create_json("cold", *look, user=ALICE, ports=[3000]))
    assert list(difflib.unified_diff(cold, warm, n=0)) == []
    assert len(warm) > 150


def test_environments_without_a_server_are_claimed_too_and_used_later(daemon: Daemon) -> None:
    web = claimed(daemon, ALICE, "web", ports=[3000])
    assert inside(daemon, "web", "sh", "-c", "ping -c1 -W2 127.0.0.1 >/dev/null && echo pings", user=ALICE) == "pings"
    with_server = daemon.host.popen(["nsenter", f"--net=/run/netns/{'web'}", *echo_server("root", 3000)])
    wait_until(lambda: ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "root heard hello",
               what="the server")
    assert with_server.poll() is None
    daemon.ctl("rm", "web", user=ALICE, check=True)
    assert netns_names(daemon) == []


def test_claimed_environments_are_removed_whole_and_their_slots_never_come_back(daemon: Daemon) -> None:
    api = Api(daemon, ALICE)
    before = set(links(daemon))
    claims = []
    for number in range(2 * SIZE):
        api.filled()
        web = api.create(f"e{number}")
        claims.append(web["address"])
        api.good("DELETE", f"/v1/environments/e{number}")
        assert is_gone(main_of(web)["pid"])
    assert len(set(claims)) == 2 * SIZE
    assert not before & set(links(daemon))
    assert netns_names(daemon) == []
    with_pool = len(links(daemon))
    assert with_pool <= 64
    assert api.pool()["claimed"] == 2 * SIZE


def test_stopping_leaves_nothing_of_a_pool(host: HostNamespace) -> None:
    host.run(["sh", "-ec", "ip netns add x; ip netns delete x"], check=True)  # the mount on /run/netns stays
    before = Snapshot.of_host(host)
    with Daemon(host, config={"pool": {"size": SIZE}}) as daemon:
        Api(daemon).filled(size=SIZE)
        daemon.create_json("web", "sleep", "1000", user=ALICE)
        daemon.ctl("rm", "web", user=ALICE, check=True)
        assert daemon.stop() == 0
        left = settle(before, lambda: Snapshot.of_host(host), only_new=True)
        assert [line for line in left if not line.startswith("files:") or "/run/test/" not in line] == []


def test_stopping_with_an_environment_removes_the_pool_and_not_the_environment(daemon: Daemon) -> None:
    web = claimed(daemon, ALICE, "web", *echo_server("alice", 3000), ports=[3000], wait=True)
    Api(daemon).filled()
    assert daemon.stop() == 0
    assert len(links(daemon)) == 1
    assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"
    daemon.start()
    Api(daemon).filled(size=SIZE)
    assert daemon.ctl_json("show", "web", user=ALICE) == web
    assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"


def test_a_daemon_killed_with_a_full_pool_leaves_no_orphan_to_the_next(daemon: Daemon) -> None:
    api = Api(daemon)
    api.resized(0)
    web = daemon.create_json("web", *echo_server("alice", 3000), user=ALICE, ports=[3000], wait=True)
    with nothing_left(daemon.host):
        api.resized(SIZE)
        daemon.kill()
        assert len(links(daemon)) == SIZE + 1
        restart_without_pool(daemon)
        assert links(daemon) != []
        wait_until(lambda: len(links(daemon)) == 1, what="the end of the old pool")
        assert daemon.ctl_json("show", "web", user=ALICE) == web
        assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"


def test_a_daemon_killed_in_the_middle_of_refills_and_claims_leaves_no_orphan(daemon: Daemon) -> None:
    api = Api(daemon, ALICE)
    Api(daemon).resized(0)
    web = daemon.create_json("web", *echo_server("alice", 3000), user=ALICE, ports=[3000], wait=True)
    with nothing_left(daemon.host, seconds=10):
        for number in range(5):
            Api(daemon).good("PATCH", "/v1/pools/slots", {"size": 60})
            client = daemon.host.popen([PYTHON, "-c", CREATE_ON, daemon.socket], user=ALICE, cwd="/")
            wait_until(lambda: "k2" in api.names(), what="the first creations")
            time.sleep(0.02 * number)  # another moment each time
            daemon.kill()
            client.wait(timeout=5)
            restart_without_pool(daemon)
            # Each is whole, or gone.
            for environment in api.good("GET", "/v1/environments")["environments"]:
                assert environment["state"] == "running"
                assert not is_gone(main_of(environment)["pid"])
            assert sorted(api.names()) == netns_names(daemon)
            assert len(links(daemon)) == len(api.names())
            assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"
            for name in set(api.names()) - {"web"}:
                api.good("DELETE", f"/v1/environments/{name}")


@pytest.mark.parametrize("how", ["link", "namespace"])
def test_a_slot_that_somebody_spoilt_costs_its_creator_nothing(daemon: Daemon, how: str) -> None:
    host = daemon.host
    first = links(daemon)
    for link in first:
        if how == "link":
            host.run(["ip", "link", "delete", link], check=True)
        else:
            host.run(["umount", f"{daemon.runtime_dir}/slots/{link[2:]}"], check=True)
    web = daemon.create_json("web", *echo_server("alice", 3000), user=ALICE, ports=[3000], wait=True)
    assert ask(host, "tcp", "127.0.0.1", published(web), user=ALICE) == "alice heard hello"
    assert daemon.ctl_json("ls", "--all") == [daemon.ctl_json("show", "web", user=ALICE)]
    if how == "link":
        assert daemon.log().count("slot_spoilt") == 1
    daemon.ctl("rm", "web", user=ALICE, check=True)
    assert netns_names(daemon) == []


def test_an_admin_resizes_the_pool_and_nobody_else_does(daemon: Daemon) -> None:
    for user in (ALICE, BOB):
        status, answer = Api(daemon, user).ask("PATCH", "/v1/pools/slots", {"size": 1})
        assert (status, answer["error"]["code"]) == (403, "forbidden")
    assert len(links(daemon)) == SIZE
    for user, size in ((ROOT, 9), (CAROL, 2), (ROOT, 0)):
        Api(daemon, user).resized(size)
        wait_until(lambda size=size: len(links(daemon)) == size, what=f"{size} links")  # type: ignore[misc]


def test_metrics_tell_what_the_pool_does(daemon: Daemon) -> None:
    claimed(daemon, ALICE, "web", "sleep", "1000")
    for user in (ALICE, ROOT):
        status, text = Api(daemon, user).text("GET", "/metrics")
        assert status == 200
        assert 'netnsd_pool_claimed_total{pool="slots"} 1.0' in text
        assert 'netnsd_environments{state="running"} 1.0' in text
        assert f'netnsd_pool_size{{pool="slots"}} {SIZE}.0' in text


# -- many at once ---------------------------------------------------------------------------------------------------


def test_twenty_at_once_are_made_from_the_pool_and_beside_it_and_removed_at_once(tidy_daemon: Daemon) -> None:
    api = Api(tidy_daemon, ALICE)
    with nothing_left(tidy_daemon.host, seconds=10):
        Api(tidy_daemon).resized(5)
        made = api.create("web", count=20, ports=[{"port": 3000}])["environments"]
        assert [e["name"] for e in made] == [f"web-{n}" for n in range(1, 21)]
        assert len({e["address"] for e in made}) == len({published(e) for e in made}) == 20
        assert not any(is_gone(main_of(e)["pid"]) for e in made)
        assert netns_names(tidy_daemon) == sorted(f"web-{n}" for n in range(1, 21))
        Api(tidy_daemon).resized(0)
        answer = api.good("DELETE", "/v1/environments?ref=web-3&ref=none&ref=web-1")
        assert answer["removed"] == ["web-3", "web-1"]
        assert [f["ref"] for f in answer["failed"]] == ["none"]
        assert all(is_gone(main_of(made[n])["pid"]) for n in (0, 2))
        answer = api.good("DELETE", "/v1/environments?everything=1")
        assert len(answer["removed"]) == 18
        assert all(is_gone(main_of(e)["pid"]) for e in made)
        assert (api.names(), netns_names(tidy_daemon), links(tidy_daemon)) == ([], [], [])


def test_where_one_of_many_cannot_be_made_none_is_left(tidy_daemon: Daemon) -> None:
    api = Api(tidy_daemon, ALICE)
    with nothing_left(tidy_daemon.host):
        api.create("web-7")
        status, answer = api.ask("POST", "/v1/environments", {"name": "web", "count": 9, "command": ["sleep", "9"],
                                                              "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/"})
        assert (status, answer["error"]["code"]) == (409, "name_taken")
        assert api.names() == ["web-7"]
        assert netns_names(tidy_daemon) == ["web-7"]
        api.good("DELETE", "/v1/environments/web-7")


@pytest.mark.parametrize("path", ["/v1/environments/web-1?wait=0", "/v1/environments?ref=web-1&ref=web-2&wait=0",
                                  "/v1/environments?everything=1&wait=0"])
def test_who_does_not_wait_for_a_removal_is_answered_before_it_is_done(tidy_daemon: Daemon, path: str) -> None:
    api = Api(tidy_daemon, ALICE)
    with nothing_left(tidy_daemon.host):
        made = api.create("web", count=8)["environments"]
        status, _answer = api.ask("DELETE", path)
        assert status == 202
        count = {"/v1/environments/web-1?wait=0": 1, "/v1/environments?everything=1&wait=0": 8}.get(path, 2)
        wait_until(lambda: len(api.names()) == 8 - count, what="the removal")
        assert all(is_gone(main_of(e)["pid"]) for e in made[:count])
        api.good("DELETE", "/v1/environments?everything=1")


def test_what_nobody_waited_for_is_removed_though_the_daemon_is_killed(
    make_daemon: Callable[..., Daemon]
) -> None:
    daemon = make_daemon(config={"pool": {"size": 3}})
    api = Api(daemon, ALICE)
    made = api.create("web", count=10)["environments"]
    assert api.ask("DELETE", "/v1/environments?everything=1&wait=0")[0] == 202
    daemon.kill()
    daemon.start()
    wait_until(lambda: api.names() == [], what="the removal")
    assert all(is_gone(main_of(e)["pid"]) for e in made)
    assert netns_names(daemon) == []
    Api(daemon).filled(size=3)
    assert len(links(daemon)) == 3
