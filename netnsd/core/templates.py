"""Templates: specifications under a name, some with environments of theirs started before anybody asks.

A template and its stock are one user's, as a server runs as somebody. What is in stock has a row, and survives the
daemon as every environment does; nobody sees it until it is handed over.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import trio

from netnsd import wire
from netnsd.core import specification, views
from netnsd.core.environment import Environment, Template
from netnsd.core.registry import Blueprint
from netnsd.errors import InvalidRequest, KernelError, NameTaken, NetnsdError, NotFound, WrongState

if TYPE_CHECKING:
    from netnsd.core.actor import Account, Actor
    from netnsd.core.environments import Environments
    from netnsd.core.interfaces import Adapters, Emit

MOST_WARM = 64
MOST_TEMPLATES = 100
MOST_BYTES = 1 << 20  # of one user's specifications, as JSON
_READY_SECONDS = 60.0
_FIRST_AGAIN_SECONDS, _LONGEST_AGAIN_SECONDS = 1.0, 60.0
_CALM_SECONDS = 2 * (_READY_SECONDS + _LONGEST_AGAIN_SECONDS)


class Stock:
    """What is kept of one template. ``scope`` ends its keeping."""

    def __init__(self) -> None:
        self.ready: list[Environment] = []
        self.claimed = 0
        self.missed = 0
        self.reason = ""
        self.troubled, self.pause = -math.inf, _FIRST_AGAIN_SECONDS
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


class Templates:
    """All templates of this host. ``run`` keeps their stocks."""

    def __init__(self, environments: Environments, adapters: Adapters, account: Account, emit: Emit) -> None:
        self._environments = environments
        self._store = adapters.store
        self._cgroups = adapters.cgroups
        self._clock = adapters.clock
        self._account = account
        self._emit = emit
        self._by_id: dict[str, Template] = {}
        self._stocks: dict[str, Stock] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what there should be in stock, until cancelled. After the environments run."""
        async with trio.open_nursery() as self._nursery:
            for template in self._store.templates():
                self._know(template)
            for environment in self._environments.registry.all():
                if environment.stock and environment.stock not in self._by_id:
                    self._environments.remove_behind(environment)
            task_status.started()
            await trio.sleep_forever()

    # -- what users do ------------------------------------------------------------------------------------------

    async def add(self, request: wire.TemplateRequest, actor: Actor) -> wire.Template:
        """Keep a specification. Raises Invalid*, Forbidden, NameTaken."""
        name = specification.check_name(request.name, what="template name")
        if not 0 <= request.warm <= MOST_WARM:
            raise InvalidRequest(f"warm {request.warm} is not from 0 to {MOST_WARM}", hint="0 keeps none.")
        # What could not be created is not kept.
        wanted = Blueprint.of(_created(request.specification), actor, self._environments.settings)
        self._cgroups.require(wanted.resources)
        existing = self.own(actor.uid, name)
        if existing is not None and not request.replace:
            raise NameTaken(f"you have a template {name!r} already", hint="Choose another name, or pass --replace.",
                            name=name)
        if existing is None and sum(t.uid == actor.uid for t in self._by_id.values()) >= MOST_TEMPLATES:
            raise InvalidRequest(f"you have {MOST_TEMPLATES} templates already", hint="Remove one.")
        others = sum(_size(t.specification) for t in self._by_id.values() if t.uid == actor.uid and t is not existing)
        if others + _size(request.specification) > MOST_BYTES:
            raise InvalidRequest(f"your templates would take more than {MOST_BYTES >> 10} KiB",
                                 hint="Remove one, or give fewer variables (--clean-env).")
        template = Template(str(uuid.uuid4()), name, actor.uid, actor.user, actor.gid, actor.groups, request.warm,
                            request.specification, self._clock.now())
        with self._store.transaction():
            if existing is not None:
                self._store.delete_template(existing.id)
            self._store.add_template(template)
        if existing is not None:
            self._forget(existing)
        self._know(template)
        return self._shown(template)

    def own(self, uid: int, name: str) -> Template | None:
        """A user's own template of that name."""
        return next((t for t in self._by_id.values() if t.uid == uid and t.name == name), None)

    def find(self, ref: str, actor: Actor) -> Template:
        """The template that ``actor`` means, by name or by id. Raises NotFound."""
        found = self.own(actor.uid, ref) or self._by_id.get(ref)
        if found is None or not actor.may_see(found.uid):
            raise NotFound(f"there is no template {ref[:80]!r}", hint="`netnsctl template ls` lists yours.",
                           ref=ref[:80])
        return found

    async def remove(self, ref: str, actor: Actor) -> None:
        """Remove a template, and its stock behind that."""
        template = self.find(ref, actor)
        with self._store.transaction():
            self._store.delete_template(template.id)
        self._forget(template)

    def show(self, ref: str, actor: Actor) -> wire.Template:
        """One template. Raises NotFound."""
        return self._shown(self.find(ref, actor))

    def shown(self, actor: Actor) -> list[wire.Template]:
        """The actor's own, oldest first."""
        return [self._shown(t) for t in self._by_id.values() if t.uid == actor.uid]

    def pools(self, actor: Actor) -> list[wire.Pool]:
        """The stocks of the actor's own templates."""
        return [wire.Pool(name=f"template/{t.name}", size=t.warm, target=t.warm, ready=len(stock.ready),
                          claimed=stock.claimed, missed=stock.missed, reason=stock.reason)
                for t in self._by_id.values() if t.uid == actor.uid and t.warm
                for stock in (self._stocks[t.id],)]

    def pool(self) -> wire.Pool:
        """All stocks together, for whom it does not matter whose they are."""
        size = sum(t.warm for t in self._by_id.values())
        stocks = self._stocks.values()
        return wire.Pool(name="templates", size=size, target=size, ready=sum(len(s.ready) for s in stocks),
                         claimed=sum(s.claimed for s in stocks), missed=sum(s.missed for s in stocks), reason="")

    async def create(self, request: wire.CreateRequest, actor: Actor, mark: str = "") -> Environment:
        """Make an environment as ``Environments.create`` does; of a template, hand over one that is ready."""
        if request.template is None:
            return await self._environments.create(request, actor, mark)
        template = self.find(request.template, actor)
        if template.uid != actor.uid:
            raise NotFound(f"you have no template {template.name!r}", hint="A template is for its own user alone.")
        _check_bare(request)
        labels = specification.check_labels({**template.specification.labels, **request.labels})
        name = specification.name_of(request)
        if any(_is_good(environment) for environment in self._stocks[template.id].ready):
            await self._environments.make_way(request, actor)
            # For a name that cannot be had none is taken from the stock: another would be started meanwhile.
            self._environments.registry.free_netns(name, actor.uid, actor.user)
        while (environment := self._take(template)) is not None:
            try:
                return await self._environments.hand_over(environment, name, labels, mark)
            except (WrongState, NotFound, KernelError):
                self._environments.remove_behind(environment)
            except BaseException:
                if environment.stock in self._stocks:
                    self._stocks[environment.stock].ready.insert(0, environment)
                    self._environments.pulse()
                raise
        return await self._environments.create(msgspec.structs.replace(
            _created(template.specification), name=name, labels=labels, replace=request.replace), actor, mark)

    def _take(self, template: Template) -> Environment | None:
        """One of the stock that still runs, for the caller alone."""
        stock = self._stocks.get(template.id)
        if stock is None:  # the template was removed meanwhile
            return None
        while stock.ready:
            environment = stock.ready.pop(0)
            if _is_good(environment):
                stock.claimed += 1
                self._environments.pulse()
                return environment
            self._environments.remove_behind(environment)
        if template.warm:
            stock.missed += 1
        return None

    # -- stocks -------------------------------------------------------------------------------------------------

    def _know(self, template: Template) -> None:
        assert self._nursery is not None
        self._by_id[template.id] = template
        stock = self._stocks[template.id] = Stock()
        stock.ready = self._found(template)
        if template.warm:
            self._nursery.start_soon(self._keep, template, stock)

    def _forget(self, template: Template) -> None:
        del self._by_id[template.id]
        self._stocks.pop(template.id).scope.cancel()
        for environment in self._environments.registry.stock(template.id):
            self._environments.remove_behind(environment)

    async def _keep(self, template: Template, stock: Stock) -> None:
        """Keep as many ready as the template says; what ended by itself is removed, and another made."""
        with stock.scope:
            while True:
                ended = [e for e in stock.ready if not _is_good(e)]
                # One may come back that somebody had taken, and could not have.
                surplus = [e for e in stock.ready if _is_good(e)][template.warm:]
                for environment in ended + surplus:
                    stock.ready.remove(environment)
                    self._environments.remove_behind(environment)
                if ended:
                    await self._trouble(template, stock, "a server in stock ended by itself")
                    continue
                if len(stock.ready) >= template.warm:
                    await self._environments.changed()
                    continue
                name = f"{template.name[:specification.NAME_CHARACTERS - 9]}-{uuid.uuid4().hex[:8]}"
                try:
                    stock.ready.append(await self._made(template, name))
                except NetnsdError as error:
                    await self._trouble(template, stock, error.message.replace(name, template.name))
                else:
                    stock.reason = ""

    def _found(self, template: Template) -> list[Environment]:
        """What an earlier run of the daemon left in stock; what was not ready yet goes."""
        found = self._environments.registry.stock(template.id)
        for environment in found:
            if not _is_good(environment):
                self._environments.remove_behind(environment)
        return [e for e in found if _is_good(e)]

    async def _made(self, template: Template, name: str) -> Environment:
        actor = await self._account(template.uid)
        if actor is None or actor.user != template.user:  # a number may be given again, to somebody else
            raise WrongState(f"there is no user {template.user!r} any more", hint="Remove the template.")
        # What a login would give now, and of that only what the creator of the template had.
        groups = {actor.gid, *actor.groups}
        if template.gid not in groups:
            raise WrongState(f"{template.user!r} is not in the template's group {template.gid} any more",
                             hint="Add the template again.")
        actor = replace(actor, gid=template.gid, groups=tuple(g for g in template.groups if g in groups))
        environment = await self._environments.stock(_created(template.specification, name), actor, template.id)
        try:
            await self._environments.wait(environment, "ready", _READY_SECONDS)
        except BaseException:
            self._environments.remove_behind(environment)
            raise
        return environment

    async def _trouble(self, template: Template, stock: Stock, reason: str) -> None:
        """Say why once, and wait: longer each time, until nothing went wrong for a while."""
        if reason != stock.reason:
            stock.reason = reason
            self._emit("template_stuck", template.uid, "", template.name, reason=reason)
        now = trio.current_time()
        is_another = now - stock.troubled > _CALM_SECONDS
        stock.pause = _FIRST_AGAIN_SECONDS if is_another else min(2 * stock.pause, _LONGEST_AGAIN_SECONDS)
        stock.troubled = now
        await trio.sleep(stock.pause)

    def _shown(self, template: Template) -> wire.Template:
        stock = self._stocks[template.id]
        return views.template(template, ready=len(stock.ready), reason=stock.reason)


def _is_good(environment: Environment) -> bool:
    """Whether it can be handed over: ready, no service of it has ended, and none is found to be unhealthy."""
    return environment.state == "ready" and all(s.state == "running" and s.health in (None, "healthy")
                                                for s in environment.services.values())


def _size(wanted: wire.Specification) -> int:
    return len(msgspec.json.encode(wanted))


def _created(wanted: wire.Specification, name: str | None = None) -> wire.CreateRequest:
    return wire.CreateRequest(name=name, **msgspec.structs.asdict(wanted))


def _check_bare(request: wire.CreateRequest) -> None:
    for known in msgspec.structs.fields(wire.Specification):
        if known.name != "labels" and getattr(request, known.name) != getattr(_NOTHING, known.name):
            raise InvalidRequest(f"{known.name} cannot be given beside template",
                                 hint="The template has it. Add another template, or create without one.")


_NOTHING = wire.Specification()
