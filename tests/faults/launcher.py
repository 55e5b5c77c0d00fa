"""The launcher with points in it, started as the launcher is. What arms it lies beside its socket's directory."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))
    from tests.faults import planting
    from tests.faults.control import Control

    beside = Path(sys.argv[sys.argv.index("--socket") + 1]).parent.parent
    planting.install(Control(str(beside / "launcher.control")), str(beside / "cache"))
    from netnsd.kernel import launcher

    sys.exit(launcher.main())
