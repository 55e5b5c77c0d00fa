"""``logs`` and ``exec``: what a server said, and commands beside it."""

from __future__ import annotations

import errno
import os
import sys

import click

from netnsd.client.app import EXIT_EXEC_FAILED, CommandVerb, Verb
from netnsd.client.arguments import check_command, circumstances, complete_refs
from netnsd.client.session import session_of
from netnsd.client.transport import environment_path
from netnsd.errors import KernelError, LaunchFailed, NetnsdError

EXIT_NOT_EXECUTABLE = 126
EXIT_NO_COMMAND = 127


@click.command("logs", cls=Verb, short_help="Print what a server wrote.", epilog="""\b
Examples:
  netnsctl logs web
  netnsctl logs -f web
  netnsctl logs --tail 20 --service db shop""")
@click.argument("ref", shell_complete=complete_refs)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until ^C or the service ends.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@click.option("--service", metavar="NAME", help="Which server's, where there are several (default: main).")
@click.pass_context
def logs_verb(ctx: click.Context, ref: str, follow: bool, tail: int | None, service: str | None) -> None:
    """Print what a server wrote to its stdout and stderr, as it wrote it."""
    session = session_of(ctx)
    path = environment_path(ref, "logs", service=service, tail=tail, follow=1 if follow else None)
    for piece in session.client.stream(path):
        if sys.stdout is None:
            return
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


@click.command("exec", cls=CommandVerb, short_help="Run a command in an environment.", epilog="""\b
Examples:
  netnsctl exec web -- bash
  netnsctl exec web -- curl -s localhost:3000
  netnsctl exec -T db -- psql < dump.sql

\b
Exit codes:
  the command's own (128 + n where signal n ended it), and
  125 netnsctl itself failed, 126 not executable, 127 no such command.""")
@click.argument("ref", shell_complete=complete_refs)
@click.option("-t", "--tty", "tty", flag_value=True, type=bool, default=None,
              help="With a terminal (default: when stdin and stdout are terminals).")
@click.option("-T", "--no-tty", "tty", flag_value=False, type=bool, help="Never with a terminal.")
@click.option("-i", "--interactive", is_flag=True, expose_value=False,
              help="Accepted from habit: stdin is always the command's.")
@click.option("-e", "--env", multiple=True, metavar="K=V", help="Set a variable; repeatable.")
@click.option("--clean-env", is_flag=True, help="Only --env, not your own variables.")
@click.option("--cwd", metavar="DIR", help="Run the command there (default: here).")
@click.option("--setuid", is_flag=True, help="Let set-uid programs such as sudo work.")
@click.pass_context
def exec_verb(ctx: click.Context, /, *, ref: str, tty: bool | None, env: tuple[str, ...], clean_env: bool,
              cwd: str | None, setuid: bool) -> int:
    """Run COMMAND in an environment, as you, on your own stdin, stdout and stderr.

    SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on; when netnsctl dies, the command ends too.
    """
    from netnsd.client import attach

    session = session_of(ctx)
    command = check_exec(ctx)
    wants_tty = tty if tty is not None else os.isatty(0) and os.isatty(1)
    try:
        environment_path(ref)
        request = {"ref": ref, "command": check_command(command), "setuid": setuid, "tty": wants_tty,
                   **circumstances(session, env, clean_env, cwd)}
        return attach.run(os.path.join(os.path.dirname(session.socket_path), "attach.sock"), request, wants_tty)
    except LaunchFailed as error:
        session.fail(error)
        return _launch_code(error)
    except BrokenPipeError:
        # Whoever read our terminal's output went away, which is no fault.
        raise
    except (NetnsdError, OSError) as error:
        session.fail(error if isinstance(error, NetnsdError) else KernelError.at("exec", error))
        return EXIT_EXEC_FAILED


def check_exec(ctx: click.Context) -> list[str]:
    """The command to run. Raises a usage error where there is none."""
    command: list[str] = ctx.meta["netnsctl.command"]
    if not command:
        raise click.UsageError("name the command: netnsctl exec REF -- COMMAND.", ctx)
    return command


def _launch_code(error: LaunchFailed) -> int:
    """The exit code that shells give a command which could not be executed."""
    if error.details.get("stage") != "exec":
        return EXIT_EXEC_FAILED
    return EXIT_NO_COMMAND if error.details.get("errno") == errno.errorcode[errno.ENOENT] else EXIT_NOT_EXECUTABLE
