"""``netnsd dismantle``: everything of netnsd's goes while no daemon runs, and nothing while one does."""

from __future__ import annotations

import pytest
import trio
from click.testing import CliRunner

from netnsd.daemon import main
from netnsd.observability import logs
from tests.harness import ALICE, BOB, Daemon, HostNamespace, Snapshot, settle
from tests.harness.daemon import program

SERVER = ("python3", "-m", "http.server", "3000")


def dismantle(daemon: Daemon) -> tuple[int, str]:
    command = [program("netnsd"), "dismantle", "--config", daemon.config_file, "--runtime-dir", daemon.runtime_dir,
               "--state-dir", daemon.state_dir]
    done = daemon.host.run(command)
    return done.returncode, done.stdout + done.stderr


def test_nothing_is_left_of_what_a_killed_daemon_had(host: HostNamespace) -> None:
    daemon = Daemon(host, config={"pool": {"size": 3}})
    before = Snapshot.of_host(host)
    with daemon:
        daemon.create_json("web", *SERVER, user=ALICE, ports=[3000], wait=True, options=["--restart", "always"])
        daemon.create_json("web", user=BOB)
        daemon.ctl("template", "add", "kept", "--", "true", user=BOB, check=True)
        daemon.kill()
        assert dismantle(daemon) == (0, "")
        assert settle(before, lambda: Snapshot.of_host(host), ignore=("files", "mounts")) == []
        assert not host.path(f"{daemon.runtime_dir}/slots").exists()
        daemon.start()
        assert daemon.ctl_json("ls", "--all") == []
        assert [template["name"] for template in daemon.ctl_json("template", "ls", user=BOB)] == ["kept"]


def test_a_running_daemon_is_let_be(daemon: Daemon) -> None:
    daemon.create_json("web", *SERVER, user=ALICE, ports=[3000], wait=True)
    code, said = dismantle(daemon)
    assert (code, "already" in said or "another" in said) == (75, True)
    assert daemon.ctl_json("show", "web", user=ALICE)["state"] == "running"


def test_only_root_may(host: HostNamespace) -> None:
    assert host.run([program("netnsd"), "dismantle"], user=ALICE).returncode == 77


def test_what_is_left_is_said_and_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left:
        left = ("the bridge ndbr0: Device or resource busy",)

        def __init__(self, *_: object, **__: object) -> None: ...

        async def run(self) -> None:
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(main, "Node", Left)
    monkeypatch.setattr(logs, "configure", lambda _level: None)
    done = CliRunner().invoke(main.main, ["dismantle"])
    assert (done.exit_code, "ndbr0: Device or resource busy" in done.output) == (1, True), done
