"""schemathesis, as a user of the host: ``asking.py ORDER`` with JSON (see ``tests.fuzz.campaign``).

It ends with schemathesis's exit status, after a line of JSON with what was asked and answered.
"""

from __future__ import annotations

import collections
import ipaddress
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import requests
import schemathesis
from requests.adapters import HTTPAdapter
from schemathesis.cli import schemathesis as cli
from schemathesis.generation.meta import StatefulPhaseData
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

STREAMS = ("/logs", "/v1/events", "/v1/audit")
SILENCE_SECONDS = 0.2
ANSWER_SECONDS = 10.0
_RECENT = 8
_POLICIES = 20  # names: fewer than a user may have policies, so that some are replaced
# Refused although the schema allows it: for what a host has or lacks, or for what was asked before.
OF_THE_HOST = {"launch_failed", "limit_unavailable", "idempotency_conflict"}

QUOTAS_OF = "bob"  # who asks for nothing, so that nobody is held up by what is given him

answers: collections.Counter[str] = collections.Counter()
made: dict[str, list[str]] = collections.defaultdict(list)  # by the path that lists them


class Adapter(HTTPAdapter):
    """HTTP over a Unix socket, or to a TCP address. Reads what never ends until it is silent."""

    socket_path: str | None = None

    def get_connection_with_tls_context(self, request: Any, verify: Any, proxies: Any = None, cert: Any = None) -> Any:
        if self.socket_path is None:
            return super().get_connection_with_tls_context(request, verify, proxies, cert)
        return _UNIX

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        path = str(request.path_url).partition("?")[0]
        is_stream = request.method == "GET" and path.endswith(STREAMS)
        options["timeout"] = (ANSWER_SECONDS, SILENCE_SECONDS) if is_stream else ANSWER_SECONDS
        response = super().send(request, *arguments, **options)
        answers[str(response.status_code)] += 1
        if is_stream:
            body = b""
            try:
                for part in response.raw.stream(65536):
                    body += part
            except Exception as error:  # which of urllib3's it is depends on where it waited
                if "timed out" not in str(error).lower():
                    raise
            response._content = body
            response.close()
        return response


class _UnixConnection(HTTPConnection):
    def connect(self) -> None:
        assert Adapter.socket_path is not None
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ANSWER_SECONDS)
        self.sock.connect(Adapter.socket_path)


class _UnixPool(HTTPConnectionPool):
    ConnectionCls = _UnixConnection


_UNIX = _UnixPool("localhost", maxsize=4)


@schemathesis.hook
def map_case(_context: Any, case: Any) -> Any:
    """Make of a good request one that this host can serve, in the time that there is."""
    is_good = case.meta.generation.mode.is_positive
    # Of what is removed in bulk, behind the answer, or replaced, the checks of what there is do not know.
    is_stateful = isinstance(case.meta.phase.data, StatefulPhaseData)
    query = case.query or {}
    number = sum(answers.values())
    there = made[case.path.partition("/{")[0]]
    if is_good and not is_stateful and "{ref}" in case.path and there and number % 3:
        case.path_parameters = {"ref": there[-1 - number % min(len(there), _RECENT)]}
    if is_good and "{user}" in case.path and number % 3:
        case.path_parameters = {"user": QUOTAS_OF}
    if is_good and (key := (case.headers or {}).get("Idempotency-Key")) and number % 3:  # sent once
        case.headers["Idempotency-Key"] = f"{key[:200]}{number}"
    if is_good and query.get("label"):  # one value for each key
        query["label"] = list({label.partition("=")[0]: label for label in query["label"]}.values())
    if is_good and (case.method, case.path) == ("DELETE", "/v1/environments"):  # one of the three
        wanted = {name: query[name] for name in ("ref", "label") if query.get(name)} or (
            {"ref": ["none"]} if is_stateful else {"everything": "1"})
        case.query = {"wait": query.get("wait", "1"), **dict([wanted.popitem()])}
    if is_stateful and "wait" in query:
        case.query = {**case.query, "wait": "1"}
    if is_good and case.path.endswith("/status"):  # the pair, or the id
        case.query = {k: v for k, v in query.items() if k in ({"dev_id", "project"} if len(query) > 1 else {"id"})}
        if len(case.query) == 1 and "id" not in case.query:
            case.query = {}
    if isinstance(case.body, dict):
        for name, most, allowed in (("grace_seconds", 1, 3600), ("count", 3, 500), ("size", 3, 1000), ("warm", 1, 64)):
            _bound(case.body, name, most, allowed)
        if is_good:
            if case.path.endswith("/tokens"):
                case.body.pop("user", None)
            wanted = case.body.get("specification", case.body)
            if isinstance(wanted, dict) and "/quotas/" not in case.path:  # whose ports are a number
                _serve(wanted)
            if case.body.get("count") and case.body.get("name"):  # NAME-3 is a name too
                case.body["name"] = "n" + case.body["name"][1:50].strip("-")
            if is_stateful:
                case.body.pop("replace", None)
    return case


@schemathesis.hook
def before_call(_context: Any, case: Any, _arguments: Any) -> None:
    """Wait for a moment only: also where schemathesis tries the longest time that there is."""
    if case.path.endswith("/wait"):
        case.query = dict(case.query or {})
        if re.fullmatch("[0-9.]+", str(case.query.get("timeout", "60"))):
            case.query["timeout"] = min(float(case.query.get("timeout", "60")), 0.2)


def _bound(values: dict[str, Any], name: str, most: float, allowed: float) -> None:
    """What is drawn from all that is allowed would take days."""
    value = values.get(name)
    if isinstance(value, (int, float)) and most < value <= allowed:
        values[name] = most


def _serve(wanted: dict[str, Any]) -> None:
    """What no schema can say, and what only the host knows: commands that are there, directories, distinct ports."""
    if services := wanted.get("services"):
        wanted["services"] = list({service.get("name", "main"): service for service in services}.values())
    else:
        wanted.pop("services", None)
    if ":" in (wanted.get("share") or ""):
        wanted["share"] = "user:bob,group:netnsd"
    if wanted.get("egress") not in (None, "allow", "deny"):  # networks, and ports in order
        wanted["egress"] = "10.1.0.0/16:443/tcp"
    if "policies" in wanted:
        _agree([policy for one in wanted["policies"]
                for policy in ((one.get("items") or []) if one["kind"].endswith("List") else [one])])
    for one in (wanted, *wanted.get("services", [])):
        if one.get("command"):
            one["command"] = ["/bin/sleep" if len(one["command"]) % 2 else "/bin/true", "1000"]
        if one.get("cwd") is not None:
            one["cwd"] = "/"
    ports = {(p.get("protocol", "tcp"), p["port"]): p for p in wanted.get("ports", [])}
    if ports:
        published = {(p.get("protocol", "tcp"), p.get("publish")): p for p in ports.values()}
        wanted["ports"] = list(published.values())


def _agree(policies: list[dict[str, Any]]) -> None:
    """Of NetworkPolicy documents what no schema can say: names that differ and are one's own, and what is in order."""
    names: set[str] = set()
    for policy in policies:
        metadata, spec = policy["metadata"], policy.get("spec") or {}
        metadata.pop("namespace", None)
        name = metadata["name"] if len(metadata["name"]) % 3 == 0 else f"p{len(metadata['name']) % _POLICIES}"
        while name in names:
            name = f"p{int(name[1:] or 0) + 1}" if re.fullmatch("p[0-9]*", name) else "p"
        names.add(name)
        metadata["name"] = name
        rules = [*(spec.get("ingress") or []), *(spec.get("egress") or [])]
        for port in (port for rule in rules for port in rule.get("ports") or []):
            if port.get("endPort") is not None:
                port["port"], port["endPort"] = sorted((port["port"], port["endPort"]))
        for peer in (peer for rule in rules for peer in rule.get("from") or rule.get("to") or []):
            if peer.get("ipBlock") is not None:
                _narrow(peer["ipBlock"])


def _narrow(block: dict[str, Any]) -> None:
    """Have of ``except`` what is within ``cidr``, and half of that for the rest."""
    network = ipaddress.IPv4Network(block["cidr"], strict=False)
    for number, text in enumerate(block.get("except") or []):
        hole = ipaddress.IPv4Network(text, strict=False)
        if network.prefixlen == 32:
            block["except"] = []
        elif not hole.subnet_of(network) or hole == network:
            block["except"][number] = str(next(network.subnets()))


@schemathesis.check
def refusals_are_of_the_host(_context: Any, response: Any, case: Any) -> None:
    """``positive_data_acceptance`` lets 422 pass, as commands are found to be missing in that way. Only for them."""
    code = response.json()["error"]["code"] if response.status_code >= 400 and response.content else ""
    if response.status_code == 422 and case.meta is not None and case.meta.generation.mode.is_positive:
        assert code in OF_THE_HOST, response.text
    if response.status_code == 201 and "id" in (answer := response.json()):
        made[case.path].append(answer["id"])
    if response.status_code == 200 and (case.method, case.path) == ("POST", "/v1/policies"):
        made[case.path] += [policy["name"] for policy in response.json()["policies"]]
    assert code != "internal", response.text


def main() -> None:
    """Run as a program."""
    order = json.loads(sys.argv[1])
    os.chdir(order["directory"])
    Adapter.socket_path = order.get("socket")
    adapter = Adapter()
    requests.Session.get_adapter = lambda _self, url: adapter  # type: ignore[method-assign, assignment]
    Path("schemathesis.toml").write_text(order["configuration"])
    status = 0
    try:
        cli(["--config-file", "schemathesis.toml", "run", f"{order['url']}/openapi.json", *order["arguments"]])
    except SystemExit as end:
        status = int(end.code or 0)
    print(json.dumps(answers))
    sys.exit(status)


if __name__ == "__main__":
    main()
