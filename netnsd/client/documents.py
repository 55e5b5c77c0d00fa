"""NetworkPolicy documents as people keep them: YAML or JSON, several in one file. Their meaning is the daemon's to say.

Without click.
"""

from __future__ import annotations

import contextlib
import json
import sys

from netnsd.errors import InvalidPolicy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def read(file: str) -> list[Any]:
    """All documents of a file, ``-`` for standard input. Raises InvalidPolicy, OSError."""
    where = "standard input" if file == "-" else file
    try:
        if file == "-":
            text = sys.stdin.read() if sys.stdin is not None else ""
        else:
            with open(file, encoding="utf-8") as opened:
                text = opened.read()
    except UnicodeDecodeError as error:
        raise InvalidPolicy(f"{where} is not UTF-8", hint="Save it as UTF-8.") from error
    try:
        found = _documents(text)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise InvalidPolicy(f"{where} is nested too deep", hint="Is it a NetworkPolicy?") from error
    except ValueError as error:
        raise InvalidPolicy(f"{where} is not what it should be: {error}",
                            hint="Write documents as YAML, with --- between them, or one as JSON.") from error
    documents = [one for one in found if one is not None]  # nothing between two ---
    if not documents:
        raise InvalidPolicy(f"{where} has no document", hint="Write one, with kind: NetworkPolicy.")
    return documents


def _documents(text: str) -> list[Any]:
    """JSON is YAML, but for its tabs; several documents of it are YAML alone. Raises ValueError."""
    if text.lstrip()[:1] == "{":
        with contextlib.suppress(json.JSONDecodeError):
            return [json.loads(text, object_pairs_hook=_object)]
    return _yaml(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return found


def _yaml(text: str) -> list[Any]:
    """Raises ValueError with the line."""
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe one, without what would mean something else than it says."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            # A few lines of them become as many objects as one likes.
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {self.line + 1}: aliases are not taken")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} is not a string: quote it")
                if key.value in seen:
                    raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} is given twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    # A date is text here, as it is to who reads the document.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in some if not tag.endswith(":timestamp")]
        for first, some in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    try:
        return list(yaml.load_all(text, Loader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
