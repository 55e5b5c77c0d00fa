"""Makes every call in netnsd's code a point, when its modules are imported: nothing in them knows of it.

A module's calls are compiled as calls of ``_call``, which sees what is called and with what. What is netnsd's own, or
stays inside the process, goes on at once; the rest is a step (see ``primitives``). So a new call in the code is a
point without anybody's doing. Standard library only: the launcher's program imports it.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, MethodType, ModuleType
from typing import Any

from tests.faults import primitives
from tests.faults.control import Control, Step
from tests.faults.primitives import Kind

# Rooms that reach beyond the process. Of the others core decides, and api speaks with clients on their connections.
ROOMS = ("netnsd.kernel.", "netnsd.daemon.", "netnsd.core.", "netnsd.store")
_CALL, _REFERENCE = "_planted_call", "_planted_reference"
_NEVER = frozenset({"super", *(name for name in dir(builtins) if name != "open")})


def is_planted(module: str) -> bool:
    """Whether the calls of that module of netnsd's are points."""
    return module.startswith(ROOMS) and module not in primitives.OWN


@dataclass(frozen=True, slots=True)
class Place:
    """A call in the code. ``name``: what is called, where the code alone says it; else empty."""

    point: str
    name: str
    line: int


@dataclass
class Planter(ast.NodeTransformer):
    """Rewrites one module's calls; ``places`` has all that may be steps."""

    module: str
    places: list[Place] = field(default_factory=list)
    _modules: dict[str, str] = field(default_factory=dict)
    _scope: list[str] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)
    _own: set[str] = field(default_factory=set)

    def visit_Module(self, node: ast.Module) -> ast.AST:
        for statement in ast.walk(node):
            if isinstance(statement, ast.Import):
                for alias in statement.names:
                    root = alias.name.partition(".")[0]
                    self._modules[alias.asname or root] = alias.name if alias.asname else root
            elif isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    self._modules[alias.asname or alias.name] = f"{statement.module}.{alias.name}"
        self._own = {s.name for s in node.body if isinstance(s, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))}
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._within(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._within(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._within(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return node  # its annotation is no code

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        text = ast.unparse(node.func)
        name = self._resolve(node.func)
        node.args = [self.visit(argument) for argument in node.args]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        if not isinstance(node.func, (ast.Name, ast.Attribute)):
            node.func = self.visit(node.func)
        elif isinstance(node.func, ast.Attribute) and not name:
            node.func.value = self.visit(node.func.value)
        if self._is_inward(node.func, name):
            return node
        point = self._point(text, name, node.lineno)
        call = ast.Call(ast.Name(_CALL, ast.Load()), [ast.Constant(point), node.func, *node.args], node.keywords)
        return ast.fix_missing_locations(ast.copy_location(call, node))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """A function that is named and not called is called by somebody else."""
        name = self._resolve(node)
        if not name or not isinstance(node.ctx, ast.Load) or not name.rpartition(".")[2].islower():
            return self.generic_visit(node)
        if primitives.kind_of(name) is Kind.INERT:
            return node
        point = self._point(ast.unparse(node), name, node.lineno)
        call = ast.Call(ast.Name(_REFERENCE, ast.Load()), [ast.Constant(point), node], [])
        return ast.fix_missing_locations(ast.copy_location(call, node))

    def _within(self, node: Any) -> ast.AST:
        for decorator in node.decorator_list:
            self.visit(decorator)
        returns = getattr(node, "returns", None)
        self._scope.append(node.name)
        if returns is not None:
            node.returns = None
        self.generic_visit(node)
        if returns is not None:
            node.returns = returns
        self._scope.pop()
        result: ast.AST = node
        return result

    def _resolve(self, node: ast.expr) -> str:
        """What the code alone says that this is, such as ``os.mkdir``; empty where only running tells."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        found = self._modules.get(node.id)
        if found is None:
            return "io.open" if node.id == "open" and not parts else ""
        dotted = ".".join((found, *parts))
        for module in primitives.OWN:
            if dotted.startswith(module + "."):
                return primitives.own_name(module, dotted[len(module) + 1:])
        return dotted

    def _is_inward(self, function: ast.expr, name: str) -> bool:
        if name:
            return primitives.kind_of(name) is Kind.INERT
        return isinstance(function, ast.Name) and (function.id in _NEVER or function.id in self._own)

    def _point(self, text: str, name: str, line: int) -> str:
        base = f"{'.'.join((self.module.removeprefix('netnsd.'), *self._scope))}:{text}"
        number = self._counts[base] = self._counts.get(base, 0) + 1
        point = base if number == 1 else f"{base}#{number}"
        self.places.append(Place(point, name, line))
        return point


def plant(source: str | bytes, module: str) -> tuple[ast.Module, list[Place]]:
    """A module's code with its calls as points, and these."""
    planter = Planter(module)
    tree = planter.visit(ast.parse(source))
    return tree, planter.places


# -- when it runs -----------------------------------------------------------------------------------------------

_control: list[Control] = []
_inert: set[str] = set()


def _call(point: str, function: Any, /, *arguments: Any, **named: Any) -> Any:
    control = _control[0]
    if control.is_armed:
        name = called(function)
        kind = primitives.kind_of(name, arguments)
        if kind is not Kind.INERT:
            what = control.step(Step(point, name, kind.value))
            if what is not None:
                raise primitives.failure(name, what, arguments)
        elif point not in _inert:
            _inert.add(point)
            control.note(Step(point, name, kind.value))
    return function(*arguments, **named)


def _reference(point: str, value: Any) -> Any:
    return value if isinstance(value, type) or not callable(value) else functools.partial(_call, point, value)


def called(function: Any) -> str:
    """What is called, such as ``os.mkdir``, ``socket.socket.send``, ``pathlib.Path.unlink``."""
    if isinstance(function, functools.partial):
        name = called(function.func)
        # IPRoute's methods are partial calls of one of its own, with the method that is meant.
        return called(function.args[0]) if name.startswith("pyroute2.") and function.args else name
    if isinstance(function, MethodType):
        function = function.__func__
    elif isinstance(function, type):
        return primitives.own_name(function.__module__, function.__qualname__)
    else:
        holder = getattr(function, "__self__", None)
        if holder is not None and not isinstance(holder, ModuleType):
            method = function.__name__
            kind = next((k for k in type(holder).__mro__ if method in k.__dict__), type(holder))
            return primitives.own_name(kind.__module__, f"{kind.__qualname__}.{method}")
    module = getattr(function, "__module__", None) or type(function).__module__
    qualified: str = getattr(function, "__qualname__", None) or getattr(function, "__name__", "") or repr(function)
    return primitives.own_name(module, qualified)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles what is planted; byte code is kept apart from that of others."""

    cache = ""

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> CodeType:  # type: ignore[override]
        tree, _ = plant(data, self.name)
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname: str) -> CodeType | None:
        before, sys.pycache_prefix = sys.pycache_prefix, self.cache
        try:
            return super().get_code(fullname)
        finally:
            sys.pycache_prefix = before


class _Finder:
    """Finds netnsd's modules that are planted."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if not is_planted(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
            return None
        return importlib.util.spec_from_file_location(name, spec.origin, loader=_Loader(name, spec.origin))


def install(control: Control, cache: str) -> None:
    """From now on netnsd's modules are imported with points, which ``control`` arms. ``cache``: for byte code."""
    assert not any(is_planted(name) for name in sys.modules), "imported before it could be planted"
    _control.append(control)
    _Loader.cache = cache
    setattr(builtins, _CALL, _call)
    setattr(builtins, _REFERENCE, _reference)
    sys.meta_path.insert(0, _Finder())


def modules(root: str) -> Iterator[tuple[str, str]]:
    """The planted modules of the package at ``root``: names and files."""
    from pathlib import Path

    for path in sorted(Path(root).rglob("*.py")):
        name = ".".join(("netnsd", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        if is_planted(name) and path.name != "__init__.py":
            yield name, str(path)
