"""``create``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from netnsd.client.app import CommandVerb
from netnsd.client.arguments import RESTART_POLICIES, complete_templates, processors, rate, seconds, size
from netnsd.client.creation import WAIT_SECONDS, create, misuse
from netnsd.client.session import session_of


def specification_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what an environment is to be."""
    for option in reversed((
        click.option("-p", "--port", "ports", multiple=True, metavar="[PUBLISH:]PORT[/udp]",
                     help="Publish a port on the host, at a free number or at PUBLISH; repeatable."),
        click.option("-e", "--env", multiple=True, metavar="K=V", help="Set a variable; repeatable."),
        click.option("--clean-env", is_flag=True, help="Only --env, not your own variables."),
        click.option("--cwd", metavar="DIR", help="Run the command there (default: here)."),
        click.option("-l", "--label", "labels", multiple=True, metavar="K=V", help="Attach a label; repeatable."),
        click.option("--egress", metavar="WHAT",
                     help="What it reaches outside: allow (default), deny, or CIDR[:PORT[-PORT]][/PROTOCOL],..."),
        click.option("--setuid", is_flag=True, help="Let set-uid programs such as sudo work in it."),
        click.option("--restart", type=click.Choice(RESTART_POLICIES), metavar="POLICY",
                     help="Start a server again that ended by itself: no (default), on-failure or always."),
        click.option("--health", metavar="CHECK",
                     help="How to find out whether it works: tcp:PORT, http:PORT/PATH or cmd:COMMAND."),
        click.option("--health-interval", type=seconds, metavar="SECONDS", help="Between two checks (default: 10)."),
        click.option("--health-timeout", type=seconds, metavar="SECONDS", help="Of one check (default: 5)."),
        click.option("--health-retries", type=click.IntRange(min=1), metavar="N",
                     help="So many failures in a row make it unhealthy (default: 3)."),
        click.option("--health-start-period", type=seconds, metavar="SECONDS",
                     help="In which failures do not count (default: 30)."),
        click.option("--memory", type=size, metavar="SIZE",
                     help="At most so much memory, such as 512M: who needs more is ended."),
        click.option("--cpus", "cpu", type=processors, metavar="N",
                     help="At most the time of so many processors, such as 1.5."),
        click.option("--pids", type=click.IntRange(min=1), metavar="N",
                     help="At most so many processes and threads at once."),
        click.option("--bandwidth", type=rate, metavar="RATE",
                     help="At most so many bits per second each way, such as 100M."),
        click.option("--share", metavar="WHO",
                     help="Who else reaches its ports: host, lan, or user:NAME,group:NAME (default: nobody)."),
    )):
        verb = option(verb)
    return verb


@click.command("create", cls=CommandVerb, short_help="Make an environment and start its server.", epilog="""\b
Examples:
  netnsctl create web --port 3000 -- npm run dev
  netnsctl create web --port 20007:3000 --port 53/udp --wait -- ./server
  netnsctl create db --env PGDATA=/srv/db --cwd /srv --label team=shop -- postgres
  netnsctl create api --restart on-failure --health http:3000/healthz --wait -- ./api
  netnsctl create lab
  netnsctl create job --egress 10.1.0.0/16,0.0.0.0/0:443/tcp -- ./job
  netnsctl create web --replace -o name -- python3 -m http.server
  netnsctl create worker --count 20 --label job=7 -- ./worker
  netnsctl create web --template shop --wait""")
@click.argument("name")
@specification_options
@click.option("--template", metavar="NAME", shell_complete=complete_templates,
              help="Make what that template holds; one that is warm is there at once.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="So many, called NAME-1 to NAME-N: all or none.")
@click.option("--wait", "waits", is_flag=True, help="Return when every port has a listener, and it is healthy.")
@click.option("--timeout", type=seconds, metavar="SECONDS", help=f"How long --wait waits (default: {WAIT_SECONDS:g}).")
@click.option("--replace", is_flag=True, help="Remove your environment of that name first.")
@click.pass_context
def create_verb(ctx: click.Context, /, **options: Any) -> None:
    """Make an environment, and run COMMAND in it as you, from here, with your variables, umask and limits.

    Without a command the environment has no server; `netnsctl exec` runs things in it. An environment stays when
    --wait fails: `netnsctl logs NAME` tells why.
    """
    command = ctx.meta["netnsctl.command"]
    if reason := misuse(command, options):
        raise click.UsageError(reason, ctx)
    create(session_of(ctx), command, **options)
