"""The OpenAPI 3.1 document, from the route table, the wire types and the errors."""

from __future__ import annotations

import http
import re
import types
import typing
from typing import Any

import msgspec

from netnsd import __version__, errors, wire
from netnsd.api import constraints, problems
from netnsd.api.routes import ROUTES, Route

_REFS = "#/components/schemas/{name}"
_IN_PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "ref": ("a name, NAME.USER, or an id", constraints.REF),
    "user": ("a user's name or number", {"minLength": 1})}
_VERSION = {problems.VERSION_HEADER: {"description": "The daemon's version.", "required": True,
                                      "schema": {"type": "string"}}}
_AFTER = {"Retry-After": {"description": "Seconds after which to try again.", "required": False,
                          "schema": {"type": "integer", "minimum": 0}}}
# What any request can meet, whatever the route.
_ALWAYS = frozenset({400, 401, 403, 408, 429, 500, 503})


def document(published: tuple[int, int]) -> dict[str, Any]:
    """The document that ``/openapi.json`` serves. ``published``: the range of host ports, inclusive."""
    known = {wire.ErrorAnswer, wire.Event}
    for route in ROUTES:
        known.update(_answers(route), [route.body] if route.body else [])
    ordered = sorted(known, key=lambda t: str(t.__name__))
    schemas, components = msgspec.json.schema_components(ordered, ref_template=_REFS)
    constraints.apply(components, published)
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
        "components": {
            "schemas": components,
            "responses": {f"Error{status}": _error(status, codes, by_type[wire.ErrorAnswer])
                          for status, codes in _codes().items()},
            "securitySchemes": {"bearer": {
                "type": "http", "scheme": "bearer",
                "description": "Over TCP: one of POST /v1/tokens. On the Unix socket none: the kernel says who asks."}},
        },
    }


def _codes() -> dict[int, list[str]]:
    """By status, the codes of the errors that a request can meet."""
    found: dict[int, list[str]] = {}
    for error in vars(errors).values():
        # Those of the daemon's start, and the client's own, have none.
        if (isinstance(error, type) and issubclass(error, errors.NetnsdError) and error is not errors.NetnsdError
                and "status" in vars(error)):
            found.setdefault(error.status, []).append(error.code)
    return dict(sorted(found.items()))


def _error(status: int, codes: list[str], schema: dict[str, Any]) -> dict[str, Any]:
    narrow = {"properties": {"error": {"properties": {"code": {"enum": codes}}}}}
    return {"description": f"{http.HTTPStatus(status).phrase}: {', '.join(codes)}.",
            "headers": {**_VERSION, **(_AFTER if status == http.HTTPStatus.SERVICE_UNAVAILABLE else {})},
            "content": {"application/json": {"schema": {"allOf": [schema, narrow]}}}}


def _statuses(route: Route) -> list[int]:
    """Those of the errors that a request of this route can meet."""
    found = set(_ALWAYS)
    if route.body is not None or route.query:
        found |= {413, 422}
    if "{" in route.path or route.path.startswith("/api/") or route.body is wire.CreateRequest:  # of a template
        found |= {404}
    if route.method != "GET":
        found |= {409, 413}
    if route.waits:
        found |= {409, 504}
    if route.path.startswith("/api/"):  # by a pair, which may be another's now
        found |= {409}
    return sorted(found)


def _links(route: Route) -> dict[str, Any]:
    """What can be done with what was made, by its id."""
    one = f"{route.path}/{{ref}}"
    return {"links": {
        _operation_id(other): {"operationId": _operation_id(other), "parameters": {"ref": "$response.body#/id"}}
        for other in ROUTES if other.path.startswith(one)}} if route.status == http.HTTPStatus.CREATED else {}


def _operation_id(route: Route) -> str:
    return f"{route.method.lower()}{re.sub(r'[^a-z0-9]+', '_', route.path).rstrip('_')}"


def _answers(route: Route) -> tuple[Any, ...]:
    """The types that a route may answer with."""
    if isinstance(route.answer, types.UnionType):
        return typing.get_args(route.answer)
    return (route.answer,) if route.answer else ()


def _in_path(route: Route) -> list[tuple[str, str, dict[str, Any]]]:
    """What its path has: name, meaning, schema."""
    if route.path.startswith("/v1/policies/"):  # whose names have dots
        return [("ref", "a name, or NAME.USER", constraints.POLICY_REF)]
    return [(name, *known) for name, known in _IN_PATHS.items() if f"{{{name}}}" in route.path]


def _operation(route: Route, by_type: dict[Any, Any]) -> dict[str, Any]:
    schemas = [by_type[answer] for answer in _answers(route)]
    content: dict[str, Any] = {route.content_type: {
        "schema": {"anyOf": schemas} if len(schemas) > 1 else schemas[0] if schemas else {"type": "string"}}}
    done = {str(route.status): "Done."} | ({"202": "It is done behind this answer."} if "wait" in route.query else {})
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "description": f"Permission: {route.permission.value}. Scope of a token: {route.scope}.",
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string", **schema},
               "description": meaning} for name, meaning, schema in _in_path(route)),
            *({"name": name, "in": "query", "required": False, "description": meaning,
               "schema": constraints.QUERY.get(name, {"type": "string"})} for name, meaning in route.query.items()),
            *({"name": "Idempotency-Key", "in": "header", "required": False,
               "schema": constraints.KEY,
               "description": "the same key and body again: what the first made"} for _ in range(route.is_keyed)),
        ],
        "responses": {**{status: {"description": meaning, "headers": _VERSION, "content": content, **_links(route)}
                         for status, meaning in done.items()},
                      **{str(status): {"$ref": f"#/components/responses/Error{status}"}
                         for status in _statuses(route)}},
    }
    if route.body is not None:
        # No body is {}.
        needed = any(field.required for field in msgspec.structs.fields(route.body))
        operation["requestBody"] = {"required": needed or route.body in constraints.NEVER_EMPTY,
                                    "content": {"application/json": {"schema": by_type[route.body]}}}
        if example := constraints.EXAMPLES.get(route.body):
            operation["requestBody"]["content"]["application/json"]["example"] = example
    return operation
