"""Runs this directory's suite on the real adapters."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.harness import HostNamespace

HERE = Path(__file__).parent


@pytest.mark.root
@pytest.mark.skipif("HARNESS_REAL" in os.environ, reason="this is the run on the disposable host")
@pytest.mark.timeout(180)
def test_real_adapters_pass_the_same_suite(host: HostNamespace) -> None:
    done = host.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                     "--rootdir", str(HERE.parents[1]), "-c", str(HERE.parents[1] / "pyproject.toml"), str(HERE)],
                    env={"HARNESS_REAL": "1", "PYTHONPATH": str(HERE.parents[1])}, timeout=170)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 15
