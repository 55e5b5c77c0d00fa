"""Every call in netnsd that changes the world is a point, also one that is written tomorrow."""

from __future__ import annotations

import ast
import builtins
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.faults import planting, primitives
from tests.faults.control import KILL, Control, Step
from tests.faults.primitives import Kind

PACKAGE = Path(__file__).parents[2] / "netnsd"
SOURCES = {name: Path(path).read_text() for name, path in planting.modules(str(PACKAGE))}


class Recorder(Control):
    """Without a page: always armed; ``fails`` is how the next step fails."""

    def __init__(self) -> None:
        self.taken: list[Step] = []
        self.fails: str | None = None

    @property
    def is_armed(self) -> bool:
        return True

    def step(self, step: Step) -> str | None:
        self.taken.append(step)
        return self.fails

    def note(self, step: Step) -> None:
        assert step.kind == "inert"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(planting, "_control", [made])
    monkeypatch.setattr(builtins, "_planted_call", planting._call, raising=False)
    monkeypatch.setattr(builtins, "_planted_reference", planting._reference, raising=False)
    return made


def planted(text: str) -> dict[str, Any]:
    """What a module of that text holds when it is imported with points."""
    tree, _ = planting.plant(textwrap.dedent(text), "netnsd.kernel.sample")
    names: dict[str, Any] = {}
    exec(compile(tree, "sample", "exec"), names)  # as an import does
    return names


@pytest.mark.parametrize(("text", "name"), [
    ("import os\ndef do(path): os.link(path, path + '2')", "os.link"),
    ("import os as o\ndef do(path): o.symlink(path, path + '2')", "os.symlink"),
    ("from os import rename\ndef do(path): rename(path, path + '2')", "os.rename"),
    ("import os\nfrom functools import partial\ndef do(path): partial(os.replace, path)(path + '2')", "os.replace"),
    ("import os\ndef do(path): call = os.truncate; call(path, 0); os.mkdir(path + 'd')", "os.mkdir"),
    ("from pathlib import Path\ndef do(path): Path(path).touch()", "pathlib.Path.touch"),
    ("import shutil\ndef do(path): shutil.copy(path, path + '2')", "shutil.copy"),
    ("import socket\ndef do(path):\n  with socket.socket(socket.AF_UNIX) as s: s.bind(path + 's')",
     "socket.socket.bind"),
    ("import sqlite3\ndef do(path): sqlite3.connect(':memory:').executescript('')", "sqlite3.Connection.executescript"),
    ("import subprocess\ndef do(path): subprocess.run(['true'])", "subprocess.run"),
    ("import ctypes\ndef do(path): ctypes.CDLL(None).sync()", "ctypes.sync"),
    ("def do(path):\n  import os\n  return [os.unlink(p) for p in [path]]", "os.unlink"),
])
def test_a_new_call_is_a_point_in_whatever_way_it_is_written(
        text: str, name: str, recorder: Recorder, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    planted(text)["do"](str(path))
    assert (name, "effect") in [(step.name, step.kind) for step in recorder.taken]


def test_a_step_that_fails_is_not_taken(recorder: Recorder, tmp_path: Path) -> None:
    recorder.fails = "ENOSPC"
    with pytest.raises(OSError, match="No space left"):
        planted("import os\ndef do(path): os.mkdir(path)")["do"](str(tmp_path / "directory"))
    assert not (tmp_path / "directory").exists()
    assert [step.point for step in recorder.taken] == ["kernel.sample.do:os.mkdir"]


def test_what_stays_inside_the_process_is_no_step(recorder: Recorder) -> None:
    do = planted("""
        import json, os, struct
        class Base:
            def name(self): return "base"
        class Own(Base):
            def name(self): return super().name() + json.dumps([1]) + os.path.join("a", "b")
        def do(): return Own().name() + struct.pack(">H", 1).hex() + "".join(sorted("ba"))
    """)["do"]
    assert do() == "base[1]a/b0001ab"
    assert recorder.taken == []


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_every_module_that_netnsd_imports_is_known_to_reach_outward_or_not(module: str) -> None:
    known = primitives.OUTWARD | primitives.INWARD | {"tests"}
    for node in ast.walk(ast.parse(SOURCES[module])):
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                 else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            assert name.partition(".")[0] in known, f"{module} imports {name}: say in primitives.py what it can do"


def test_no_room_is_forgotten() -> None:
    """What is not planted does nothing but speak with clients, and compute."""
    rooms = {name.split(".")[1] for name in SOURCES}
    assert rooms == {"kernel", "daemon", "core", "store"}
    others = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")} - rooms
    assert others == {"__init__", "api", "client", "errors", "observability", "pytest_plugin", "wire"} & others


def test_what_is_called_a_look_or_harmless_is_used_at_all() -> None:
    text = "\n".join(SOURCES.values())
    unused = [name for name in primitives.LOOKS | primitives.INERT
              if name.rpartition(".")[2] not in text and not name.startswith(("io.", "pathlib."))]
    assert unused == []


def test_the_code_has_as_many_points_as_calls() -> None:
    """No call of a module that reaches outward escapes: not in a decorator, a default, a comprehension."""
    for module, text in SOURCES.items():
        places = planting.plant(text, module)[1]
        lines = {place.line for place in places}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(
                    node.func.value, ast.Name) and node.func.value.id in ("os", "libc", "shutil"):
                name = f"{node.func.value.id}.{node.func.attr}"
                if primitives.kind_of(name) is not Kind.INERT:
                    assert node.lineno in lines, f"{module}:{node.lineno} {name}"


def test_a_process_is_killed_at_its_step_and_no_sooner(tmp_path: Path) -> None:
    control = Control(str(tmp_path / "control"), create=True)
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(PACKAGE.parent)!r})
        from tests.faults import planting
        from tests.faults.control import Control
        planting.install(Control({str(tmp_path / 'control')!r}), {str(tmp_path / 'cache')!r})
        from netnsd.kernel import _messages
        for _ in range(3):
            _messages.sealed_memfd(b"x")
    """)

    def run() -> int:
        return subprocess.run([sys.executable, "-c", program], timeout=20, check=False).returncode

    control.record()
    assert run() == 0
    steps = [step.point for step in control.steps()]
    point = "kernel._messages.sealed_memfd:os.truncate"
    assert steps.count(point) == 3
    control.kill_at(point, 2)
    assert (run(), control.fired) == (-signal.SIGKILL, 1)
    control.kill_at(point, 4)
    assert (run(), control.fired) == (0, 0)
    control.disarm()
    assert (run(), os.path.getsize(tmp_path / "control.steps")) == (0, 0)
    assert KILL
