"""Many clients at once: each gets its own, none is refused for the others' sake, and all of it goes again."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.harness import ALICE, BOB, Daemon, Snapshot, User
from tests.system.clients import PYTHON, Environment, ask, echo_server, nothing_left, published

# One user's clients: a thread and a connection each, which all send their request at the same moment.
_CLIENTS = """
import http.client, json, socket, sys, threading
path, requests = sys.argv[1], json.load(sys.stdin)
answers, together = [None] * len(requests), threading.Barrier(len(requests))
class Connection(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(path)
def client(number, method, target, body):
    connection = Connection("localhost")
    connection.connect()
    together.wait(30)
    connection.request(method, target, json.dumps(body), {"Content-Type": "application/json"} if body else {})
    answer = connection.getresponse()
    answers[number] = answer.status, json.loads(answer.read())
threads = [threading.Thread(target=client, args=(n, *request)) for n, request in enumerate(requests)]
for thread in threads: thread.start()
for thread in threads: thread.join()
json.dump(answers, sys.stdout)
"""
Request = tuple[str, str, dict[str, Any] | None]
Answer = tuple[int, dict[str, Any]]


def _at_once(daemon: Daemon, requests: dict[User, list[Request]]) -> dict[User, list[Answer]]:
    """Send all requests of all users at once; their answers in the same order."""
    def send(user: User) -> list[Answer]:
        done = daemon.host.run([PYTHON, "-c", _CLIENTS, daemon.socket], user=user, check=True, timeout=40,
                               stdin=json.dumps(requests[user]))
        return [(status, body) for status, body in json.loads(done.stdout)]

    with ThreadPoolExecutor(len(requests)) as pool:
        return dict(zip(requests, pool.map(send, requests), strict=True))


def _creation(name: str, **fields: Any) -> Request:
    return "POST", "/v1/environments", {"name": name, "command": ["sleep", "1000"], "ports": [{"port": 3000}],
                                        "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/", **fields}


def _are_apart(environments: list[Environment]) -> bool:
    """Whether nothing that must be one environment's own is shared."""
    keys = [("id", e["id"]) for e in environments] + [("address", e["address"]) for e in environments]
    keys += [("netns", e["netns"]) for e in environments] + [("pid", e["services"][0]["pid"]) for e in environments]
    keys += [("port", p["published"]) for e in environments for p in e["ports"]]
    return not [key for key, times in Counter(keys).items() if times > 1]


def test_fifty_clients_create_at_once_and_remove_at_once(tidy_daemon: Daemon) -> None:
    with nothing_left(tidy_daemon.host, seconds=10):
        # The same names for both users.
        made = _at_once(tidy_daemon, {user: [_creation(f"e{n}") for n in range(25)] for user in (ALICE, BOB)})
        answers = [answer for user in made for answer in made[user]]
        assert [status for status, _ in answers] == [201] * 50, [body for status, body in answers if status != 201]
        environments = [environment for _, environment in answers]
        assert all(environment["state"] == "running" for environment in environments)
        assert _are_apart(environments)
        names = {e["netns"] for e in environments}
        assert len({name for name in names if name.endswith((".alice", ".bob"))}) == 25, "the later one of each name"
        elements = Snapshot.of_host(tidy_daemon.host).elements
        assert len([element for element in elements if " published " in element]) == 50
        gone = _at_once(tidy_daemon, {user: [("DELETE", f"/v1/environments/{e['id']}", None) for _, e in made[user]]
                                      for user in made})
        assert [answer for user in gone for answer in gone[user]] == [(200, {})] * 50
        assert tidy_daemon.ctl_json("ls", "--all") == []


def test_twelve_netnsctl_processes_create_servers_at_once_that_their_users_reach(tidy_daemon: Daemon) -> None:
    wanted = [(user, f"{user}{n}") for user in (ALICE, BOB) for n in range(6)]

    def create(who: tuple[User, str]) -> Environment:
        user, name = who
        return tidy_daemon.create_json(name, *echo_server(name, 3000), user=user, ports=[3000], wait=True)

    with nothing_left(tidy_daemon.host):
        with ThreadPoolExecutor(len(wanted)) as pool:
            environments = list(pool.map(create, wanted))
        assert _are_apart(environments)
        for (user, name), environment in zip(wanted, environments, strict=True):
            assert ask(tidy_daemon.host, "tcp", "127.0.0.1", published(environment), user=user) == f"{name} heard hello"
        for user in (ALICE, BOB):
            tidy_daemon.ctl("rm", "--all", "--yes", user=user, check=True)


def test_of_clients_that_want_one_name_or_one_port_number_exactly_one_gets_it(tidy_daemon: Daemon) -> None:
    with nothing_left(tidy_daemon.host):
        port = [{"port": 3000, "publish": 20777}]
        made = _at_once(tidy_daemon, {ALICE: [_creation("web") for _ in range(20)],
                                      BOB: [_creation(f"e{n}", ports=port) for n in range(20)]})
        for user, code in ((ALICE, "name_taken"), (BOB, "port_taken")):
            told = Counter("made" if status == 201 else body["error"]["code"] for status, body in made[user])
            assert told == {"made": 1, code: 19}
            tidy_daemon.ctl("rm", "--all", "--yes", user=user, check=True)


def test_removals_while_creations_are_under_way_leave_nothing(tidy_daemon: Daemon) -> None:
    with nothing_left(tidy_daemon.host):
        for _ in range(3):
            answers = _at_once(tidy_daemon, {
                ALICE: [request for n in range(8) for request in (
                    _creation(f"e{n}"), ("DELETE", f"/v1/environments/e{n}", None),
                    _creation(f"e{n}", replace=True))]})[ALICE]
            assert {status for status, _ in answers} <= {200, 201, 404, 409}, answers
            tidy_daemon.ctl("rm", "--all", "--yes", user=ALICE, check=True)
