"""Every route, in one table: method, path, who may, what it takes and gives. OpenAPI is made from it too."""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from netnsd import wire
from netnsd.api import peer
from netnsd.api.trail import Deed, Subject, Trail
from netnsd.core import views
from netnsd.core.actor import Actor
from netnsd.core.environment import ALIVE, Environment
from netnsd.core.environments import Environments
from netnsd.core.policies import Policies
from netnsd.core.policy import Policy
from netnsd.core.pool import MOST_SLOTS
from netnsd.core.projects import Projects
from netnsd.core.specification import MAX_LABELS, check_labels
from netnsd.core.templates import Templates
from netnsd.core.tokens import Grant, Tokens
from netnsd.core.waiting import Aim
from netnsd.errors import Forbidden, InvalidLabel, InvalidRequest, NetnsdError, NotFound

MOST_WAIT_SECONDS = 24 * 3600
MOST_TAIL = 10**9
MOST_SEQ = 10**15
# As in JSON: float() takes much that is no number to anybody else.
_NUMBER = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", re.ASCII)
_AIMS: dict[str, Aim] = {"ready": "ready", "exit": "exit", "gone": "gone"}


class Permission(enum.Enum):
    """Who may call a route. The environments that a caller may see are decided by ``Environments``."""

    ANYONE = "anyone who may open the socket, or has a token"
    OWNER = "the environment's owner, or an admin"
    ADMIN = "an admin"


@dataclass(frozen=True, slots=True)
class Context:
    """What handlers work with. ``follow_log(path, tail, follow)``, ``follow_events`` and ``follow_audit`` stream.

    ``named`` finds a user by name or number.
    """

    environments: Environments
    templates: Templates
    metrics: Callable[[], bytes]
    info: Callable[[], wire.Info]
    examine: Callable[[], Awaitable[list[wire.Check]]]
    log_path: Callable[[str, str], str]
    read_log: Callable[[str, int | None, Callable[[], bool] | None], AsyncIterator[bytes]]
    follow_events: Callable[[Callable[[int], bool], int, bool], AsyncGenerator[wire.Event, None]]
    tokens: Tokens
    projects: Projects
    policies: Policies
    follow_audit: Callable[[Callable[[int], bool], int, bool], AsyncGenerator[wire.Event, None]]
    trail: Trail
    named: Callable[[str], Awaitable[Actor | None]] = peer.named


@dataclass(frozen=True, slots=True)
class Call:
    """One request: ``body`` is decoded to the route's type, ``query`` has each parameter's last value.

    ``deed``: what the audit trail is to tell of it. ``key``: its Idempotency-Key, on routes that take one.
    """

    context: Context
    actor: Actor
    grant: Grant
    ref: str
    query: dict[str, list[str]]
    body: Any
    deed: Deed
    key: str | None = None

    def environment(self) -> Environment:
        """The environment that the path names. Raises NotFound."""
        return self.deed.about(self.context.environments.registry.find(self.ref, self.actor))

    def text(self, name: str, default: str) -> str:
        """A query parameter."""
        return self.query.get(name, [default])[-1]

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A query parameter that is 1 or 0."""
        value = self.text(name, "1" if default else "0")
        if value not in ("0", "1"):
            raise InvalidRequest(f"query parameter {name} is not 0 or 1", hint=f"Write ?{name}=1.")
        return value == "1"

    def number(self, name: str, default: float, most: float) -> float:
        """A query parameter that is a number from 0 to ``most``."""
        if name not in self.query:
            return default
        value = self.text(name, "")
        number = float(value) if _NUMBER.fullmatch(value) else -1.0
        if not 0 <= number <= most:
            raise InvalidRequest(f"query parameter {name} is not a number from 0 to {most:g}", hint="Use digits.")
        return number

    def count(self, name: str, most: int) -> int | None:
        """A query parameter that is a whole number from 0 to ``most``; None where it is not given."""
        number = self.number(name, 0, most)
        if number != int(number):
            raise InvalidRequest(f"query parameter {name} is not a whole number", hint="Use digits.")
        return int(number) if name in self.query else None


@dataclass(frozen=True, slots=True)
class Route:
    """One row. ``answer`` None: a stream, of ``content_type``. ``query``: parameter name to what it means.

    ``is_keyed``: it takes an Idempotency-Key. ``scope``: what a token has to be good for: ``write`` where anything
    changes. ``waits``: it changes nothing and may take long, so it ends with its client.
    """

    method: str
    path: str
    permission: Permission
    handler: Callable[[Call], Awaitable[Any]]
    summary: str
    answer: Any
    body: Any = None
    status: int = 200
    content_type: str = "application/json"
    query: dict[str, str] = field(default_factory=dict)
    waits: bool = False
    is_keyed: bool = False
    scope: wire.Scope = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer of what is done behind it: status 202."""

    answer: wire.Answer


class Nothing(wire.Answer, frozen=True, kw_only=True):
    """``{}``."""


class NoFields(wire.Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``{}``, as a request."""


async def _list(call: Call) -> wire.EnvironmentList:
    found = call.context.environments.registry.visible(call.actor, everyones=call.flag("all"), labels=_labels(call))
    return wire.EnvironmentList(environments=[views.environment(e) for e in found])


def _labels(call: Call) -> dict[str, str]:
    labels: dict[str, str] = {}
    items = call.query.get("label", [])
    if len(items) > MAX_LABELS:
        raise InvalidLabel(f"{len(items)} labels are more than {MAX_LABELS}", hint="Use fewer.")
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise InvalidRequest("query parameter label is not k=v", hint="Write ?label=k=v.")
        if labels.setdefault(key, value) != value:
            raise InvalidLabel(f"label {key[:128]!r} is asked for with two values", hint="Nothing has both.")
    return check_labels(labels)


async def _create(call: Call) -> wire.Environment | wire.EnvironmentList:
    service, request = call.context.environments, call.body
    call.deed.name = request.name or ""

    async def make(mark: str, there: Sequence[Environment]) -> list[Environment]:
        create = partial(call.context.templates.create, mark=mark)
        if request.count is None:
            return [await create(request, call.actor)]
        return await service.create_many(request, call.actor, create, there)

    made = await service.once.make(call.actor, call.key, request, make)
    if request.count is None:
        return views.environment(call.deed.about(made[0]))
    return wire.EnvironmentList(environments=[views.environment(call.deed.about(e)) for e in made])


async def _show(call: Call) -> wire.Environment:
    return views.environment(call.environment())


async def _remove(call: Call) -> Nothing | Accepted:
    environment = call.environment()
    if not call.flag("wait", default=True):
        call.context.environments.remove_behind(environment)
        return Accepted(Nothing())
    await call.context.environments.remove(environment)
    return Nothing()


async def _remove_many(call: Call) -> wire.Removal | Accepted:
    """Everything that can be removed is; each failure is told."""
    service, refs = call.context.environments, list(dict.fromkeys(call.query.get("ref", [])))
    labels = _labels(call)
    if (bool(refs), bool(labels), call.flag("everything")).count(True) != 1:
        raise InvalidRequest("one of the query parameters ref, label and everything is needed",
                             hint="Write ?ref=NAME&ref=NAME, ?label=k=v, or ?everything=1.")
    failed: list[wire.Failure] = []
    chosen: dict[str, Environment] = {}
    for ref in refs:
        try:
            found = service.registry.find(ref, call.actor)
        except NotFound as error:
            failed.append(_failure(ref, error))
        else:
            if not any(found is other for other in chosen.values()):  # by name and by id, say
                chosen[ref] = found
    if failed:  # of what is not there one line tells, whose length is bounded
        call.deed.subjects.append(Subject("", " ".join(failure.ref for failure in failed), code=NotFound.code))
    if not refs:
        chosen = {e.name: e for e in service.registry.visible(call.actor, everyones=False, labels=labels)}
    if not call.flag("wait", default=True):
        service.remove_behind(*map(call.deed.about, chosen.values()))
        return Accepted(wire.Removal(removed=[e.name for e in chosen.values()], failed=failed))
    failures = await service.remove_many(list(chosen.values()))
    for environment in chosen.values():
        call.deed.about(environment, failures[environment.id].code if environment.id in failures else "")
    failed += [_failure(ref, failures[e.id]) for ref, e in chosen.items() if e.id in failures]
    return wire.Removal(removed=[e.name for e in chosen.values() if e.id not in failures], failed=failed)


def _failure(ref: str, error: NetnsdError) -> wire.Failure:
    return wire.Failure(ref=ref, error=wire.ErrorBody(code=error.code, message=error.message, hint=error.hint,
                                                      details=error.details))


async def _change(call: Call) -> wire.Environment:
    environment = call.environment()
    await call.context.environments.change(environment, call.body)
    return views.environment(environment)


async def _start(call: Call) -> wire.Environment:
    environment = call.environment()
    await call.context.environments.start(environment)
    return views.environment(environment)


async def _stop(call: Call) -> wire.Environment:
    environment = call.environment()
    await call.context.environments.stop(environment, _grace(call.body))
    return views.environment(environment)


async def _restart(call: Call) -> wire.Environment:
    environment = call.environment()
    await call.context.environments.restart(environment, _grace(call.body))
    return views.environment(environment)


def _grace(body: wire.StopRequest) -> float:
    if not 0 <= body.grace_seconds <= 3600:
        raise InvalidRequest("grace_seconds is not from 0 to 3600", hint="It is a number of seconds.")
    return body.grace_seconds


async def _wait(call: Call) -> wire.Environment | Nothing:
    aim = _AIMS.get(call.text("for", "ready"))
    if aim is None:
        raise InvalidRequest("query parameter for is not ready, exit or gone", hint="Write ?for=ready.")
    environment = call.environment()
    timeout = call.number("timeout", 60.0, MOST_WAIT_SECONDS)
    await call.context.environments.wait(environment, aim, timeout)
    return Nothing() if aim == "gone" else views.environment(environment)


async def _logs(call: Call) -> AsyncIterator[bytes]:
    environment = call.environment()
    names = list(environment.services)
    service = call.text("service", names[0] if names else "main")
    if service not in environment.services:
        raise NotFound(f"{environment.name!r} has no service {service[:80]!r}",
                       hint=f"It has {', '.join(names) or 'none'}.")
    tail, follows = call.count("tail", MOST_TAIL), call.flag("follow")

    def goes_on() -> bool:
        current = environment.services[service]
        return current.state in ALIVE and environment.state != "removing"

    return call.context.read_log(call.context.log_path(environment.id, service), tail, goes_on if follows else None)


async def _events(call: Call) -> AsyncIterator[bytes]:
    return _lines(call, call.context.follow_events)


async def _audit(call: Call) -> AsyncIterator[bytes]:
    return _lines(call, call.context.follow_audit)


def _lines(call: Call, follow: Callable[..., AsyncGenerator[wire.Event, None]]) -> AsyncIterator[bytes]:
    after = call.count("after", MOST_SEQ) or 0
    goes_on = call.flag("follow", default=True)
    encode = msgspec.json.Encoder().encode

    async def lines() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(follow(call.actor.may_see, after, goes_on)) as events:
            async for event in events:
                yield encode(event) + b"\n"

    return lines()


async def _templates(call: Call) -> wire.TemplateList:
    return wire.TemplateList(templates=call.context.templates.shown(call.actor))


async def _add_template(call: Call) -> wire.Template:
    call.deed.name = call.body.name
    return await call.context.templates.add(call.body, call.actor)


async def _show_template(call: Call) -> wire.Template:
    return call.context.templates.show(call.ref, call.actor)


async def _remove_template(call: Call) -> Nothing:
    template = call.context.templates.find(call.ref, call.actor)
    call.deed.subjects.append(Subject("", template.name, template.uid))
    await call.context.templates.remove(template.id, call.actor)
    return Nothing()


async def _policies(call: Call) -> wire.PolicyList:
    return _shown(call, call.context.policies.visible(call.actor, everyones=call.flag("all")))


async def _apply_policies(call: Call) -> wire.PolicyList:
    return _shown(call, await call.context.policies.apply(call.body.policies, call.actor))


def _shown(call: Call, policies: list[Policy]) -> wire.PolicyList:
    return wire.PolicyList(policies=[views.policy(p, call.context.policies.selected(p)) for p in policies])


async def _show_policy(call: Call) -> wire.Policy:
    policy = call.context.policies.find(call.ref, call.actor)
    return views.policy(policy, call.context.policies.selected(policy))


async def _remove_policy(call: Call) -> Nothing:
    await call.context.policies.remove(call.ref, call.actor)
    return Nothing()


async def _pools(call: Call) -> wire.PoolList:
    return wire.PoolList(pools=[views.pool(call.context.environments.pool), *call.context.templates.pools(call.actor)])


async def _resize_pool(call: Call) -> wire.Pool:
    if not 0 <= call.body.size <= MOST_SLOTS:
        raise InvalidRequest(f"size {call.body.size} is not from 0 to {MOST_SLOTS}", hint="0 drains the pool.")
    call.context.environments.pool.resize(call.body.size)
    return views.pool(call.context.environments.pool)


async def _metrics(call: Call) -> AsyncIterator[bytes]:
    async def text() -> AsyncIterator[bytes]:
        yield call.context.metrics()

    return text()


async def _quotas(call: Call) -> wire.QuotaList:
    registry, actor = call.context.environments.registry, call.actor
    users = {actor.uid: actor.user}
    if actor.is_admin:
        users = {**registry.quotas.known(), **{e.uid: e.user for e in registry.all()}, **users}
    return wire.QuotaList(quotas=[registry.quotas.shown(uid, users[uid]) for uid in sorted(users)])


async def _quota(call: Call) -> wire.Quota:
    return call.context.environments.registry.quotas.shown(*await _user(call))


async def _put_quota(call: Call) -> wire.Quota:
    uid, user = await _user(call)
    call.context.environments.registry.quotas.put(uid, user, call.body)
    return call.context.environments.registry.quotas.shown(uid, user)


async def _reset_quota(call: Call) -> wire.Quota:
    uid, user = await _user(call)
    call.context.environments.registry.quotas.reset(uid)
    return call.context.environments.registry.quotas.shown(uid, user)


async def _user(call: Call) -> tuple[int, str]:
    """Whom the path names: number and name. Raises Forbidden, NotFound."""
    if call.ref in (call.actor.user, str(call.actor.uid)):
        return call.actor.uid, call.actor.user
    if not call.actor.is_admin:  # not even whether there is such a user
        raise Forbidden("others' quotas are not yours to see", hint="Ask root, or a member of the admins' group.")
    found = await call.context.named(call.ref)
    if found is not None:
        return found.uid, found.user
    # Somebody who has none any more may have a quota still.
    for uid, user in call.context.environments.registry.quotas.known().items():
        if call.ref in (user, str(uid)):
            return uid, user
    raise NotFound(f"there is no user {call.ref[:80]!r}", hint="Give a name or a number.", ref=call.ref[:80])


async def _health(_call: Call) -> wire.Health:
    return wire.Health(status="ok")


async def _info(call: Call) -> wire.Info:
    return call.context.info()


async def _doctor(call: Call) -> wire.Doctor:
    checks = await call.context.examine()
    service = call.context.environments
    mine = {e.id for e in service.registry.all() if e.uid == call.actor.uid and not e.stock}
    found = [d for d in await service.caretaker.differences() if call.actor.is_admin or d.environment in mine]
    return wire.Doctor(checks=checks, differences=[views.difference(d) for d in found])


async def _prune(call: Call) -> wire.Pruned:
    removed, left = await call.context.environments.caretaker.prune()
    return wire.Pruned(removed=[views.difference(d) for d in removed], left=[views.difference(d) for d in left])


async def _tokens(call: Call) -> wire.TokenList:
    return wire.TokenList(tokens=call.context.tokens.shown(call.actor, everyones=call.flag("all")))


async def _issue_token(call: Call) -> wire.IssuedToken:
    call.deed.name = call.body.name
    return await call.context.tokens.issue(call.body, call.actor, call.grant)


async def _revoke_token(call: Call) -> Nothing:
    call.context.tokens.revoke(call.ref, call.actor)
    return Nothing()


async def _start_project(call: Call) -> wire.Environment:
    call.deed.ref = f"{call.body.dev_id}/{call.body.project}"
    return views.environment(call.deed.about(await call.context.projects.start(call.body, call.actor)))


async def _end_project(call: Call) -> Nothing:
    call.deed.ref = call.body.id or "/".join(filter(None, (call.body.dev_id, call.body.project)))
    call.deed.about(await call.context.projects.terminate(call.body, call.actor))
    return Nothing()


async def _show_projects(call: Call) -> wire.Environment | wire.EnvironmentList:
    wanted = wire.ProjectReference(**{name: values[-1] for name, values in call.query.items()
                                      if name in ("dev_id", "project", "id")})
    if wanted != wire.ProjectReference():
        return views.environment(await call.context.projects.find(wanted, call.actor))
    return wire.EnvironmentList(environments=[views.environment(e) for e in call.context.projects.visible(call.actor)])


_REF = "/v1/environments/{ref}"
_WAIT = {"wait": "0: answer 202 at once, and remove behind"}
_EVENTS = {"after": "only events with a greater seq", "follow": "0: end with what is remembered"}
ROUTES: tuple[Route, ...] = (
    Route("GET", "/v1/environments", Permission.OWNER, _list, "List environments", wire.EnvironmentList,
          query={"all": "1: everyone's that the caller may see", "label": "k=v, may be given more than once"},
          scope="read"),
    Route("POST", "/v1/environments", Permission.ANYONE, _create, "Create an environment, and start its services",
          wire.Environment | wire.EnvironmentList, body=wire.CreateRequest, status=201, is_keyed=True, scope="write"),
    Route("DELETE", "/v1/environments", Permission.OWNER, _remove_many,
          "Remove many of one's environments; they are gone with the answer", wire.Removal,
          query={"ref": "which, may be given more than once", "label": "k=v: those with all of these labels",
                 "everything": "1: all of one's own", **_WAIT}, scope="write"),
    Route("GET", _REF, Permission.OWNER, _show, "Show one environment", wire.Environment, scope="read"),
    Route("PATCH", _REF, Permission.OWNER, _change, "Change its share, its egress or its labels", wire.Environment,
          body=wire.ChangeRequest, scope="write"),
    Route("DELETE", _REF, Permission.OWNER, _remove, "Remove an environment; it is gone with the answer", Nothing,
          query=_WAIT, scope="write"),
    Route("POST", _REF + "/start", Permission.OWNER, _start, "Start services that do not run", wire.Environment,
          body=NoFields, scope="write"),
    Route("POST", _REF + "/stop", Permission.OWNER, _stop, "Stop its services", wire.Environment,
          body=wire.StopRequest, scope="write"),
    Route("POST", _REF + "/restart", Permission.OWNER, _restart, "Stop and start its services", wire.Environment,
          body=wire.StopRequest, scope="write"),
    Route("GET", _REF + "/wait", Permission.OWNER, _wait, "Wait for a state", wire.Environment | Nothing,
          query={"for": "ready, exit or gone", "timeout": "seconds, 60 by default"}, waits=True, scope="read"),
    Route("GET", _REF + "/logs", Permission.OWNER, _logs, "What a service wrote to stdout and stderr", None,
          content_type="application/octet-stream",
          query={"service": "which, the first by default", "tail": "so many last lines only",
                 "follow": "1: go on until the service ends"}, scope="read"),
    Route("GET", "/v1/templates", Permission.OWNER, _templates, "List templates", wire.TemplateList, scope="read"),
    Route("POST", "/v1/templates", Permission.ANYONE, _add_template, "Keep a specification under a name",
          wire.Template, body=wire.TemplateRequest, status=201, scope="write"),
    Route("GET", "/v1/templates/{ref}", Permission.OWNER, _show_template, "Show one template", wire.Template,
          scope="read"),
    Route("DELETE", "/v1/templates/{ref}", Permission.OWNER, _remove_template,
          "Remove a template, and the warm environments that nobody has claimed", Nothing, scope="write"),
    Route("GET", "/v1/policies", Permission.OWNER, _policies, "List policies", wire.PolicyList,
          query={"all": "1: everyone's that the caller may see"}, scope="read"),
    Route("POST", "/v1/policies", Permission.ANYONE, _apply_policies,
          "Apply NetworkPolicy documents, in place of one's own of the same names: all, or none", wire.PolicyList,
          body=wire.PolicyRequest, scope="write"),
    Route("GET", "/v1/policies/{ref}", Permission.OWNER, _show_policy, "Show one policy", wire.Policy, scope="read"),
    Route("DELETE", "/v1/policies/{ref}", Permission.OWNER, _remove_policy, "Remove a policy", Nothing, scope="write"),
    Route("GET", "/v1/pools", Permission.ANYONE, _pools, "What is kept ready before demand", wire.PoolList,
          scope="read"),
    Route("PATCH", "/v1/pools/slots", Permission.ADMIN, _resize_pool, "Keep more slots ready, fewer, or none",
          wire.Pool, body=wire.PoolRequest, scope="admin"),
    Route("GET", "/v1/quotas", Permission.OWNER, _quotas, "One's own quota; for admins, everyone's who has anything",
          wire.QuotaList, scope="read"),
    Route("GET", "/v1/quotas/{user}", Permission.OWNER, _quota, "A user's quota, and what that user has", wire.Quota,
          scope="read"),
    Route("PUT", "/v1/quotas/{user}", Permission.ADMIN, _put_quota, "Give a user a quota of its own", wire.Quota,
          body=wire.QuotaRequest, scope="admin"),
    Route("DELETE", "/v1/quotas/{user}", Permission.ADMIN, _reset_quota, "Let a user have what all have", wire.Quota,
          scope="admin"),
    Route("GET", "/v1/events", Permission.OWNER, _events, "What happens, one JSON object per line, for ever", None,
          content_type="application/x-ndjson", query=_EVENTS, scope="read"),
    Route("GET", "/v1/audit", Permission.ADMIN, _audit, "Who asked for which change, as events are told", None,
          content_type="application/x-ndjson", query=_EVENTS, scope="admin"),
    Route("GET", "/metrics", Permission.ANYONE, _metrics, "Metrics, as Prometheus reads them", None,
          content_type="text/plain; version=0.0.4", scope="read"),
    Route("GET", "/v1/health", Permission.ANYONE, _health, "Whether the daemon answers", wire.Health, scope="read"),
    Route("GET", "/v1/info", Permission.ANYONE, _info, "What this daemon is and holds", wire.Info, scope="read"),
    Route("GET", "/v1/doctor", Permission.ANYONE, _doctor,
          "What this host lacks, and in what state file and kernel do not agree", wire.Doctor, scope="read"),
    Route("POST", "/v1/prune", Permission.ADMIN, _prune, "Mend what is missing, and remove what is nobody's",
          wire.Pruned, body=NoFields, scope="admin"),
    Route("GET", "/v1/tokens", Permission.OWNER, _tokens, "List bearer tokens", wire.TokenList, scope="read",
          query={"all": "1: everyone's that the caller may see"}),
    Route("POST", "/v1/tokens", Permission.ANYONE, _issue_token, "Create a bearer token; it is shown this once",
          wire.IssuedToken, body=wire.TokenRequest, status=201, scope="write"),
    Route("DELETE", "/v1/tokens/{ref}", Permission.OWNER, _revoke_token,
          "Revoke a token, and those that were made with it", Nothing, scope="write"),
    # What existing scripts call: an environment is named by whose it is and what for.
    Route("POST", "/api/environments/start", Permission.ANYONE, _start_project,
          "Start the environment of a developer's project, making it where there is none", wire.Environment,
          body=wire.ProjectRequest, scope="write"),
    Route("POST", "/api/environments/terminate", Permission.OWNER, _end_project,
          "Remove it; it is gone with the answer", Nothing, body=wire.ProjectReference, scope="write"),
    Route("GET", "/api/environments/status", Permission.OWNER, _show_projects, "List them, or show one",
          wire.Environment | wire.EnvironmentList, scope="read",
          query={"dev_id": "with project: of that pair", "project": "see dev_id", "id": "an environment's"}),
)
