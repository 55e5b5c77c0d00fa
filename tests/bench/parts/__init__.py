"""What is measured: one class each, in the order that they are run in."""

from __future__ import annotations

from tests.bench.parts.burst import Burst
from tests.bench.parts.client import Client
from tests.bench.parts.creating import Cold, Warm, WithService
from tests.bench.parts.data import Data
from tests.bench.parts.delete import Delete
from tests.bench.parts.density import Density
from tests.bench.parts.first200 import First200
from tests.bench.parts.idle import Idle
from tests.bench.parts.owners import Owners
from tests.bench.parts.part import Bench, Part, Sizes

PARTS: dict[str, type[Part]] = {part.name: part for part in (
    Cold, Warm, WithService, First200, Client, Data, Owners, Burst, Idle, Delete, Density)}

__all__ = ["PARTS", "Bench", "Part", "Sizes"]
