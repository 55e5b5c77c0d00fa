"""The ``netnsctl`` group: global options before and after the verb, verbs imported when called, one way to fail."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import click
from click.exceptions import Exit, NoArgsIsHelpError

import netnsd
from netnsd.client.session import OUTPUTS, Session, guarded, interrupted, io_failed, session_of
from netnsd.errors import InvalidRequest, NetnsdError

PROGRAM = "netnsctl"
EXIT_EXEC_FAILED = 125

# Verb: the module of netnsd.client that has it. A listing pays for its own verb alone.
_VERBS = {
    "create": "creating",
    "ls": "listing",
    "show": "listing",
    "logs": "streams",
    "exec": "streams",
    "start": "lifecycle",
    "stop": "lifecycle",
    "restart": "lifecycle",
    "rm": "removing",
    "wait": "lifecycle",
    "share": "changing",
    "label": "changing",
    "events": "events",
    "template": "templates",
    "policy": "policies",
    "pool": "pools",
    "token": "tokens",
    "quota": "quotas",
    "info": "host",
    "doctor": "doctor",
    "prune": "doctor",
    "completion": "host",
}


def set_output(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Keep ``-o`` in the session."""
    if value is not None:
        session_of(ctx).output = value


def set_socket(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Keep ``--socket`` in the session."""
    if value is not None:
        session_of(ctx).socket = value


def show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Print the version and end."""
    if value and not ctx.resilient_parsing:
        click.echo(f"{PROGRAM} {netnsd.__version__}")
        ctx.exit()


def global_options() -> list[click.Parameter]:
    """The options that the group and every verb take."""
    return [
        click.Option(["-o", "--output"], type=click.Choice(OUTPUTS), callback=set_output, expose_value=False,
                     help="How to print: table (default), json, yaml, or name."),
        click.Option(["--socket"], metavar="PATH", callback=set_socket, expose_value=False,
                     help="The daemon's socket (default: $NETNSD_SOCKET, else /run/netnsd/netnsd.sock)."),
        click.Option(["--version"], is_flag=True, is_eager=True, callback=show_version, expose_value=False,
                     help="Show the version and exit."),
    ]


class Verb(click.Command):
    """A command that takes the global options too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {"help_option_names": ["-h", "--help"]}
        super().__init__(*args, **kwargs)
        self.params.extend(global_options())


class CommandVerb(Verb):
    """A verb whose second positional argument, or what follows ``--``, begins somebody's command line.

    Options before it are ours, and all after it is the command's, ``--`` included.
    """

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What the usage line names."""
        return [*super().collect_usage_pieces(ctx), "[--] COMMAND..." if self.name == "exec" else "[-- COMMAND...]"]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Cut the command off before click sees its options."""
        at = self._command_at(ctx, args)
        ours, command = args[:at], args[at:]
        ctx.meta["netnsctl.command"] = command[1:] if command[:1] == ["--"] else command
        return super().parse_args(ctx, ours)

    def _command_at(self, ctx: click.Context, args: list[str]) -> int:
        """The index at which the command begins."""
        takes_value = {name for param in self.get_params(ctx) if isinstance(param, click.Option) and not param.is_flag
                       for name in param.opts}
        positionals, skip = 0, False
        for index, arg in enumerate(args):
            if skip:
                skip = False
            elif arg == "--":
                return index
            elif arg.startswith("--"):
                skip = arg in takes_value
            elif arg.startswith("-") and len(arg) > 1:
                # In a cluster such as -To, a letter that takes a value takes the rest, or the next argument.
                first = next((i for i, c in enumerate(arg) if i and f"-{c}" in takes_value), None)
                skip = first == len(arg) - 1
            else:
                positionals += 1
                if positionals == 2:
                    return index
        return len(args)


class VerbGroup(click.Group):
    """Verbs of one noun, such as ``template add``. It takes the global options too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {"help_option_names": ["-h", "--help"]}
        super().__init__(*args, **kwargs)
        self.params.extend(global_options())

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        """Its verbs, in the order in which they were added."""
        return list(self.commands)


class Netnsctl(click.Group):
    """The group. ``main`` prints every failure as one line with a hint, and picks the exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        """All verbs, in the order in which help lists them."""
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the verb's module."""
        if cmd_name not in _VERBS:
            return None
        command = getattr(importlib.import_module(f"netnsd.client.{_VERBS[cmd_name]}"), f"{cmd_name}_verb")
        assert isinstance(command, click.Command)
        return command

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
             standalone_mode: bool = True, windows_expand_args: bool = True, **extra: Any) -> Any:
        """Run, and exit with the code (``standalone_mode``) or return it. Its name is always netnsctl."""
        del prog_name, windows_expand_args
        code = self._run(list(sys.argv[1:] if args is None else args), complete_var, extra)
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, args: list[str], complete_var: str | None, extra: dict[str, Any]) -> int:
        session = extra.setdefault("obj", Session())
        return guarded(session, lambda: self._invoke(args, complete_var, extra, session))

    def _invoke(self, args: list[str], complete_var: str | None, extra: dict[str, Any], session: Session) -> int:
        try:
            code = super().main(args, PROGRAM, complete_var, standalone_mode=False, **extra)
        except NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            return error.exit_code
        except click.UsageError as error:
            session.output = session.output or _asked_output(args)
            session.fail(_usage(error))
            return EXIT_EXEC_FAILED if error.ctx and error.ctx.command.name == "exec" else error.exit_code
        except click.Abort:
            return interrupted()
        return code if isinstance(code, int) else 0

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb. click would print a line of its own for ^C, and call a closed pipe a failure."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise Exit(io_failed(error, session_of(ctx))) from None
        except KeyboardInterrupt:
            raise click.Abort from None


def _usage(error: click.UsageError) -> NetnsdError:
    path = error.ctx.command_path if error.ctx else PROGRAM
    return InvalidRequest(error.format_message(), hint=f"`{path} --help` has examples.")


def _asked_output(args: list[str]) -> str | None:
    """The output format that a command line asks for which could not be parsed."""
    ours = args[:args.index("--")] if "--" in args else args
    asked = any(a in ("-ojson", "-o=json", "--output=json") for a in ours) or any(
        pair in (("-o", "json"), ("--output", "json")) for pair in itertools.pairwise(ours))
    return "json" if asked else None


cli = Netnsctl(
    name=PROGRAM,
    params=global_options(),
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Dev servers in network namespaces of their own, each at its own port.

    An environment is a named network namespace with an address, published ports on localhost, and the servers that
    run in it as you.

    \b
    Examples:
      netnsctl create web --port 3000 -- npm run dev
      netnsctl ls
      netnsctl logs -f web
      netnsctl exec web -- bash
      netnsctl rm web

    \b
    Exit codes:
      0 done, 1 failed, 2 wrong usage or value, 3 no daemon or no room,
      4 no such environment, 5 conflict, 6 timeout, 7 not allowed, 130 ^C.
      `exec` and `wait --for exit` pass the command's own code through.
    """,
)


def run(args: list[str]) -> int:
    """Run ``netnsctl`` with these arguments; returns its exit code."""
    code = cli.main(args, standalone_mode=False)
    assert isinstance(code, int)
    return code
