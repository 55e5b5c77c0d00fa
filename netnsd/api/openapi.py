"""The OpenAPI 3.1 document, from the route table and the wire types."""

from __future__ import annotations

import re
import types
import typing
from typing import Any

import msgspec

from netnsd import __version__, wire
from netnsd.api.routes import ROUTES, Route

_REFS = "#/components/schemas/{name}"
_IN_PATHS = {"ref": "a name, NAME.USER, or an id", "user": "a user's name or number"}


def document() -> dict[str, Any]:
    """The document that ``/openapi.json`` serves."""
    known = {wire.ErrorAnswer, wire.Event}
    for route in ROUTES:
        known.update(_answers(route), [route.body] if route.body else [])
    ordered = sorted(known, key=lambda t: str(t.__name__))
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REFS)
    by_type = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "netnsd", "version": __version__,
                 "description": "Environments: network namespaces with servers in them."},
        "paths": paths,
        "security": [{"bearer": []}, {}],
        "components": {"schemas": components, "securitySchemes": {"bearer": {
            "type": "http", "scheme": "bearer",
            "description": "Over TCP: one of POST /v1/tokens. On the Unix socket none: the kernel says who asks."}}},
    }


def _answers(route: Route) -> tuple[Any, ...]:
    """The types that a route may answer with."""
    if isinstance(route.answer, types.UnionType):
        return typing.get_args(route.answer)
    return (route.answer,) if route.answer else ()


def _operation(route: Route, by_type: dict[Any, Any]) -> dict[str, Any]:
    error = {"description": "An error; branch on its code.",
             "content": {"application/json": {"schema": by_type[wire.ErrorAnswer]}}}
    schemas = [by_type[answer] for answer in _answers(route)]
    content: dict[str, Any] = {route.content_type: {
        "schema": {"anyOf": schemas} if len(schemas) > 1 else schemas[0] if schemas else {}}}
    behind = {"202": {"description": "It is done behind this answer.", "content": content}}
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}{re.sub(r'[^a-z0-9]+', '_', route.path).rstrip('_')}",
        "summary": route.summary,
        "description": f"Permission: {route.permission.value}. Scope of a token: {route.scope}.",
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": meaning}
              for name, meaning in _IN_PATHS.items() if f"{{{name}}}" in route.path),
            *({"name": name, "in": "query", "required": False, "schema": {"type": "string"}, "description": meaning}
              for name, meaning in route.query.items()),
        ],
        "responses": {str(route.status): {"description": "Done.", "content": content},
                      **(behind if "wait" in route.query else {}), "4XX": error, "5XX": error},
    }
    if route.body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": by_type[route.body]}}}
    return operation
