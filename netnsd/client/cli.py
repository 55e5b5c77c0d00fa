"""The entry point of ``netnsctl``: everything else is imported below it, so that ^C is quiet from the first moment."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


def main() -> int:
    """Run ``netnsctl`` with the process's arguments; returns its exit code."""
    sys.excepthook = _last_resort
    try:
        return _run(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


def _run(args: list[str]) -> int:
    from netnsd.client import quick

    code = quick.run(args)
    if code is None:
        from netnsd.client import app

        code = app.run(args)
    return code


def _last_resort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What nobody expected is one line; NETNSCTL_DEBUG=1 shows where it happened."""
    import os

    if os.environ.get("NETNSCTL_DEBUG"):
        sys.__excepthook__(kind, error, trace)
        return
    if issubclass(kind, KeyboardInterrupt) or sys.stderr is None:
        return
    sys.stderr.write(f"netnsctl: a fault in netnsctl itself: {kind.__name__}: {str(error)!r}\n"
                     "  hint: run it again with NETNSCTL_DEBUG=1 and report what it prints\n")
