"""``netnsd serve``: reads the configuration, joins the rooms, and runs until it is told to stop."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click
import msgspec
import structlog
import trio

from netnsd import __version__
from netnsd.daemon import config as configuration
from netnsd.daemon.node import Node
from netnsd.daemon.systemd import Notifier, listening_sockets
from netnsd.errors import HostUnfit, KernelError, NetnsdError, NotRoot
from netnsd.kernel import launcher as launcher_module
from netnsd.observability import logs

_SWITCH_SECONDS = 0.0005
_log = structlog.get_logger()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="netnsd")
def main() -> None:
    """Hand out network namespaces with servers in them, to many users of one host."""


def _places(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where things are."""
    for option in (
        click.option("--state-dir", type=click.Path(path_type=Path), default=Path("/var/lib/netnsd"),
                     show_default=True, metavar="DIR", help="The state file and logs."),
        click.option("--runtime-dir", type=click.Path(path_type=Path), default=Path("/run/netnsd"), show_default=True,
                     metavar="DIR", help="Sockets and pins; gone after a reboot."),
        click.option("--config", "file", type=click.Path(path_type=Path), metavar="FILE",
                     help="Configuration (TOML). Default: /etc/netnsd/netnsd.toml where it exists."),
    ):
        command = option(command)
    return command


@main.command()
@_places
@click.option("--external-launcher", is_flag=True,
              help="Neither start nor end the launcher: a unit of its own does, and holds its socket.")
def serve(file: Path | None, runtime_dir: Path, state_dir: Path, *, external_launcher: bool) -> None:
    """Run the daemon in the foreground. It needs root."""
    node: Node | None = None
    try:
        _require_root("serve")
        config = configuration.load(file, os.environ)
        logs.configure(config.daemon.log_level)
        notifier, passed = Notifier(os.environ), listening_sockets(os.environ)
        os.umask(0o022)
        node = Node(config, runtime_dir.absolute(), state_dir.absolute(), passed,
                    starts_launcher=not external_launcher)
        # The thread that wires needs the interpreter between any two system calls, and would wait up to 5 ms for it.
        sys.setswitchinterval(_SWITCH_SECONDS)
        trio.run(_run, node, notifier, config.daemon.grace_seconds)
    except (NetnsdError, OSError, BaseExceptionGroup) as error:
        _fail(error, is_start=node is None or not node.is_ready)


@main.command()
@_places
def dismantle(file: Path | None, runtime_dir: Path, state_dir: Path) -> None:
    """Remove every environment and all else of netnsd's from the kernel, while no daemon runs. It needs root.

    Templates stay in the state file.
    """
    try:
        _require_root("dismantle")
        config = configuration.load(file, os.environ)
        config = msgspec.structs.replace(config, pool=configuration.Pool(size=0, most=0))
        logs.configure("warning")
        node = Node(config, runtime_dir.absolute(), state_dir.absolute(), {}, starts_launcher=True, dismantles=True)
        trio.run(node.run)
        if node.left:
            raise KernelError(f"something is left: {'; '.join(node.left)}", hint="Run it again, or restart the host.")
    except (NetnsdError, BaseExceptionGroup) as error:
        _fail(error)


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launcher(arguments: tuple[str, ...]) -> None:
    """Become the launcher, which starts servers and outlives the daemon. For its systemd unit."""
    os.execv(sys.executable, [  # noqa: S606  our own interpreter and file, no shell wanted
        sys.executable, "-I", "-S", "-X", "utf8", launcher_module.__file__, *arguments])


async def _run(node: Node, notifier: Notifier, grace_seconds: float) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as background, trio.open_nursery() as nursery:
            await nursery.start(node.run)
            notifier.send("READY=1")
            _log.info("ready", version=__version__, pid=os.getpid(), kernel=platform.release(),
                      environments=len(node.environments.registry))
            if notifier.watchdog_seconds is not None:
                background.start_soon(_watchdog, notifier, notifier.watchdog_seconds / 3)
            async for number in signals:
                if number != signal.SIGHUP:
                    break
                background.start_soon(node.check)
            notifier.send("STOPPING=1")
            _log.info("stopping", environments=len(node.environments.registry))
            await node.stop(grace_seconds)
            background.cancel_scope.cancel()
    _log.info("stopped")


async def _watchdog(notifier: Notifier, every_seconds: float) -> None:
    while True:
        notifier.send("WATCHDOG=1")
        await trio.sleep(every_seconds)


def _require_root(verb: str) -> None:
    if os.geteuid() != 0:
        raise NotRoot(f"netnsd {verb} needs root: it makes network namespaces and starts servers as their owners",
                      hint=f"sudo netnsd {verb}" + (", or systemctl start netnsd." if verb == "serve" else "."))


def _fail(error: BaseException, *, is_start: bool = False) -> NoReturn:
    """Say the one thing that is wrong, and end. What is not ours to explain keeps its traceback.

    At the start, an error of a system call is the host's: it is out of descriptors, of memory, or of room.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, OSError) and is_start:
        error = HostUnfit(f"the daemon cannot start: {error}", hint="Is the host out of descriptors, memory or room?")
    if not isinstance(error, NetnsdError):
        raise error
    hint = f"\n  hint: {error.hint}" if error.hint else ""
    click.echo(f"netnsd: {error.message}{hint}", err=True)
    sys.exit(error.exit_code)
