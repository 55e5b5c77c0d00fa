"""A world with templates, and what tests of them ask for and look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio
import trio.testing

from netnsd import wire
from netnsd.core.environment import Environment
from netnsd.core.interfaces import Listener
from tests.fakes.world import ALICE, World

Clock = trio.testing.MockClock
SPECIFICATION = wire.Specification(command=["server"], ports=[wire.PortRequest(port=3000)], env={"SECRET": "hush"},
                                   labels={"app": "shop", "tier": "web"}, cwd="/srv")


def world(directory: Path, **options: Any) -> World:
    """One in which every namespace's server listens at once."""
    made = World(directory, **options)
    made.network.everywhere = {Listener("tcp", "0.0.0.0", 3000)}
    return made


async def add(made: World, warm: int = 2, *, who: Any = ALICE, name: str = "shop", replace: bool = False,
              specification: wire.Specification = SPECIFICATION) -> wire.Template:
    answer = await made.templates.add(
        wire.TemplateRequest(name=name, warm=warm, replace=replace, specification=specification), who)
    await trio.sleep(1)
    return answer


def asked(name: str | None = "web", template: str = "shop", **fields: Any) -> wire.CreateRequest:
    return wire.CreateRequest(name=name, template=template, **fields)


def stock_of(made: World, name: str = "shop", who: Any = ALICE) -> list[Environment]:
    return list(made.templates._stocks[made.templates.find(name, who).id].ready)


async def at_rest(made: World) -> None:
    """Let everything end that was begun, and see that each environment has one name and nothing else has one."""
    await made.environments.check()
    await trio.sleep(300)
    found = list(made.environments.registry.all())
    assert sorted(n for n in made.network.slots.values() if n) == sorted(e.netns for e in found)
    assert made.network.second_names == set()
    assert made.network.left == set()
    assert made.environments.registry._netns == {e.netns for e in found}
    assert sorted(e.netns for e in made.store.environments()) == sorted(e.netns for e in found)
