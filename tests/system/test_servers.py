"""Real servers, each at its default port and default bind address, in two users' environments at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.harness import ALICE, BOB, Daemon, HostNamespace, User, cgroups, wait_until
from tests.harness.host import tool
from tests.system.clients import PYTHON, Environment, ask, echo_server, is_gone, main_of, nothing_left, published

USERS = (ALICE, BOB)
_INITDB = ["initdb", "--no-sync", "--auth=trust"]


def _http_page(host: HostNamespace, user: User) -> list[str]:
    host.directory(f"{user.home}/www", user=user)
    host.write(f"{user.home}/www/index.html", f"page of {user}", user=user)
    return [PYTHON, "-m", "http.server", "--directory", f"{user.home}/www"]


def _node(host: HostNamespace, user: User) -> list[str]:
    program = "require('http').createServer((q, a) => a.end(`page of ${process.env.USER}`)).listen(3000, 'localhost')"
    return [tool("node"), "-e", program]


def _bare_redis(_host: HostNamespace, _user: User) -> list[str]:
    # It listens on all addresses, and lets in nobody but 127.0.0.1.
    return [tool("redis-server")]


def _redis(host: HostNamespace, user: User) -> list[str]:
    # As packages configure it.
    return [tool("redis-server"), host.write(f"{user.home}/redis.conf", "bind 127.0.0.1 -::1\n", user=user)]


def _postgres(host: HostNamespace, user: User) -> list[str]:
    data = f"{user.home}/data"
    host.run([*_INITDB, "-D", data], user=user, check=True)
    return ["postgres", "-D", data, "-k", data]


def _nginx(host: HostNamespace, user: User) -> list[str]:
    home = f"{user.home}/nginx"
    if not host.path(home).exists():
        host.directory(home, user=user)
    host.write(f"{home}/index.html", f"page of {user}", user=user)
    temporary = "".join(f"{kind}_temp_path {home}/{kind};\n"
                        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    host.write(f"{home}/nginx.conf", f"worker_processes 2;\npid {home}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n"
               f"{temporary}server {{ listen 80; root {home}; }}\n}}\n", user=user)
    return [tool("nginx"), "-e", f"{home}/errors", "-c", f"{home}/nginx.conf"]


def _get(host: HostNamespace, user: User, address: str, port: int) -> str:
    return host.get(f"http://{address}:{port}/", user=user)[1]


def _redis_says(host: HostNamespace, user: User, address: str, port: int) -> str:
    command = [tool("redis-cli"), "-h", address, "-p", str(port)]
    set_done = host.run([*command, "SETNX", "who", f"page of {user}"], user=user).stdout
    return host.run([*command, "GET", "who"], user=user).stdout.strip() if set_done.strip() in ("0", "1") else set_done


def _query(host: HostNamespace, user: User, address: str, port: int) -> str:
    done = host.run([tool("psql"), "-h", address, "-p", str(port), "-d", "postgres", "-Atc",
                     "select 'page of ' || current_user"], user=user)
    return (done.stdout + done.stderr).strip()


@dataclass(frozen=True)
class Server:
    """``prepare`` makes its files and returns its command; ``fetch`` asks it, and should hear ``page of USER``."""

    port: int
    prepare: Callable[[HostNamespace, User], list[str]]
    fetch: Callable[[HostNamespace, User, str, int], str]
    binds: str


SERVERS = {
    "http.server": Server(8000, _http_page, _get, "0.0.0.0"),
    "node": Server(3000, _node, _get, "127.0.0.1"),
    "redis": Server(6379, _redis, _redis_says, "127.0.0.1"),
    "redis-without-file": Server(6379, _bare_redis, _redis_says, "0.0.0.0"),
    "postgres": Server(5432, _postgres, _query, "127.0.0.1"),
    "nginx": Server(80, _nginx, _get, "0.0.0.0"),
}


def _served(daemon: Daemon, server: Server) -> list[tuple[User, Environment]]:
    """Each user's environment ``web`` with the server, made at the same time."""
    def create(user: User) -> Environment:
        command = server.prepare(daemon.host, user)
        return daemon.create_json("web", *command, user=user, ports=[server.port], wait=True)

    with ThreadPoolExecutor(len(USERS)) as pool:
        return list(zip(USERS, pool.map(create, USERS), strict=True))


def _remove(daemon: Daemon) -> None:
    for user in USERS:
        daemon.ctl("rm", "web", user=user, check=True)


@pytest.mark.parametrize("name", SERVERS)
def test_two_users_servers_at_one_default_port_are_both_reachable_by_port_and_by_address(
        tidy_daemon: Daemon, name: str) -> None:
    server, host = SERVERS[name], tidy_daemon.host
    with nothing_left(host):
        environments = _served(tidy_daemon, server)
        for user, environment in environments:
            listens = host.run(["ip", "netns", "exec", os.path.basename(environment["netns"]), "ss", "-Hltn"]).stdout
            assert f"{server.binds}:{server.port} " in listens
            for address, port in (("127.0.0.1", published(environment)), ("localhost", published(environment)),
                                  (environment["address"], server.port)):
                assert server.fetch(host, user, address, port) == f"page of {user}", (address, port)
        _remove(tidy_daemon)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_udp_server_at_53_is_reachable_by_port_and_by_address(tidy_daemon: Daemon, address: str) -> None:
    host = tidy_daemon.host
    with nothing_left(host):
        for user in USERS:
            environment = tidy_daemon.create_json("web", *echo_server(str(user), 53, address), user=user,
                                                    ports=["53/udp"], wait=True)
            assert [(p["port"], p["protocol"]) for p in environment["ports"]] == [(53, "udp")]
            assert ask(host, "udp", "127.0.0.1", published(environment), user=user) == f"{user} heard hello"
            assert ask(host, "udp", environment["address"], 53, user=user) == f"{user} heard hello"
        _remove(tidy_daemon)


def test_servers_on_loopback_or_all_addresses_hear_local_peers_and_others_the_host(tidy_daemon: Daemon) -> None:
    """Databases let only 127.0.0.1 in by default, so who comes by way of loopback must look as if from there."""
    code = ("import socket, sys, threading\n"
            "def serve(at):\n"
            "    server = socket.create_server(at)\n"
            "    while True:\n"
            "        connection, peer = server.accept()\n"
            "        connection.sendall(peer[0].encode()); connection.close()\n"
            "threading.Thread(target=serve, args=(('127.0.0.1', 1001),)).start()\n"
            "threading.Thread(target=serve, args=(('0.0.0.0', 1002),)).start()\n"
            "import os; serve((os.environ['NETNSD_IP'], 1003))\n")
    environment = tidy_daemon.create_json("web", PYTHON, "-c", code, user=ALICE, ports=[1001, 1002, 1003], wait=True)
    host, address = tidy_daemon.host, environment["address"]
    heard = {port: {ask(host, "tcp", "127.0.0.1", published(environment, port), user=ALICE),
                    ask(host, "tcp", address, port, user=ALICE)} for port in (1001, 1002, 1003)}
    assert heard[1001] == heard[1002] == {"127.0.0.1"}
    assert not any(peer.startswith("127.") for peer in heard[1003])
    tidy_daemon.ctl("rm", "web", user=ALICE, check=True)


def test_nginx_that_daemonised_itself_is_running_and_ends_with_rm(tidy_daemon: Daemon) -> None:
    host = tidy_daemon.host
    command = _nginx(host, ALICE)
    with nothing_left(host):
        environment = tidy_daemon.create_json("web", *command, user=ALICE, ports=[80], wait=True)

        def adopted() -> bool:
            code: int | None = main_of(tidy_daemon.ctl_json("show", "web", user=ALICE))["exit_code"]
            return code == 0

        wait_until(adopted, what="the end of the first process")
        shown = tidy_daemon.ctl_json("show", "web", user=ALICE)
        service = main_of(shown)
        assert (shown["state"], service["state"]) == ("running", "running")
        group = next(path for path in _groups(host) if path.endswith("/s-main"))
        pids = cgroups.members(group)
        assert len(pids) == 3, "a master and two workers"
        assert service["pid"] in pids
        assert _get(host, ALICE, "127.0.0.1", published(environment)) == "page of alice"
        tidy_daemon.ctl("rm", "web", user=ALICE, check=True)
        assert all(is_gone(pid) for pid in pids)


def test_create_wait_fails_with_the_servers_own_end_when_it_ends_first(tidy_daemon: Daemon) -> None:
    done = tidy_daemon.ctl("create", "web", "--port", "3000", "--wait", "--", "sh", "-c", "echo no; exit 3",
                             user=ALICE)
    assert done.returncode == 5
    assert re.search(r"exit code 3", done.stderr)
    assert tidy_daemon.ctl("logs", "web", user=ALICE, check=True).stdout == "no\n"
    tidy_daemon.ctl("rm", "web", user=ALICE, check=True)


def test_create_wait_times_out_and_names_the_silent_port(tidy_daemon: Daemon) -> None:
    done = tidy_daemon.ctl("create", "web", "--port", "3000", "--wait", "--timeout", "0.3", "--", "sleep", "60",
                             user=ALICE)
    assert done.returncode == 6
    assert "3000/tcp" in done.stderr
    tidy_daemon.ctl("rm", "web", user=ALICE, check=True)


def _groups(host: HostNamespace) -> list[str]:
    return [directory for directory, _, _ in os.walk(host.daemon_cgroup)]
