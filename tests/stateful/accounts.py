"""The books of a world on fakes: whatever there is belongs to an environment, and is written where it should be."""

from __future__ import annotations

from typing import Any

from tests.fakes.world import World

# Whatever happens to it, the service has no reason to say one of these.
_TROUBLE = {"remove_failed", "furnish_failed", "store_failed", "orphan_left", "pool_stuck", "slot_spoilt",
            "template_stuck", "lost"}


def differences(world: World, visible: int, published: int) -> list[str]:
    """How store, registry and kernel differ from each other, and from so many environments with so many ports."""
    found = list(world.environments.registry.all())
    stock = [e for e in found if e.stock]
    registry, held = world.environments.registry, world.held()
    ready = world.environments.pool.ready
    rows = {row.id: (row.state, row.netns, row.name) for row in world.store.environments()}
    lines = [f"the service said {kind} of {name!r}: {details}" for kind, name, details in world.events
             if kind in _TROUBLE]
    expected: list[tuple[str, Any, Any]] = [
        ("environments that users see", len(found) - len(stock), visible),
        ("rows", rows, {e.id: (e.state, e.netns, e.name) for e in found}),
        ("stocks", sum(t.warm for t in world.store.templates()), len(stock)),
        ("leases", registry.published, published + sum(len(e.ports) for e in stock)),
        ("slots taken", held.get("slots", 0), len(found) + ready),
        ("names", sorted(n for n in world.network.slots.values() if n), sorted(e.netns for e in found)),
        ("namespaces", len(world.network.slots), len(found) + ready),
        ("rules for ports", len(world.firewall.published), registry.published),
        ("owners", world.firewall.owners, {(e.slot.address, e.uid) for e in found}),
        ("groups", len(world.cgroups.observe()) - ready,
         len([e for e in found if e.slot.cgroup in world.cgroups.groups])),
        ("files of nobody", world.files.observe() - {e.id for e in found}, set()),
        ("names left", held.get("names left", set()) | held.get("second names", set()), set()),
        ("logs that are open", held.get("logs", []), []),
        ("locks of nobody", held.get("locks", {}).keys() - {e.id for e in found}, set()),
    ]
    return lines + [f"{what}: {is_so} and not {should}" for what, is_so, should in expected if is_so != should]
