"""Faults that were found in this way, and mended. They are tried each time."""

from __future__ import annotations

from tests.faults.campaign import ALL
from tests.faults.trials import Trial

_BY_NAME = {path.name: path for path in ALL}


def _fails(path: str, point: str, what: str, *, at: int = 1, persists: bool = False) -> Trial:
    return Trial(_BY_NAME[path], point, at, what, persists)


FOUND = (
    # A daemon that could not read its state took everything for unused, and removed bridges and rules under servers.
    _fails("start of the daemon", "store.SqliteStore.environments:self._db.execute", "full"),
    # What could not be removed at the end kept all else from being removed, and was told by a traceback.
    _fails("last stop of the daemon", "kernel.network.KernelNetwork._close:self._pins.rmdir", "EBUSY"),
    # What was born in a group that had been killed as a whole, and was not removed, was killed at once: for ever.
    Trial(_BY_NAME["stop"], "kernel.cgroup._remove_tree:os.rmdir", 1),
    Trial(_BY_NAME["restart"], "kernel.cgroup._remove_tree:os.rmdir", 1),
    # The file of a name that a stock's environment was about to get stayed, and took the name.
    Trial(_BY_NAME["claim of a template"], "kernel.namespace_thread.bind:libc.mount", 1),
    # The transaction stayed open, and nothing could be written any more.
    _fails("create", "store.SqliteStore.transaction:self._db.execute#2", "full"),
    # The thread died in another namespace, and everything waited for it.
    _fails("create", "kernel.namespace_thread.NamespaceThread.start.call:libc.setns", "ENOMEM"),
    # The pin went before the name, which nobody knew to be ours then.
    _fails("create in vain", "kernel.survey.is_namespace:os.stat", "ENOMEM", persists=True),
    # A file that cannot be removed was tried for ever, without a pause.
    _fails("create in vain", "kernel.namespace_thread.unpin:os.unlink", "EBUSY", persists=True),
    # A fault in netnsd was told instead of the error.
    _fails("create", "kernel.sockets.is_listening:socket.socket", "EMFILE"),
    _fails("create", "kernel.processes.LauncherProcesses._order:os.dup", "EMFILE"),
    _fails("stop", "kernel.cgroup._groups:os.scandir", "EMFILE"),
    # The daemon ended.
    _fails("create", "kernel._messages.receive:connection.recvmsg", "ECONNRESET"),
    _fails("create in vain", "kernel.cgroup.CgroupTree.run:os.read", "ENOMEM"),
    # A bridge whose settings could not be written was there, and not known to be: the next creation failed as well.
    _fails("first create", "kernel.bridges._write:path.write_text", "ENOSPC"),
    # A daemon that was out of descriptors for a moment, as it began to watch names, ended.
    _fails("start of the daemon", "kernel.loss_watch.names:libc.inotify_init1", "EMFILE"),
    # A look at the state file that failed ended the daemon.
    _fails("repair of the state", "store._identity:os.stat", "ENOMEM", at=2),
)
