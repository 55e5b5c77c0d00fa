"""``policy``: who may talk to whom, as NetworkPolicy documents."""

from __future__ import annotations

from typing import Any

import click

from netnsd.client import render
from netnsd.client.app import Verb, VerbGroup
from netnsd.client.arguments import complete_policies
from netnsd.client.session import printable, session_of
from netnsd.client.transport import Client, policy_path

_FIELDS = {"name": str, "owner": dict, "types": list, "selects": list, "document": dict, "created_at": str}


@click.group("policy", cls=VerbGroup, short_help="Say which environments may talk, as NetworkPolicy does.", epilog="""\b
Examples:
  netnsctl policy apply -f policies.yaml
  netnsctl policy ls""")
def policy_verb() -> None:
    """Say which environments and which addresses outside may talk. Without a policy, environments do not."""


@policy_verb.command("apply", cls=Verb, short_help="Have the policies of a file.", epilog="""\b
Examples:
  netnsctl policy apply -f policies.yaml
  netnsctl policy show web -o yaml | netnsctl policy apply -f -""")
@click.option("-f", "--file", required=True, metavar="FILE", help="NetworkPolicy documents, YAML or JSON; - for stdin.")
@click.pass_context
def apply_verb(ctx: click.Context, file: str) -> None:
    """Have the policies that FILE holds, in place of yours of the same names: all of them, or none.

    They are NetworkPolicy documents of networking.k8s.io/v1, where a pod is an environment and a namespace a user. What
    cannot be honoured is refused by its name. They act on what runs when this returns.
    """
    from netnsd.client.documents import read

    session = session_of(ctx)
    policies = _checked_list(session.client, session.client.request("POST", "/v1/policies", {"policies": read(file)}))
    render.emit(session, policies, lambda: "\n".join(_applied(policy) for policy in policies), _names(policies))


@policy_verb.command("ls", cls=Verb, epilog="""\b
Examples:
  netnsctl policy ls
  netnsctl policy ls -o yaml""")
@click.option("-a", "--all", "everyones", is_flag=True, help="Everyone's, with their owners (admins only).")
@click.pass_context
def ls_verb(ctx: click.Context, everyones: bool) -> None:
    """List your policies."""
    session = session_of(ctx)
    answer = session.client.request("GET", "/v1/policies" + ("?all=1" if everyones else ""))
    policies = _checked_list(session.client, answer)
    render.emit(session, policies, lambda: _listing(policies, everyones), _names(policies))


@policy_verb.command("show", cls=Verb, epilog="""\b
Examples:
  netnsctl policy show web
  netnsctl policy show web -o yaml > web.yaml""")
@click.argument("ref", metavar="NAME", shell_complete=complete_policies)
@click.pass_context
def show_verb(ctx: click.Context, ref: str) -> None:
    """Show one policy, NAME or NAME.USER; with -o yaml or -o json the document, as it was applied."""
    session = session_of(ctx)
    policy = _checked(session.client, session.client.request("GET", policy_path(ref)))
    render.emit(session, policy["document"], lambda: _details(policy), [policy["name"]])


@policy_verb.command("rm", cls=Verb, epilog="""\b
Examples:
  netnsctl policy rm web
  netnsctl policy rm web db""")
@click.argument("refs", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_policies)
@click.pass_context
def rm_verb(ctx: click.Context, refs: tuple[str, ...]) -> int:
    """Remove policies. What they let is let no more, and what they forbade may go, when this returns."""
    return render.delete_each(session_of(ctx), refs, policy_path, "removed")


def _checked(client: Client, value: Any) -> dict[str, Any]:
    """An answer that is to be a policy. Raises BadAnswer where it is none."""
    if not (isinstance(value, dict) and all(isinstance(value.get(k), t) for k, t in _FIELDS.items())
            and all(isinstance(name, str) for name in (*value["types"], *value["selects"]))):
        raise client.bad_answer("not a policy")
    assert isinstance(value, dict)
    return value


def _checked_list(client: Client, answer: Any) -> list[dict[str, Any]]:
    found = answer.get("policies") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise client.bad_answer("not a list of policies")
    return [_checked(client, each) for each in found]


def _names(policies: list[dict[str, Any]]) -> list[str]:
    return [str(policy["name"]) for policy in policies]


def _selects(policy: dict[str, Any]) -> str:
    return ", ".join(policy["selects"]) or "-"


def _applied(policy: dict[str, Any]) -> str:
    return printable(f"applied {policy['name']}, for {', '.join(policy['selects']) or 'no environment yet'}")


def _listing(policies: list[dict[str, Any]], with_owner: bool) -> str:
    rows = [["NAME", "LIMITS", "SELECTS", "AGE"] + (["OWNER"] if with_owner else [])]
    rows += [[p["name"], ", ".join(p["types"]), _selects(p), render.age(p["created_at"])]
             + ([render.user_name(p)] if with_owner else []) for p in policies]
    return render.table(rows)


def _details(policy: dict[str, Any]) -> str:
    import yaml

    document = yaml.safe_dump(policy["document"].get("spec") or {}, sort_keys=False).rstrip("\n")
    return render.fields([
        ("Name", printable(policy["name"])), ("Owner", printable(render.user_name(policy))),
        ("Limits", printable(", ".join(policy["types"]))), ("Selects", printable(_selects(policy))),
        ("Applied", printable(f"{policy['created_at']} ({render.age(policy['created_at'])} ago)")),
        ("Spec", "\n".join(printable(line) for line in document.split("\n")))])
