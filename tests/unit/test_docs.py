"""README and what it leads to are true: everything there is, is documented, and nothing is that there is not."""

from __future__ import annotations

import ast
import inspect
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

import netnsd
from netnsd import errors, wire
from netnsd.api import tcp
from netnsd.api.routes import ROUTES
from netnsd.client import app, session, streams, transport
from netnsd.core import launching, specification, templates
from netnsd.core.addressing import Plan
from netnsd.core.environment import Environment, PublishedPort
from netnsd.daemon import main as daemon
from netnsd.daemon.config import Config
from netnsd.observability.metrics import Figures, Metrics

CHECKOUT = Path(__file__).parents[2]
PAGES = sorted([CHECKOUT / "README.md", CHECKOUT / "CHANGELOG.md", *(CHECKOUT / "docs").rglob("*.md")])
SCRIPTS = sorted(path for path in (CHECKOUT / "scripts").rglob("*") if path.is_file())
# Where things of the running system are; anything else would be somebody's own machine.
SYSTEM_PATHS = re.compile(r"/(bin|dev|etc|opt|proc|run|sbin|srv|sys|tmp|usr|var|v1|api/environments)\b"
                          r"|/(openapi\.json|path/to)\b")


@cache
def readme() -> str:
    return (CHECKOUT / "README.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """The text below a heading, given with its #s, to the next heading of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    parts = re.split(rf"(?m)^(?=#{{1,{level}}} )", without_code(readme()))
    found = [part for part in parts if re.match(re.escape(heading) + r"(?![\w`-])", part)]
    assert len(found) == 1, f"{heading!r} is there {len(found)} times"
    return found[0]


def without_code(text: str) -> str:
    """Code blocks have lines that begin with #."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in a text, without the headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    kept = [row for row, after in zip(cells, [*cells[1:], []], strict=True)
            if not set("".join(row)) <= set("- :") and not (after and set("".join(after)) <= set("-: "))]
    assert kept, "there is no table"
    return kept


def code(cell: str) -> str:
    """The only `code` in a cell."""
    found = re.findall(r"`([^`]*)`", cell)
    assert len(found) == 1, cell
    return str(found[0])


def unique(names: list[str]) -> set[str]:
    assert len(names) == len(set(names)), f"documented twice: {sorted(n for n in names if names.count(n) > 1)}"
    return set(names)


# -- command lines ----------------------------------------------------------------------------------------------


def verbs(group: click.Group, prefix: str) -> dict[str, click.Command]:
    """All verbs by their whole name; those of a noun are `template add`, and the noun alone is none."""
    context = click.Context(group)
    found: dict[str, click.Command] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            found |= verbs(command, f"{prefix}{name} ")
        elif command is not None:
            found[prefix + name] = command
    return found


CLIENT_VERBS = verbs(app.cli, "")
DAEMON_VERBS = verbs(daemon.main, "netnsd ")
ALL_VERBS = CLIENT_VERBS | DAEMON_VERBS


def options(command: click.Command) -> set[str]:
    return {name for param in command.params if isinstance(param, click.Option) for name in param.opts}


def documented_options(text: str) -> set[str]:
    return unique([name for row in rows(text) for name in re.findall(r"`(--?\w[\w-]*)", row[0])])


def test_every_verb_is_documented_and_no_other() -> None:
    headings = re.findall(r"(?m)^#### `([^`]+)`", section("## CLI"))
    assert unique(headings) == set(ALL_VERBS)


@pytest.mark.parametrize("verb", sorted(ALL_VERBS))
def test_every_option_of_a_verb_is_documented_and_no_other(verb: str) -> None:
    text = section(f"#### `{verb}`")
    own = options(ALL_VERBS[verb]) - (global_options() if verb in CLIENT_VERBS else set())
    assert (documented_options(text) if "\n|" in text else set()) == own


def global_options() -> set[str]:
    return {name for option in app.global_options() for name in option.opts}


def test_global_options_are_documented() -> None:
    assert documented_options(section("#### Global options")) == global_options() | {"-h", "--help"}


def test_outputs_are_documented() -> None:
    (row,) = (row for row in rows(section("#### Global options")) if "--output" in row[0])
    assert set(re.findall(r"`(\w+)`", row[1])) == set(session.OUTPUTS)


def test_exit_codes_are_documented_and_no_other() -> None:
    documented = unique([row[0] for row in rows(section("### Exit codes"))])
    known = {0, session.EXIT_INTERRUPTED, session.EXIT_BROKEN_PIPE, app.EXIT_EXEC_FAILED, streams.EXIT_NOT_EXECUTABLE,
             streams.EXIT_NO_COMMAND, *(kind.exit_code for kind in error_classes())}
    assert documented == {str(number) for number in known}


def test_variables_that_the_client_reads_are_documented_and_no_other() -> None:
    read = {name for path in (CHECKOUT / "netnsd" / "client").glob("*.py")
            for name in re.findall(r"environ(?:\.get\(|\[)[\"'](\w+)", path.read_text(encoding="utf-8"))}
    documented = unique([code(row[0]) for row in rows(section("### Variables that the client reads"))])
    assert documented == read


def test_variables_that_a_server_finds_are_documented_and_no_other() -> None:
    environment = Environment(
        id="i", name="n", uid=1, user="u", slot=Plan("10.0.0.0/16", 250).slot(0), netns="n", labels={}, share="owner",
        created_at="", boot_id="", ports=(PublishedPort(3000, "tcp", 20000),))
    given = {**launching.conveniences(environment), **launching.facts(environment)}
    documented = unique([code(row[0]) for row in rows(section("### Environment, directory, limits"))])
    assert documented == set(given)


# -- configuration ----------------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    return {f"[{part.name}] {key.name}": default_of(key) for part in msgspec.structs.fields(Config)
            for key in msgspec.structs.fields(part.type)}


def test_every_setting_is_documented_with_its_default_and_no_other() -> None:
    documented = {code(row[0]): row[1] for row in rows(section("## Configuration"))}
    assert len(documented) == len(rows(section("## Configuration")))
    assert documented == {key: "unset" if value is None else f"`{json.dumps(value)}`"
                          for key, value in settings().items()}


def test_documented_defaults_are_a_configuration() -> None:
    tree: dict[str, dict[str, Any]] = {}
    for row in rows(section("## Configuration")):
        name, _, key = code(row[0]).removeprefix("[").partition("] ")
        if row[1] != "unset":
            tree.setdefault(name, {}).update(tomllib.loads(f"{key} = {code(row[1])}"))
    assert msgspec.convert(tree, Config) == Config()


# -- the API ----------------------------------------------------------------------------------------------------


def test_every_route_is_documented_with_its_parameters_and_no_other() -> None:
    routes = [row for row in rows(section("## HTTP API")) if row[0] in ("GET", "POST", "DELETE", "PUT", "PATCH")]
    documented = {(row[0], code(row[1])): set(re.findall(r"`(\w+)`", row[2])) for row in routes}
    assert len(documented) == len(routes)
    assert documented == {**{(route.method, route.path): set(route.query) for route in ROUTES},
                          ("GET", "/openapi.json"): set()}


def test_every_field_of_a_creation_is_documented_with_its_default_and_no_other() -> None:
    fields = {field.name: field for field in msgspec.structs.fields(wire.CreateRequest)}
    documented = {code(row[0]): row[1] for row in rows(section("## HTTP API")) if row[0].startswith("`")}
    assert set(documented) == set(fields)
    shown = {name: json.dumps(default) for name, field in fields.items() if (default := default_of(field)) is not None}
    assert {name: code(cell) for name, cell in documented.items() if cell} == shown


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default


@pytest.mark.parametrize(("name", "kind"), [("services", wire.ServiceRequest), ("ports", wire.PortRequest),
                                           ("resources", wire.Resources)])
def test_fields_inside_a_creation_are_documented(name: str, kind: type[msgspec.Struct]) -> None:
    (row,) = (row for row in rows(section("## HTTP API")) if row[0] == f"`{name}`")
    documented = re.findall(r'"(\w+)"', re.findall(r"`(\{.*?\})`", row[2])[0])
    assert unique(documented) == {field.name for field in msgspec.structs.fields(kind)}


@pytest.mark.parametrize(("method", "path", "kind"), [("POST", "/v1/templates", wire.TemplateRequest),
                                                      ("PATCH", "/v1/pools/slots", wire.PoolRequest),
                                                      ("POST", "/v1/tokens", wire.TokenRequest),
                                                      ("POST", "/api/environments/start", wire.ProjectRequest),
                                                      ("PUT", "/v1/quotas/{user}", wire.QuotaRequest)])

def test_fields_of_other_requests_are_documented(method: str, path: str, kind: type[msgspec.Struct]) -> None:
    (row,) = (row for row in rows(section("## HTTP API")) if row[:2] == [method, f"`{path}`"])
    documented = re.findall(r'"(\w+)"', re.findall(r"`(\{.*?\})`", row[3])[0])
    assert unique(documented) == {field.name for field in msgspec.structs.fields(kind)}


def test_a_template_holds_what_a_creation_has_beside_what_the_readme_names() -> None:
    (sentence,) = re.findall(r"The specification of a template is the same, without ([^.]*)\.", section("## HTTP API"))
    creation, held = ({field.name for field in msgspec.structs.fields(kind)}
                      for kind in (wire.CreateRequest, wire.Specification))
    assert unique(re.findall(r"`(\w+)`", sentence)) == creation - held


def test_bounds_of_many_and_of_warm_ones_are_documented() -> None:
    assert f"so many, 1 to {specification.MAX_COUNT}, " in section("## HTTP API")
    assert f"at most {templates.MOST_WARM} |" in section("#### `template add`")
    assert f"asks again, for {transport.PATIENCE_SECONDS:g} seconds" in section("## How to")


def test_bounds_of_who_is_unknown_are_documented() -> None:
    text = " ".join(section("## Security, in short").split())
    assert (f"{tcp.UNKNOWN_OF_ONE_ADDRESS} of one address, {tcp.UNKNOWN_IN_ALL} in all, "
            f"{tcp.UNKNOWN_SECONDS:g} seconds; of one address {tcp.HANDSHAKES_PER_SECOND:g} handshakes") in text


def test_every_metric_is_documented_and_no_other() -> None:
    pool = wire.Pool(name="slots", size=0, target=0, ready=0, claimed=0, missed=0, reason="")
    figures = Figures(states={"running": 0}, published_ports=0, addresses_free=0, pools=[pool], creations_under_way=0,
                      creations_waiting=0, creations_refused=0, services={"running": 0}, health={"healthy": 0},
                      restarts=0)
    told = set(re.findall(r"(?m)^(netnsd_\w+)", Metrics(lambda: figures).text().decode()))
    paragraph = re.search(r"(?ms)^Metrics: (.*?)\n\n", section("## HTTP API"))
    assert paragraph
    assert unique(re.findall(r"`(netnsd_\w+)`", paragraph[1])) == told


def test_every_kind_of_event_is_documented_and_no_other() -> None:
    told = {kind for room in ("core", "daemon") for path in (CHECKOUT / "netnsd" / room).glob("*.py")
            for kind in re.findall(r"\b_?(?:tell|emit)\(\s*[\"'](\w+)", path.read_text(encoding="utf-8"))}
    paragraph = re.search(r"(?ms)^Events: (.*?)\n\n", section("## HTTP API"))
    assert paragraph
    assert unique(re.findall(r"`(\w+)`", paragraph[1])) == told


# -- errors -----------------------------------------------------------------------------------------------------


def error_classes() -> list[type[errors.NetnsdError]]:
    return [kind for _, kind in inspect.getmembers(errors, inspect.isclass)
            if issubclass(kind, errors.NetnsdError) and kind is not errors.NetnsdError]


def test_every_error_is_documented_with_status_and_exit_code_and_no_other() -> None:
    table = rows(section("## Errors"))
    documented = {code(row[0]): (row[1], row[2]) for row in table}
    assert len(documented) == len(table)
    assert documented == {kind.code: (str(kind.status) if "status" in vars(kind) else "-", str(kind.exit_code))
                          for kind in error_classes()}


def test_every_error_says_what_it_means_and_what_to_do() -> None:
    assert [row for row in rows(section("## Errors")) if len(row) != 5 or not all(row)] == []


def test_error_codes_are_unique() -> None:
    unique([kind.code for kind in error_classes()])


# -- the project ------------------------------------------------------------------------------------------------


def test_every_module_is_on_the_map_and_no_other() -> None:
    documented = unique([code(row[0]) for row in rows(section("## Module map"))])
    modules = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "netnsd").rglob("*.py")
               if path.name != "__init__.py"}
    assert documented == modules


def test_every_script_is_documented_and_no_other() -> None:
    documented = unique([code(row[0]) for row in rows(section("## Development"))])
    assert documented == {f"scripts/{path.name}" for path in (CHECKOUT / "scripts").iterdir()
                          if path.is_file() and not path.name.startswith("_")}


def test_every_unit_is_named() -> None:
    units = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "systemd").iterdir()}
    assert set(re.findall(r"`(systemd/[\w.-]+)`", section("### Run it as a service"))) == units


def test_every_decision_is_listed_and_numbered_once() -> None:
    files = sorted(path.name for path in (CHECKOUT / "docs" / "decisions").glob("*.md"))
    listed = re.findall(r"\]\(decisions/([^)]+)\)", (CHECKOUT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert listed == files
    assert [name[:4] for name in files] == [f"{number:04}" for number in range(1, len(files) + 1)]


@pytest.mark.parametrize("path", sorted((CHECKOUT / "docs" / "decisions").glob("*.md")), ids=lambda path: path.stem)
def test_a_decision_has_its_parts(path: Path) -> None:
    headings = re.findall(r"(?m)^## (.*)$", path.read_text(encoding="utf-8"))
    assert [heading for heading in headings if heading != "Figures"] == ["Context", "Decision", "Consequences"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_and_mentioned_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)]
    missing = [link for link in links if link and "://" not in link and not (page.parent / link).exists()]
    named = re.findall(r"`\.?/?((?:scripts|docs|systemd|tests|netnsd|\.ci)/[\w./-]+)`", text)
    missing += [name for name in named if not (CHECKOUT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_a_page_speaks_of_the_project_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w.~:/$}*\])<-])/[a-z][\w.-]*(?:/[\w.-]+)+", text)
    assert [path for path in paths if not SYSTEM_PATHS.match(path)] == []
    assert re.findall(r"(?i)\bissues? #?\d+|\bTODO\b|\bFIXME\b|\b(?:file|https?)://(?:localhost/home|[\w.-]*\.internal)",
                      text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_a_page_has_no_placeholder(page: Path) -> None:
    assert "<!--" not in page.read_text(encoding="utf-8")


def test_changelog_has_what_is_to_be_released() -> None:
    headings = re.findall(r"(?m)^## \[([^\]]+)\]", (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert {"Unreleased", netnsd.__version__} & set(headings)


def test_readme_is_the_packages_description() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["readme"] == "README.md"


def test_code_examples_name_verbs_and_options_that_exist() -> None:
    wrong = []
    for block in re.findall(r"(?ms)^```\w*\n(.*?)^```$", readme()):
        for line in block.splitlines():
            for first, behind in re.findall(r"(?<![/\w.-])netnsctl (\S+)(.*)", line):
                second, _, further = behind.strip().partition(" ")
                is_noun = f"{first} {second}" in CLIENT_VERBS
                verb, rest = (f"{first} {second}", f" {further}") if is_noun else (first, behind)
                if verb not in CLIENT_VERBS:
                    wrong.append(line)
                    continue
                ours = re.split(r" -- |['\"]$|  #", rest)[0]
                used = set(re.findall(r"(?<!\S)(--?[A-Za-z][\w-]*)", ours))
                if verb == "exec":
                    used = set(re.findall(r"(?<!\S)(--?[A-Za-z][\w-]*)", rest.split(" -- ")[0]))
                wrong += [line] if used - options(CLIENT_VERBS[verb]) else []
    assert wrong == []


def test_python_version_is_the_packages() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Python {project['requires-python'].removeprefix('>=')} or later" in readme()


def test_bounds_of_requests_are_documented() -> None:
    constants = {}
    for module in ("app", "stream"):
        tree = ast.parse((CHECKOUT / "netnsd" / "api" / f"{module}.py").read_text(encoding="utf-8"))
        constants.update({target.id: eval(compile(ast.Expression(node.value), module, "eval"))
                          for node in tree.body if isinstance(node, ast.Assign)
                          for target in node.targets if isinstance(target, ast.Name)
                          and target.id in ("BODY_BYTES", "BODY_SECONDS", "HEAD_BYTES", "HEAD_SECONDS")})
    text = " ".join(section("## HTTP API").split())
    assert f"A body is at most {constants['BODY_BYTES'] >> 10} KiB" in text
    assert f"a head at most {constants['HEAD_BYTES'] >> 10} KiB" in text
    assert constants["BODY_SECONDS"] == constants["HEAD_SECONDS"]
    assert f"within {constants['BODY_SECONDS']:g} seconds" in text


def test_every_promise_names_a_test_that_is_there() -> None:
    promises = rows(section("## What dies, what is promised"))
    assert len(promises) > 20
    assert [shown_by for *_, shown_by in promises if not is_a_test(code(shown_by))] == []


# Attacks whose defence is not there yet. What is shown is taken off.
PENDING: set[str] = set()


def test_every_attack_names_a_test_that_is_there() -> None:
    text = (CHECKOUT / "docs" / "security.md").read_text(encoding="utf-8")
    attacks = [row for part in re.split(r"(?m)^## ", text)[2:] if "\n|" in part for row in rows(part)]
    assert len(attacks) > 40
    assert {attack for attack, *_, shown_by in attacks if shown_by == "pending"} == PENDING
    shown = unique([code(shown_by) for *_, shown_by in attacks if shown_by != "pending"])
    assert sorted(name for name in shown if not is_a_test(name)) == []


def is_a_test(path: str) -> bool:
    """Whether there is a test, given as file::name."""
    file, _, name = path.partition("::")
    tree = ast.parse((CHECKOUT / file).read_text(encoding="utf-8"))
    return name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
