"""The application: OpenAI's routes, those of the page, health and metrics; the guards in front of them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanokimi.inference.inspection import inspect_tokens
from nanokimi.serve import api
from nanokimi.serve.answers import Answer, ChatAnswer, CompletionAnswer, EventStream, finite
from nanokimi.serve.api import ApiError, ErrorBody, Served, on_error, refusing
from nanokimi.serve.arguments import Rules
from nanokimi.serve.metrics import CONTENT_TYPE, Metrics
from nanokimi.serve.worker import RETRY, Worker

WEB = Path(__file__).parent / "web"
FRESH = {"Cache-Control": "no-cache"}  # a browser asks for the page's files anew, so that no old one meets a new one
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
LINGER = 0.5  # seconds in which a client that sends too much may notice that it is refused
UNKNOWN_ROUTE = "other"  # a path of the client's own making must not become a name in the metrics
STATUSES = (400, 401, 403, 404, 413, 415, 429, 500, 503, 504, "4XX")  # of errors: see docs/serving.md


def new_app(served: Served, worker: Worker, rules: Rules, metrics: Metrics, *, max_body: int) -> ASGIApp:
    """The ASGI application with its guards; every answer, an error too, passes through them."""
    app = FastAPI(
        title="nanokimi",
        responses={status: {"model": ErrorBody} for status in STATUSES},
        docs_url=None,  # the pages of both would load scripts from elsewhere
        redoc_url=None,
        exception_handlers=dict.fromkeys((RequestValidationError, HTTPException, Exception), on_error),
    )
    routes = Routes(served, worker, metrics)
    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
    app.add_api_route("/v1/models", routes.models)
    app.add_api_route("/v1/models/{name:path}", routes.model)
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"], responses=streamed)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], responses=streamed)
    app.add_api_route("/v1/inspect", routes.inspect, methods=["POST"])
    app.add_api_route("/health", routes.health)
    app.add_api_route("/metrics", routes.metrics, response_class=PlainTextResponse)
    app.add_api_route("/", page, include_in_schema=False)
    app.mount("/web", PageFiles(directory=WEB))
    inner: ASGIApp = InnerGuard(app, rules, max_body)
    if rules.allowed_origins:
        methods, headers = ("GET", "POST"), ("Authorization", "Content-Type")
        inner = CORSMiddleware(inner, rules.allowed_origins, allow_methods=methods, allow_headers=headers)
    return OuterGuard(inner, rules, metrics)


# ---- routes -------------------------------------------------------------------------------------


async def page() -> FileResponse:
    """The page."""
    return FileResponse(WEB / "index.html", headers=FRESH)


class PageFiles(StaticFiles):
    """The files that the page consists of."""

    def file_response(self, *args: Any, **named: Any) -> Response:
        """The same as in ``StaticFiles``, with the headers ``FRESH``."""
        response = super().file_response(*args, **named)
        response.headers.update(FRESH)
        return response


class Routes:
    """What each route does."""

    def __init__(self, served: Served, worker: Worker, metrics: Metrics) -> None:
        self._served, self._worker, self._metrics = served, worker, metrics
        self._about = {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "nanokimi",
            "max_model_len": served.context,
            "chat": served.template is not None,
            "n_routed_experts": served.model.config.n_routed_experts if served.model.moe_layers() else 0,
        }

    async def models(self) -> JSONResponse:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [self._about]})

    async def model(self, name: str) -> JSONResponse:
        """The model, if it has that name."""
        self._served.check_name(name)
        return JSONResponse(self._about)

    async def completions(self, body: api.CompletionBody, request: Request) -> Response:
        """Continues one or more prompts."""
        arguments = await api.completion_arguments(body, self._served)
        return await self._respond(CompletionAnswer(self._worker, self._served, body, arguments), request)

    async def chat(self, body: api.ChatBody, request: Request) -> Response:
        """Writes the next turn of a talk."""
        arguments = await api.chat_arguments(body, self._served)
        return await self._respond(ChatAnswer(self._worker, self._served, body, arguments), request)

    async def _respond(self, answer: Answer, request: Request) -> Response:
        self._metrics.prompt_tokens += answer.prompt_tokens
        return EventStream(answer) if answer.body.stream else JSONResponse(await answer.whole(request.receive))

    async def inspect(self, body: api.InspectBody) -> JSONResponse:
        """What the model expected instead of each token, and which experts each token visited."""
        served, top = self._served, 5 if body.top is None else body.top
        served.check_name(body.model)
        look = partial(inspect_tokens, served.model, served.tokenizer, body.tokens, start=body.start or 0, top=top)
        with refusing("tokens"):
            views = await self._worker.call(look)
        tokens = [
            {
                "id": view.id,
                "text": view.text,
                "logprob": finite(view.logprob),
                "alternatives": [{"id": id, "text": text, "logprob": finite(p)} for id, text, p in view.likeliest],
                "experts": view.experts,
            }
            for view in views
        ]
        return JSONResponse({"tokens": tokens})

    async def health(self) -> JSONResponse:
        """Whether new requests are accepted, and how busy the server is."""
        worker = self._worker
        names = ("slots", "running", "waiting", "capacity", "failures", "last_failure")
        state = {"status": "draining" if worker.draining else "ok", **{name: getattr(worker, name) for name in names}}
        return JSONResponse(state, 503 if worker.draining else 200, RETRY if worker.draining else None)

    async def metrics(self) -> Response:
        """The same and more, for Prometheus."""
        worker = self._worker
        gauges = {
            "running": (worker.running, "Sequences in slots."),
            "waiting": (worker.waiting, "Sequences that wait for a slot."),
            "slots": (worker.slots, "Sequences that can run together."),
            "slot_bytes": (worker.slot_bytes, "Memory of one slot's cache."),
            "engine_failures": (worker.failures, "How often the engine failed altogether."),
        }
        return Response(self._metrics.text(gauges), media_type=CONTENT_TYPE)


# ---- guards -------------------------------------------------------------------------------------


class OuterGuard:
    """Checks Host and Origin, adds the security headers, counts the answers."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
                route = str(getattr(scope.get("route"), "path", UNKNOWN_ROUTE))
                self._metrics.answers[route, message["status"]] += 1
            await send(message)

        app, hosts, origins = self._app, *(Headers(scope=scope).getlist(name) for name in ("host", "origin"))
        if len(hosts) != 1 or not self._rules.host_is_ours(hosts[0]):
            message = "this server does not go by that Host: see --allowed_host"
            app = ApiError(403, message, code="foreign_host").response()
        elif any(not self._rules.origin_is_ours(origin, hosts[0]) for origin in origins):
            message = "pages of that Origin may not use this server: see --allowed_origin"
            app = ApiError(403, message, code="foreign_origin").response()
        await app(scope, receive, send_marked)


class InnerGuard:
    """Answers 401 to a wrong key on any path, and 413 to a body over ``max_body`` bytes without reading it all."""

    def __init__(self, app: ASGIApp, rules: Rules, max_body: int) -> None:
        self._app, self._rules, self._max_body = app, rules, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, left = Headers(scope=scope), self._max_body
        if not self._rules.key_is_right(headers.get("authorization", "")):
            message, realm = "wrong or missing key: send Authorization: Bearer KEY", 'Basic realm="nanokimi"'
            error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": realm})
            return await error.response()(scope, receive, send)
        message = f"the body is over this server's limit of {self._max_body} bytes (--max_body)"
        too_large = ApiError(413, message, headers={"Connection": "close"})

        async def receive_some() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise too_large
            return message

        async def send_and_linger(message: Message) -> None:
            if left < 0 and message["type"] == "http.response.body":
                # A connection that is closed with bytes unread is reset, and the client could lose the answer.
                await send({**message, "more_body": True})
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_discard(receive), LINGER)
                message = {"type": "http.response.body"}
            await send(message)

        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > left:
            left = -1
        await (self._app if left >= 0 else too_large.response())(scope, receive_some, send_and_linger)


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass
