"""``info`` and ``completion``: what the daemon is, and the shell's help."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import PROGRAM, Verb, cli
from netnsd.client.session import printable, session_of


@click.command("info", cls=Verb, epilog="""\b
Examples:
  netnsctl info
  netnsctl info -o json""")
@click.pass_context
def info_verb(ctx: click.Context) -> None:
    """Show what the daemon is and what it holds."""
    session = session_of(ctx)
    info = session.client.request("GET", "/v1/info")
    if not isinstance(info, dict):
        raise session.client.bad_answer("not what info is")
    render.emit(session, info, lambda: render.fields([(_title(key), _shown(value)) for key, value in info.items()]),
                [str(info.get("version", ""))])


def _title(key: str) -> str:
    return printable(key.replace("_", " ").capitalize())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{printable(str(k))}: {_shown(v)}" for k, v in value.items()) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(str(value))


@click.command("completion", cls=Verb, short_help="Print a completion script for your shell.", epilog="""\b
Examples:
  netnsctl completion bash > ~/.local/share/bash-completion/completions/netnsctl
  source <(netnsctl completion zsh)
  netnsctl completion fish > ~/.config/fish/completions/netnsctl.fish""")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_verb(shell: str) -> None:
    """Print a script that completes verbs, options and your environments' names."""
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(cli, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source())
