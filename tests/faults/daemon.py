"""``netnsd serve`` with points in it: daemon.py CONTROL CACHE serve ..."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    from tests.faults import planting
    from tests.faults.control import Control

    planting.install(Control(sys.argv[1]), sys.argv[2])
    from netnsd.daemon.main import main
    from netnsd.kernel import launcher

    launcher.__file__ = str(Path(__file__).with_name("launcher.py"))
    sys.argv[:3] = ["netnsd"]
    main()
