"""What stands in front of every route: who may ask from where, the key, headers that bind browsers, counts."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanokimi.serve.errors import ApiError
from nanokimi.serve.metrics import Metrics
from nanokimi.serve.rules import Rules

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
LINGER = 0.5  # seconds in which a client that sends too much may notice that it is refused
UNKNOWN_ROUTE = "other"  # a path of the client's own making must not become a name in the metrics


def guarded(app: ASGIApp, rules: Rules, metrics: Metrics, *, max_body: int) -> ASGIApp:
    """``app`` behind all guards; every answer, an error too, passes through them."""
    app = KeyGuard(BodyLimit(app, max_body), rules)
    if rules.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=rules.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type"),
        )
    return Gate(app, rules, metrics)


class BodyLimit:
    """Answers 413 to a body over ``most`` bytes, announced or not, without reading it all."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._most:
            return await self._refuse(receive, send)
        left = self._most

        async def receive_some() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413)  # the one kind of error that FastAPI lets pass here
            return message

        async def send_unless_refused(message: Message) -> None:
            if left >= 0:
                await send(message)

        await self._app(scope, receive_some, send_unless_refused)
        if left < 0:
            await self._refuse(receive, send)

    async def _refuse(self, receive: Receive, send: Send) -> None:
        message = f"the body is over this server's limit of {self._most} bytes (--max_body)"
        answer = ApiError(413, message, headers={"Connection": "close"}).response()
        await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        # A connection that is closed with bytes unread is reset, and the client could lose the answer.
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), LINGER)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


class KeyGuard:
    """Answers 401 unless the key is right, whatever the path."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        app = self._app
        if scope["type"] == "http" and not self._rules.key_is_right(Headers(scope=scope).get("authorization", "")):
            message = "wrong or missing key: send Authorization: Bearer KEY"
            app = ApiError(
                401, message, code="invalid_api_key", headers={"WWW-Authenticate": 'Basic realm="nanokimi"'}
            ).response()
        await app(scope, receive, send)


class Gate:
    """The outermost guard: Host and Origin, security headers, the count of answers."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
                self._metrics.requests[_route(scope), message["status"]] += 1
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        await (self._app if refusal is None else refusal.response())(scope, receive, send_marked)

    def _refusal(self, headers: Headers) -> ApiError | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._rules.host_is_ours(hosts[0]):
            return ApiError(403, "this server does not go by that Host: see --allowed_host", code="foreign_host")
        if any(not self._rules.origin_is_ours(origin, hosts[0]) for origin in headers.getlist("origin")):
            message = "pages of that Origin may not use this server: see --allowed_origin"
            return ApiError(403, message, code="foreign_origin")
        return None


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", UNKNOWN_ROUTE))
