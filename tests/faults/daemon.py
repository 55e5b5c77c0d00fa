"""``netnsd serve`` with points in it, as often as it is asked for: daemon.py CONTROL CACHE serve ...

Each line of stdin, ``{"env", "log"}``, forks one, which is what saves importing everything each time. Each line of
stdout is the pid of one that began, or its pid and how it ended.
"""

from __future__ import annotations

import json
import os
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def become(main: Callable[[], None], order: dict[str, Any]) -> int:
    """Be the daemon, in a fork; returns its exit code."""
    os.dup2(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), 0)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for target in (1, 2):
        os.dup2(log, target)
    os.environ.update(order["env"])
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BaseException:  # as the interpreter does  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0


def serve(main: Callable[[], None]) -> None:
    """Fork when told, and tell of ends. What has ended is waited for at the next start: its pid stays its own."""
    living: dict[int, int] = {}
    ended: list[int] = []
    while True:
        readable, _, _ = select.select([0, *living], [], [])
        for handle in readable:
            if handle:
                pid = living.pop(handle)
                result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                assert result is not None
                code = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
                os.close(handle)
                ended.append(pid)
                print(pid, code, flush=True)
                continue
            line = os.read(0, 65536).decode()  # one at a time
            if not line:
                return
            while ended:
                os.waitpid(ended.pop(), 0)
            pid = os.fork()
            if pid == 0:
                for other in living:
                    os.close(other)
                code = become(main, json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            living[os.pidfd_open(pid)] = pid
            print(pid, flush=True)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    from tests.faults import planting
    from tests.faults.control import Control

    planting.install(Control(sys.argv[1]), sys.argv[2])
    from netnsd.daemon.main import main as netnsd
    from netnsd.kernel import launcher

    launcher.__file__ = str(Path(__file__).with_name("launcher.py"))
    sys.argv[:3] = ["netnsd"]
    serve(netnsd)
