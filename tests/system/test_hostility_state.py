"""A state file that is damaged while the daemon is down: it says so, and does nothing with what it is told."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness import ALICE, Daemon, HostNamespace
from tests.system.api import COMMAND
from tests.system.clients import ask, echo_server, is_gone, main_of, published


def _with_sql(statement: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with closing(sqlite3.connect(file)) as database:
            database.execute(statement)
            database.commit()

    return damage


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for place in range(4096, len(data), 512):
        data[place:place + 64] = bytes(byte ^ 0x5A for byte in data[place:place + 64])
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a namespace elsewhere": _with_sql("UPDATE environments SET netns = '../../etc/passwd'"),
    "a removal of what lies elsewhere": _with_sql("UPDATE environments SET id = '../../../etc', state = 'removing'"),
    "a command of root's": _with_sql("UPDATE services SET command = replace(command, '61001', '0')"),
    "bytes": _flip,
    "half of it": lambda file: os.truncate(file, file.stat().st_size // 2),
}


@pytest.mark.timeout(120)
def test_a_damaged_state_file_is_refused_and_what_runs_is_left_alone(host: HostNamespace, tmp_path: Path) -> None:
    with Daemon(host) as daemon:
        web = daemon.create_json("web", *echo_server("web", 3000), user=ALICE, ports=[3000], wait=True)
        daemon.ctl("template", "add", "shop", "--", *COMMAND, user=ALICE, check=True)
        assert daemon.stop() == 0
        file = host.path(f"{daemon.state_dir}/netnsd.db")
        whole, damaged = tmp_path / "whole", tmp_path / "damaged"
        shutil.copy(file, whole)
        accounts = host.path("/etc/passwd").read_bytes()
        before = host.run(["sh", "-c", "ip -o link; ip netns; find /run/netns /run/test/d/run"], check=True).stdout
        for what, damage in DAMAGES.items():
            shutil.copy(whole, damaged)  # as SQLite follows links, of which /proc/PID/root is none
            damage(damaged)
            shutil.copyfile(damaged, file)
            told = len(daemon.log())
            with pytest.raises(AssertionError, match="the daemon ended with 1 at its start"):
                daemon.start()
            said = daemon.log()[told:]
            assert "the state file" in said, (what, said)
            assert "hint: " in said, (what, said)
            assert "Traceback" not in said, (what, said)
            assert not is_gone(main_of(web)["pid"]), what
            assert ask(host, "tcp", "127.0.0.1", published(web), user=ALICE) == "web heard hello", what
            now = host.run(["sh", "-c", "ip -o link; ip netns; find /run/netns /run/test/d/run"], check=True).stdout
            assert now.replace(str(daemon.pid), "") == before, what
            for name in ("netnsd.db", "netnsd.db-wal", "netnsd.db-shm"):
                host.path(f"{daemon.state_dir}/{name}").unlink(missing_ok=True)
        shutil.copyfile(whole, file)
        assert host.path("/etc/passwd").read_bytes() == accounts
        daemon.start()
        assert daemon.ctl_json("show", "web", user=ALICE) == web
        daemon.ctl("rm", "web", user=ALICE, check=True)
