"""The ASGI application: finds the route, reads the body within bounds, and turns errors into answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Match
from starlette.routing import Route as StarletteRoute
from starlette.types import Send

from netnsd import __version__
from netnsd.api import foreign, json_body, openapi, problems
from netnsd.api.routes import ROUTES, Accepted, Call, Context, Permission, Route
from netnsd.api.trail import DONE, Deed
from netnsd.core.tokens import Grant
from netnsd.errors import (
    BodyTooLarge,
    Forbidden,
    InvalidRequest,
    MethodNotAllowed,
    NetnsdError,
    NoRoute,
    RequestTimeout,
    ShuttingDown,
    Unauthorized,
)

BODY_BYTES = 512 << 10
BODY_SECONDS = 10.0
# How old the last look at an account may be of whose token something is streamed.
STANDING_SECONDS = 5.0

_HEADERS = {problems.VERSION_HEADER: __version__}
_encode = msgspec.json.Encoder().encode


def application(context: Context) -> Starlette:
    """The application for one daemon."""
    document = _encode(openapi.document(context.environments.settings.published_range))
    large = trio.Lock()

    async def openapi_json(request: Request) -> Response:
        try:
            foreign.require_own(request.scope["headers"], is_certified=request.state.is_certified)
        except NetnsdError as error:
            return _problem(error)
        return Response(document, media_type="application/json", headers=_HEADERS)

    app = Starlette(
        routes=[StarletteRoute("/openapi.json", openapi_json, methods=["GET"]),
                *(_row(route, context, large) for route in ROUTES)],
        exception_handlers={HTTPException: _unrouted},
    )
    app.router.redirect_slashes = False  # a path with a slash too many is another path, and an error
    return app


def _row(route: Route, context: Context, large: trio.Lock) -> StarletteRoute:
    row = StarletteRoute(route.path, _Endpoint(route, context, large), methods=[route.method])
    if route.answer is None and row.methods is not None:
        row.methods.discard("HEAD")  # a stream without its body would go on unseen
    return row


class _Endpoint:
    """Serves one row of the table. A class, so that Starlette calls it as an ASGI application."""

    def __init__(self, route: Route, context: Context, large: trio.Lock) -> None:
        self._route = route
        self._context = context
        self._large = large

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        deed = Deed(request.state.actor, request.method, self._route.path, next(iter(request.path_params.values()), ""),
                    token=request.state.grant.token)
        try:
            response = await self._respond(request, deed)
            deed.code = DONE
        except ClientDisconnect:
            return
        except NetnsdError as error:
            deed.code = error.code
            response = _problem(error)
        except Exception:  # the one place where a fault becomes an answer  # noqa: BLE001
            fault = problems.fault(request.method, request.url.path)
            deed.code = fault.code
            response = _problem(fault)
        finally:
            self._context.trail.keep(deed)
        await response(scope, receive, send)

    async def _respond(self, request: Request, deed: Deed) -> Response:
        foreign.require_own(request.scope["headers"], is_certified=request.state.is_certified)
        if request.state.stopping():
            raise ShuttingDown("the daemon is stopping", hint="Environments stay; try again when it is back.")
        request.state.grant.require(self._route.scope)
        if self._route.permission is Permission.ADMIN and not request.state.actor.is_admin:
            raise Forbidden("only an admin may do that", hint="Ask root, or a member of the admins' group.")
        raw = await _body(request)
        body = await json_body.parse_in_turn(raw, self._route.body, self._large) if self._route.body else None
        query: dict[str, list[str]] = {}
        for name, value in request.query_params.multi_items():
            query.setdefault(name, []).append(value)
        call = Call(self._context, deed.actor, request.state.grant, deed.ref, query, body, deed,
                    _key(request) if self._route.is_keyed else None)
        began = time.perf_counter()
        answer = await (self._while_there(request, call) if self._route.waits else self._route.handler(call))
        if self._route.waits:
            await self._context.tokens.confirm(request.state.grant)
        if self._route.answer is None:
            if request.state.grant.token is not None:
                answer = self._while_good(answer, request.state.grant)
            return _Stream(answer, media_type=self._route.content_type, headers=_HEADERS)
        headers = {**_HEADERS, "Server-Timing": f"work;dur={(time.perf_counter() - began) * 1000:.3f}"}
        status = self._route.status
        if isinstance(answer, Accepted):
            answer, status = answer.answer, 202
        return Response(_encode(answer), status, media_type="application/json", headers=headers)

    async def _while_good(self, pieces: AsyncGenerator[bytes, None], grant: Grant) -> AsyncGenerator[bytes, None]:
        """A stream that ends when the right of its token does."""
        tokens, looked = self._context.tokens, trio.current_time()
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                try:
                    tokens.require(grant)
                    if trio.current_time() - looked > STANDING_SECONDS:
                        await tokens.confirm(grant)
                        looked = trio.current_time()
                except Unauthorized:
                    return
                yield piece

    async def _while_there(self, request: Request, call: Call) -> Any:
        """The handler's answer, unless the client leaves first: nobody waits for it then."""
        answer: Any = None
        failure: NetnsdError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_left, request, nursery.cancel_scope)
            try:
                answer = await self._route.handler(call)
            except NetnsdError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if answer is None:
            raise ClientDisconnect
        return answer


def _key(request: Request) -> str | None:
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1:
        raise InvalidRequest("Idempotency-Key is given twice", hint="Send it once.")
    return keys[0] if keys else None


async def _until_left(request: Request, scope: trio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _body(request: Request) -> bytes:
    announced = request.headers.get("content-length", "0")
    if int(announced) > BODY_BYTES:
        raise BodyTooLarge(f"the body has {announced} bytes", hint=f"At most {BODY_BYTES} bytes are read.")
    with trio.move_on_after(BODY_SECONDS):
        return await request.body()
    raise RequestTimeout(f"the body took more than {BODY_SECONDS:g} s", hint="Send it at once.")


class _Stream(StreamingResponse):
    """Closes its asynchronous generator in the task that reads it, however reading ends."""

    async def stream_response(self, send: Send) -> None:
        async def uncut(message: Any) -> None:
            # With the last of an answer hypercorn says that it is over, upon which Starlette cancels us: in the middle
            # of closing the connection, or of having it wait for the next request.
            with trio.CancelScope(shield=not message.get("more_body", True)):
                await send(message)

        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(uncut)


def _problem(error: NetnsdError) -> Response:
    return Response(problems.body_of(error), error.status, media_type="application/json",
                    headers=problems.headers_of(error))


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == MethodNotAllowed.status:
        response = _problem(MethodNotAllowed(f"{request.url.path} does not take {request.method}",
                                             hint="/openapi.json lists every route."))
        # Starlette knows those of the first row that fits, and a path has a row for each method.
        rows = [row for row in request.app.routes if row.matches(request.scope)[0] is not Match.NONE]
        response.headers["Allow"] = ", ".join(sorted({method for row in rows for method in row.methods}))
        return response
    return _problem(NoRoute(f"there is nothing at {request.url.path[:200]}", hint="/openapi.json lists every route."))
