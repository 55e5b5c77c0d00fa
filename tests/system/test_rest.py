"""The API over TCP on a real host: existing scripts, real accounts, TLS from outside, and nothing from inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trustme

from tests.harness import ALICE, BOB, CAROL, ROOT, Daemon, HostNamespace, User
from tests.harness.host import Place
from tests.system.api import Api
from tests.system.clients import PYTHON, Conversation, asking, echo_server, inside, main_of, nothing_left, published

PORT = 7070
TLS = "/run/test/tls"
CLIENT = f"{sys.prefix}/bin/python"
# A script that is not ours, as it is: only its variables say where and who.
SCRIPT = """
import os
import requests
api_url, token = os.environ["API_URL"], os.environ["TOKEN"]
response = requests.post(f"{api_url}/environments/start", headers={"Authorization": f"Bearer {token}"},
                         json={"dev_id": "user123", "project": "new_feature"})
print(response.status_code)
print(response.text)
"""
PAIR = {"dev_id": "user123", "project": "new_feature"}


@pytest.fixture(scope="module")
def shared_host() -> Iterator[HostNamespace]:
    """A host with an uplink, in place of the one that has none."""
    with HostNamespace(uplink=True) as made:
        yield made


@pytest.fixture(scope="module")
def shared_daemon(shared_host: HostNamespace) -> Iterator[Daemon]:
    """A daemon that listens on every address, which is the most that can go wrong."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", HostNamespace.ADDRESS)
    shared_host.directory(TLS)
    shared_host.write(f"{TLS}/cert.pem", "".join(blob.bytes().decode() for blob in issued.cert_chain_pems))
    shared_host.write(f"{TLS}/key.pem", issued.private_key_pem.bytes().decode(), mode=0o600)
    shared_host.write(f"{TLS}/ca.pem", authority.cert_pem.bytes().decode())
    api = {"listen": f"0.0.0.0:{PORT}", "tls_certificate": f"{TLS}/cert.pem", "tls_key": f"{TLS}/key.pem"}
    made = Daemon(shared_host, config={"api": api})
    # A table in TOML, which the harness does not write.
    with open(shared_host.path(made.config_file), "a", encoding="utf-8") as file:
        file.write('[api.dev_users]\nuser123 = "bob"\n')
    with made:
        yield made


def token(daemon: Daemon, name: str, *options: str, user: User = ALICE) -> str:
    return str(daemon.ctl_json("token", "create", name, *options, user=user)["token"])


@pytest.fixture
def rest(tidy_daemon: Daemon) -> Iterator[Daemon]:
    """The module's daemon; tokens and templates go too."""
    yield tidy_daemon
    for each in tidy_daemon.ctl_json("token", "ls", "--all"):
        tidy_daemon.ctl("token", "revoke", each["id"])
    for user in (ALICE, BOB):
        for template in tidy_daemon.ctl_json("template", "ls", user=user):
            tidy_daemon.ctl("template", "rm", template["name"], user=user, check=True)


def run_script(place: Place, url: str, text: str, *, user: User = BOB) -> tuple[int, Any]:
    done = place.run([CLIENT, "-c", SCRIPT], user=user, cwd="/", check=True, env={
        "API_URL": url, "TOKEN": text, "REQUESTS_CA_BUNDLE": f"{TLS}/ca.pem"})
    status, _, body = done.stdout.partition("\n")
    return int(status), json.loads(body)


def ask(place: Place, text: str, method: str, path: str, body: Any = None, *,
        address: str = "127.0.0.1") -> tuple[int, Any]:
    """A request over TLS with a token."""
    done = place.run(["curl", "-sS", "--max-time", "10", "--cacert", f"{TLS}/ca.pem", "-X", method,
                      "-H", f"Authorization: Bearer {text}", "-w", "\n%{http_code}",
                      *([] if body is None else ["--data-binary", json.dumps(body)]),
                      f"https://{address}:{PORT}{path}"], cwd="/", check=True)
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(answer)


def ids_of(pid: int) -> tuple[list[str], list[str]]:
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
    return fields["Uid"].split(), fields["Groups"].split()


def keep_template(daemon: Daemon, user: User) -> None:
    """A template that the script's project names, as far as a DNS label can."""
    daemon.ctl("template", "add", "new-feature", "--port", "3000", "--cwd", "/", "--", *echo_server(user.name, 3000),
               user=user, check=True)


# -- existing scripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["the host", "outside"])
def test_a_script_as_it_is_starts_an_environment_of_its_tokens_owner(rest: Daemon, where: str) -> None:
    host = rest.host
    place, address = (host, "127.0.0.1") if where == "the host" else (host.outside, HostNamespace.ADDRESS)
    assert place is not None
    api_url = f"https://{address}:{PORT}/api"
    keep_template(rest, ALICE)
    text = token(rest, "script", "--scope", "write")
    with nothing_left(host):
        status, made = run_script(place, api_url, text)
        assert (status, made["state"], made["owner"]["user"]) == (200, "running", "alice")
        assert made["labels"] == PAIR
        uids, groups = ids_of(main_of(made)["pid"])
        assert uids == [str(ALICE.uid)] * 4
        assert {"61010", "61020"} <= set(groups)
        with Conversation(host, "127.0.0.1", published(made), user=ALICE) as hers:
            assert hers.say("hi") == "alice heard hi"
        assert run_script(place, api_url, text) == (200, made)
        assert ask(place, text, "GET", "/api/environments/status?dev_id=user123&project=new_feature",
                   address=address) == (200, made)
        assert ask(place, text, "POST", "/api/environments/terminate", PAIR, address=address) == (200, {})
    assert ask(place, text, "POST", "/api/environments/terminate", PAIR, address=address)[0] == 404


def test_scripts_at_once_make_one(rest: Daemon) -> None:
    text = token(rest, "many", "--scope", "write")
    started = [rest.host.popen([CLIENT, "-c", SCRIPT], user=BOB, cwd="/", stdout=subprocess.PIPE, env={
        "API_URL": f"https://127.0.0.1:{PORT}/api", "TOKEN": text, "REQUESTS_CA_BUNDLE": f"{TLS}/ca.pem"})
        for _ in range(6)]
    answers = [process.communicate(timeout=30)[0].decode().split("\n") for process in started]
    assert {answer[0] for answer in answers} == {"200"}
    assert len({json.loads(answer[1])["id"] for answer in answers}) == 1
    assert len(rest.ctl_json("ls", user=ALICE)) == 1


def test_an_admins_token_starts_it_as_the_developers_user(rest: Daemon) -> None:
    keep_template(rest, BOB)
    url = f"https://127.0.0.1:{PORT}/api"
    status, made = run_script(rest.host, url, token(rest, "ops", "--scope", "admin", user=CAROL))
    assert (status, made["owner"]["user"]) == (200, "bob")
    uids, _groups = ids_of(main_of(made)["pid"])
    assert uids == [str(BOB.uid)] * 4
    assert [e["id"] for e in rest.ctl_json("ls", user=BOB)] == [made["id"]]
    # With less than the admin's scope, it is the owner's own, as anybody's.
    status, own = run_script(rest.host, url, token(rest, "small", "--scope", "write", user=CAROL))
    assert (status, own["owner"]["user"]) == (200, "carol")


def test_the_three_routes_work_on_the_unix_socket_too(rest: Daemon) -> None:
    bob = Api(rest, BOB)
    made = bob.good("POST", "/api/environments/start", PAIR)
    assert bob.good("GET", "/api/environments/status") == {"environments": [made]}
    assert bob.good("GET", f"/api/environments/status?id={made['id']}") == made
    assert bob.good("POST", "/api/environments/terminate", {"id": made["id"]}) == {}
    assert bob.good("GET", "/api/environments/status") == {"environments": []}


# -- who may not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [ALICE, ROOT], ids=str)
def test_environments_do_not_reach_it_at_any_address(rest: Daemon, user: User) -> None:
    rest.create_json("web", "sleep", "1000", user=user)
    bridge = inside(rest, "web", "ip", "-4", "route", "show", "default", user=user).split()[2]
    assert bridge.startswith("10.203.")
    for address in ("127.0.0.1", bridge, HostNamespace.ADDRESS):
        # It is there: the host itself is answered (with a reset, as that is no TLS).
        heard = rest.host.run(asking("tcp", address, PORT), cwd="/", check=True).stdout.strip()
        assert heard not in ("ECONNREFUSED", "TIMEOUT"), address
        assert inside(rest, "web", *asking("tcp", address, PORT), user=user) == "ECONNREFUSED", address


def test_a_peer_of_the_supernet_is_closed_where_the_rules_let_it_pass(rest: Daemon) -> None:
    """The host's own processes may take a bridge's address for their own, and no rule holds root back."""
    rest.create_json("web", "sleep", "1000", user=ALICE)
    bridge = inside(rest, "web", "ip", "-4", "route", "show", "default", user=ALICE).split()[2]
    text = token(rest, "t")
    for interface, code in ((bridge, "closed"), (HostNamespace.ADDRESS, "200")):
        done = rest.host.run(
            ["curl", "-sS", "--max-time", "10", "--interface", interface, "--cacert", f"{TLS}/ca.pem", "-o",
             "/dev/null", "-H", f"Authorization: Bearer {text}", "-w", "%{http_code}",
             f"https://{HostNamespace.ADDRESS}:{PORT}/v1/health"], cwd="/")
        assert (done.stdout if done.returncode == 0 else "closed") == code, done.stderr


def test_an_account_that_goes_or_changes_takes_its_tokens_along(rest: Daemon) -> None:
    host = rest.host
    texts = {user: token(rest, "mine", "--scope", scope, user=user)
             for user, scope in ((BOB, "write"), (CAROL, "admin"))}
    assert ask(host, texts[CAROL], "PATCH", "/v1/pools/slots", {"size": 0})[0] == 200
    kept = {path: host.path(path).read_text() for path in ("/etc/passwd", "/etc/group")}
    try:
        _rewrite(host, "/etc/group", kept["/etc/group"].replace("netnsd-admin:x:61021:carol", "netnsd-admin:x:61021:"))
        status, answer = ask(host, texts[CAROL], "PATCH", "/v1/pools/slots", {"size": 0})
        assert (status, answer["error"]["code"]) == (403, "forbidden")
        assert ask(host, texts[CAROL], "GET", "/v1/info")[0] == 200
        _rewrite(host, "/etc/passwd", kept["/etc/passwd"].replace("\nbob:", "\nrobert:"))
        assert ask(host, texts[BOB], "GET", "/v1/info")[0] == 401
        _rewrite(host, "/etc/passwd", "".join(line for line in kept["/etc/passwd"].splitlines(keepends=True)
                                              if not line.startswith("bob:")))
        assert ask(host, texts[BOB], "GET", "/v1/info")[0] == 401
    finally:
        for path, content in kept.items():
            _rewrite(host, path, content)
    assert ask(host, texts[BOB], "GET", "/v1/info")[0] == 200


def _rewrite(host: HostNamespace, path: str, text: str) -> None:
    """In place: it is mounted."""
    host.path(path).write_text(text, encoding="utf-8")


def test_an_admin_gives_tokens_to_others_but_not_roots(rest: Daemon) -> None:
    text = token(rest, "for-bob", "--user", "bob", "--scope", "write", user=CAROL)
    status, made = ask(rest.host, text, "POST", "/v1/environments", {
        "name": "his", "command": [PYTHON, "-c", "import time; time.sleep(1000)"], "cwd": "/"})
    assert (status, made["owner"]["user"]) == (201, "bob")
    assert ids_of(main_of(made)["pid"])[0] == [str(BOB.uid)] * 4
    for user, whose in ((CAROL, "root"), (BOB, "alice")):
        done = rest.ctl("token", "create", "x", "--user", whose, user=user)
        assert (done.returncode, done.stdout) == (7, "")


# -- the daemon's end and start ---------------------------------------------------------------------------------


def test_tokens_outlive_the_daemon_and_are_nowhere_in_clear(rest: Daemon) -> None:
    rest.create_json("web", "sleep", "1000", user=ALICE)  # with none, the daemon's end takes everything else away too
    text = token(rest, "kept", "--expires", "1h")
    gone = token(rest, "gone")
    rest.ctl("token", "revoke", "gone", user=ALICE, check=True)
    rest.restart()
    assert ask(rest.host, text, "GET", "/v1/info")[0] == 200
    assert ask(rest.host, gone, "GET", "/v1/info")[0] == 401
    secret = text.rpartition("_")[2].encode()
    assert secret not in rest.log().encode()
    for directory, _, names in os.walk(rest.host.path(rest.state_dir)):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    assert secret not in file.read(), path


def test_on_loopback_it_needs_no_tls_of_ipv6_neither(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(config={"api": {"listen": f"[::1]:{PORT}", "requests_burst": 5, "requests_per_second": 1}})
    text = token(daemon, "t")
    done = daemon.host.run(["curl", "-sS", "--max-time", "10", "-H", f"Authorization: Bearer {text}", "-w",
                            "\n%{http_code}", *[f"http://[::1]:{PORT}/v1/health"] * 30], cwd="/", check=True)
    statuses = [line[:3] for line in done.stdout.splitlines() if line[:3].isdigit()]
    assert statuses[:5] == ["200"] * 5
    assert set(statuses[5:]) <= {"200", "429"}
    assert statuses.count("429") > 10


@pytest.mark.parametrize(("api", "named", "code"), [
    ({"listen": "0.0.0.0:7171"}, "[api] tls_certificate", 78),
    ({"listen": "0.0.0.0:7171", "tls_certificate": f"{TLS}/none", "tls_key": f"{TLS}/key.pem"},
     "[api] tls_certificate", 78),
    ({"listen": "127.0.0.1:7171", "tls_certificate": f"{TLS}/cert.pem", "tls_key": f"{TLS}/ca.pem"}, "[api] tls", 78),
    ({"listen": f"127.0.0.1:{PORT}"}, "[api] listen", 1)])
def test_a_daemon_that_cannot_listen_as_it_should_says_why_and_does_not_start(
        used_daemon: Daemon, api: dict[str, str], named: str, code: int) -> None:
    made = Daemon(used_daemon.host, config={"api": api}, name=f"other-{named[6:]}-{api['listen'][-4:]}-{len(api)}")
    done = used_daemon.host.run(made.command, cwd="/")
    assert (done.returncode, named in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
