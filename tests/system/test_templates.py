"""Warm environments of templates: their servers run before anybody asks, and are the asker's own then."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import ALICE, BOB, CAROL, Daemon, HostNamespace, wait_until
from tests.system.api import Api, netns_names
from tests.system.clients import PYTHON, Environment, ask, inside, is_gone, main_of, nothing_left, published

# An HTTP server on 127.0.0.1 that takes a while to start, and says its pid and what it knows of itself.
SERVER = """
import http.server, json, os, time
time.sleep(0.3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"pid": os.getpid(), "secret": os.environ["SECRET"], "ip": os.environ["NETNSD_IP"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", 3000), Handler).serve_forever()
"""
SPECIFICATION = {"command": [PYTHON, "-c", SERVER], "ports": [{"port": 3000}], "labels": {"app": "shop"}, "cwd": "/",
                 "env": {"PATH": "/usr/bin:/bin", "SECRET": "hush"}}
WARM = 2


@pytest.fixture
def daemon(host: HostNamespace) -> Iterator[Daemon]:
    """One that made an environment before."""
    with Daemon(host) as started:
        started.create_json("first", "sleep", "1000", user=ALICE)
        started.ctl("rm", "first", user=ALICE, check=True)
        yield started


@pytest.fixture
def alice(daemon: Daemon) -> Api:
    return Api(daemon, ALICE)


def add(api: Api, *, warm: int = WARM, **fields: Any) -> Any:
    """Keep the template ``shop``, and wait until its stock is full."""
    answer = api.good("POST", "/v1/templates", {"name": "shop", "warm": warm, "specification": SPECIFICATION, **fields})
    if warm:
        full(api)
    return answer


def full(api: Api) -> Any:
    return api.filled("template/shop")


def servers(daemon: Daemon) -> set[int]:
    """The pids of the template's servers."""
    found = set()
    for pid in daemon.host.processes():
        try:
            with open(f"/proc/{pid}/cmdline", encoding="utf-8") as file:
                if file.read().split("\0")[:3] == [PYTHON, "-c", SERVER]:
                    found.add(pid)
        except OSError:
            continue
    return found


def fetched(daemon: Daemon, environment: Environment, *, user: Any = ALICE) -> Any:
    """What the server says of itself, or why not."""
    status, text = daemon.host.get(f"http://localhost:{published(environment)}/", user=user)
    return json.loads(text) if status == 200 else text


def test_who_asks_gets_a_server_that_runs_already_and_answers_at_once(daemon: Daemon, alice: Api) -> None:
    add(alice)
    before, hidden = servers(daemon), netns_names(daemon)
    assert len(before) == len(hidden) == WARM
    web = alice.create("web", template="shop", labels={"mine": "yes"})
    said = fetched(daemon, web)
    assert said == {"pid": said["pid"], "secret": "hush", "ip": web["address"]}
    assert {said["pid"], main_of(web)["pid"]} <= before
    assert said["pid"] == main_of(web)["pid"]
    assert web["labels"] == {"app": "shop", "mine": "yes"}
    assert web["netns"] == "/run/netns/web"
    assert "web" in netns_names(daemon)
    assert len(set(hidden) & set(netns_names(daemon))) == WARM - 1, "its old name is gone"
    assert ask(daemon.host, "tcp", "127.0.0.1", published(web), user=BOB) == "ECONNREFUSED"
    assert ask(daemon.host, "tcp", web["address"], 3000, user=BOB) == "ECONNREFUSED"
    assert alice.names() == ["web"]
    full(alice)
    assert len(servers(daemon)) == WARM + 1
    assert alice.pool("template/shop")["claimed"] == 1


def test_what_was_handed_over_is_used_as_any_other(daemon: Daemon, alice: Api) -> None:
    add(alice)
    web = alice.create("web", template="shop")
    assert inside(daemon, "web", "hostname", user=ALICE) == "web"
    assert inside(daemon, "web", "sh", "-c", "grep -w web /etc/hosts", user=ALICE) == f"{web['address']}\tweb"
    script = "import os, urllib.request as r; print(r.urlopen(os.environ['NETNSD_URL']).status)"
    assert inside(daemon, "web", PYTHON, "-c", script, user=ALICE) == "200"
    assert daemon.host.run(["ip", "netns", "exec", "web", "true"]).returncode == 0
    restarted = alice.good("POST", "/v1/environments/web/restart", {"grace_seconds": 1})
    assert main_of(restarted)["pid"] != main_of(web)["pid"]
    alice.good("GET", "/v1/environments/web/wait?for=ready&timeout=10")
    assert fetched(daemon, restarted)["pid"] == main_of(restarted)["pid"]
    with open(f"/proc/{main_of(restarted)['pid']}/environ", encoding="utf-8") as file:
        assert "NETNSD_NAME=web" in file.read().split("\0")
    alice.good("DELETE", "/v1/environments/web")
    assert is_gone(main_of(restarted)["pid"])
    assert "web" not in netns_names(daemon)


def test_stock_is_hidden_and_a_template_is_its_users_alone(daemon: Daemon, alice: Api) -> None:
    template = add(alice)
    names = netns_names(daemon)
    for api in (alice, Api(daemon, BOB), Api(daemon, CAROL), Api(daemon)):
        assert api.good("GET", "/v1/environments?all=1") == {"environments": []}
        for name in names:
            assert api.ask("GET", f"/v1/environments/{name}")[0] == 404
            assert api.ask("DELETE", f"/v1/environments/{name}")[0] == 404
    bob = Api(daemon, BOB)
    for ref in ("shop", template["id"]):
        assert bob.ask("GET", f"/v1/templates/{ref}")[0] == 404
        assert bob.ask("DELETE", f"/v1/templates/{ref}")[0] == 404
        assert bob.ask("POST", "/v1/environments", {"name": "web", "template": ref})[0] == 404
    assert "hush" not in json.dumps(alice.good("GET", "/v1/templates"))
    assert alice.good("DELETE", "/v1/environments?everything=1") == {"removed": [], "failed": []}
    assert len(servers(daemon)) == WARM
    for pid in servers(daemon):
        assert os.stat(f"/proc/{pid}").st_uid == ALICE.uid


def test_a_template_that_is_removed_or_replaced_takes_its_stock_along(daemon: Daemon, alice: Api) -> None:
    with nothing_left(daemon.host, seconds=10):
        add(alice)
        old = servers(daemon)
        add(alice, replace=True, warm=1)
        wait_until(lambda: not old & servers(daemon), what="the old stock's end")
        web = alice.create("web", template="shop")
        full(alice)
        alice.good("DELETE", "/v1/templates/shop")
        wait_until(lambda: servers(daemon) == {main_of(web)["pid"]}, what="the stock's end")
        assert fetched(daemon, web)["pid"] == main_of(web)["pid"]
        wait_until(lambda: netns_names(daemon) == ["web"], what="the stock's namespaces' end")
        alice.good("DELETE", "/v1/environments/web")


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_another_daemon_goes_on_with_the_stock(daemon: Daemon, alice: Api, end: str) -> None:
    add(alice)
    web = alice.create("web", template="shop")
    full(alice)
    before = servers(daemon)
    daemon.kill() if end == "kill" else daemon.stop()
    assert servers(daemon) == before
    daemon.start()
    assert full(alice)["ready"] == WARM
    assert servers(daemon) == before
    assert alice.good("GET", "/v1/environments/web") == web
    other = alice.create("other", template="shop")
    assert main_of(other)["pid"] in before
    assert fetched(daemon, other)["pid"] == main_of(other)["pid"]


def test_a_server_that_died_in_stock_is_not_handed_out(daemon: Daemon, alice: Api) -> None:
    add(alice)
    before = servers(daemon)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    web = alice.create("web", template="shop")
    alice.good("GET", "/v1/environments/web/wait?for=ready&timeout=10")
    assert fetched(daemon, web)["pid"] not in before
    full(alice)
    wait_until(lambda: len(servers(daemon)) == WARM + 1, what="another stock")


def test_a_server_that_died_while_the_daemon_was_down_is_not_handed_out(daemon: Daemon, alice: Api) -> None:
    add(alice)
    daemon.kill()
    before = servers(daemon)
    dead = min(before)
    os.kill(dead, signal.SIGKILL)
    wait_until(lambda: is_gone(dead), what="its end")
    daemon.start()
    web = alice.create("web", template="shop")
    assert main_of(web)["pid"] in before - {dead}
    assert fetched(daemon, web)["pid"] == main_of(web)["pid"]


def test_a_taken_name_leaves_the_stock(daemon: Daemon, alice: Api) -> None:
    add(alice)
    alice.create("web")
    before = servers(daemon)
    status, answer = alice.ask("POST", "/v1/environments", {"name": "web", "template": "shop"})
    assert (status, answer["error"]["code"]) == (409, "name_taken")
    assert alice.pool("template/shop")["ready"] == WARM
    assert servers(daemon) == before
    daemon.host.run(["ip", "netns", "add", "theirs"], check=True)
    assert alice.create("theirs", template="shop")["netns"] == "/run/netns/theirs.alice"
    assert "theirs" in netns_names(daemon)


def test_many_of_a_template_are_made_from_the_stock_and_beside_it(daemon: Daemon, alice: Api) -> None:
    with nothing_left(daemon.host, seconds=10):
        add(alice)
        stock = servers(daemon)
        made = alice.create("web", template="shop", count=4)["environments"]
        pids = {main_of(e)["pid"] for e in made}
        assert len(stock & pids) == WARM
        for environment in made:
            alice.good("GET", f"/v1/environments/{environment['name']}/wait?for=ready&timeout=10")
            assert fetched(daemon, environment)["pid"] == main_of(environment)["pid"]
        alice.good("DELETE", "/v1/templates/shop")
        alice.good("DELETE", "/v1/environments?everything=1")
        wait_until(lambda: servers(daemon) == set(), what="the stock's end")


def test_a_daemon_killed_while_it_hands_over_leaves_each_whole_or_gone(daemon: Daemon, alice: Api) -> None:
    with nothing_left(daemon.host, seconds=10):
        add(alice, warm=4)
        for number in range(4):
            answers: list[Any] = []

            def claim(number: int = number, answers: list[Any] = answers) -> None:
                for part in "abc":
                    try:
                        answers.append(alice.ask("POST", "/v1/environments", {"name": f"{part}{number}",
                                                                              "template": "shop"}))
                    except AssertionError:  # the daemon is gone
                        return

            clients = [threading.Thread(target=claim), threading.Thread(target=claim)]
            for client in clients:
                client.start()
            # Another moment each time.
            wait_until(lambda answers=answers, n=number: len(answers) > n, what="a claim")  # type: ignore[misc]
            daemon.kill()
            for client in clients:
                client.join()
            daemon.start()
            full(alice)
            found = alice.good("GET", "/v1/environments")["environments"]
            assert {answer["id"] for status, answer in answers if status == 201} <= {e["id"] for e in found}
            assert len(netns_names(daemon)) == len(found) + 4, "each has one name"
            assert {os.path.basename(e["netns"]) for e in found} <= set(netns_names(daemon))
            for environment in found:
                alice.good("GET", f"/v1/environments/{environment['id']}/wait?for=ready&timeout=10")
                assert fetched(daemon, environment)["pid"] == main_of(environment)["pid"]
            alice.good("DELETE", "/v1/environments?everything=1")
        alice.good("DELETE", "/v1/templates/shop")
        wait_until(lambda: servers(daemon) == set(), what="the stock's end")


def test_a_template_whose_server_cannot_start_says_why(daemon: Daemon, alice: Api) -> None:
    with nothing_left(daemon.host):
        for name, command in (("none", ["/no/such/server"]), ("ends", ["/bin/false"])):
            alice.good("POST", "/v1/templates", {"name": name, "warm": 1, "specification": {
                **SPECIFICATION, "command": command}})
            reason = wait_until(lambda name=name: alice.good(  # type: ignore[misc]
                "GET", f"/v1/templates/{name}")["reason"], what="the reason")
            assert ("/no/such/server" if name == "none" else "exit code 1") in reason
            assert alice.pool(f"template/{name}")["ready"] == 0
            assert "hush" not in reason
            alice.good("DELETE", f"/v1/templates/{name}")
        assert daemon.log().count('"template_stuck"') == 2
        assert alice.names() == []
