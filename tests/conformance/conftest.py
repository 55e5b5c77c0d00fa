"""Each promise of ``core.interfaces`` is tested on the fakes, and in a disposable host on the real adapters.

``test_on_disposable_host`` runs this directory again with ``HARNESS_REAL`` set, in a network and mount namespace that
are thrown away; only then do the real ones take part.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.conformance.subjects import FakeSubjects, RealSubjects, Subjects

IS_REAL = "HARNESS_REAL" in os.environ


@pytest.fixture(params=["real"] if IS_REAL else ["fake"])
async def subjects(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subjects]:
    async with AsyncExitStack() as stack:
        kind = RealSubjects if request.param == "real" else FakeSubjects
        yield await stack.enter_async_context(kind.opened(tmp_path))


if IS_REAL:
    @pytest.fixture(scope="session", autouse=True)
    def _machine_is_left_as_it_was() -> None:
        """The disposable host goes as a whole, and the run outside looks at the machine."""
