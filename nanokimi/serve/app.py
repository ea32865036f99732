"""The application: OpenAI's routes, those of the page, health and metrics; the guards in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
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

from nanokimi.errors import UserError
from nanokimi.inference.inspection import TokenView, inspect_tokens
from nanokimi.serve.answers import Answer, ChatAnswer, CompletionAnswer, EventStream, finite
from nanokimi.serve.api import (
    FIELDS,
    UNSUPPORTED,
    ApiError,
    ChatBody,
    CompletionBody,
    ErrorBody,
    InspectBody,
    Served,
    chat_requests,
    completion_requests,
    refused,
)
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
_MISTAKES: dict[int | str, str] = {
    400: "The request is wrong.",
    401: "The key is wrong.",
    403: "Host or Origin is foreign.",
    404: "There is no such model.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "The queue is full.",
    500: "The server failed.",
    503: "The server is shutting down.",
    504: "The request took too long.",
    "4XX": "Another mistake.",
}


def new_app(served: Served, worker: Worker, rules: Rules, metrics: Metrics, *, max_body: int) -> ASGIApp:
    """The ASGI application behind its guards; every answer, an error too, passes through them."""
    app = FastAPI(
        title="nanokimi",
        responses={status: {"model": ErrorBody, "description": text} for status, text in _MISTAKES.items()},
        docs_url=None,  # the pages of both would load scripts from elsewhere
        redoc_url=None,
        exception_handlers={RequestValidationError: _on_invalid, HTTPException: _on_http_error, Exception: _on_crash},
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

    async def models(self) -> JSONResponse:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, name: str) -> JSONResponse:
        """The model, if it has that name."""
        self._served.check_name(name)
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "nanokimi",
            "max_model_len": served.context,
            "chat": served.template is not None,
            "n_routed_experts": served.model.config.n_routed_experts if served.model.moe_layers() else 0,
        }

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continues one or more prompts."""
        requests = await completion_requests(body, self._served)
        return await self._respond(CompletionAnswer(self._worker, self._served, body, requests), body, request)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Writes the next turn of a talk."""
        requests = await chat_requests(body, self._served)
        return await self._respond(ChatAnswer(self._worker, self._served, body, requests), body, request)

    async def _respond(self, answer: Answer, body: CompletionBody | ChatBody, request: Request) -> Response:
        self._metrics.prompt_tokens += answer.prompt_tokens
        return EventStream(answer) if body.stream else JSONResponse(await answer.whole(request.receive))

    async def inspect(self, body: InspectBody) -> JSONResponse:
        """What the model expected in the place of each token, and which experts each token visited."""
        served, top = self._served, 5 if body.top is None else body.top
        served.check_name(body.model)
        look = partial(inspect_tokens, served.model, served.tokenizer, body.tokens, start=body.start or 0, top=top)
        try:
            views = await self._worker.call(look)
        except UserError as error:
            raise refused(error, "tokens") from error
        return JSONResponse({"tokens": [_view(view) for view in views]})

    async def health(self) -> JSONResponse:
        """Whether new requests are accepted, and how busy the server is."""
        worker = self._worker
        state = {
            "status": "draining" if worker.draining else "ok",
            "slots": worker.slots,
            "running": worker.running,
            "waiting": worker.waiting,
            "capacity": worker.capacity,
            "failures": worker.failures,
            "last_failure": worker.last_failure,
        }
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


def _view(view: TokenView) -> dict[str, Any]:
    return {
        "id": view.id,
        "text": view.text,
        "logprob": finite(view.logprob),
        "alternatives": [{"id": token, "text": text, "logprob": finite(p)} for token, text, p in view.likeliest],
        "experts": view.experts,
    }


# ---- errors -------------------------------------------------------------------------------------


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        return ApiError(415, f"the body's type is {kind or 'not given'}: send application/json").response()
    return _explained(error.errors()).response()


def _explained(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first field that is wrong, and why."""
    first = found[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}")
    if len(first["loc"]) < 2:
        return ApiError(400, f"the body must be a JSON object: {_reason(first)}")
    name = str(first["loc"][1])
    if name in UNSUPPORTED:
        return ApiError(400, f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")
    if first["type"] == "extra_forbidden":
        where = ".".join([*_path(first["loc"][1:-1]), str(first["loc"][-1])])
        return ApiError(400, f"unknown field {where}: leave it out", param=where, code="unknown_parameter")
    # Where several types are allowed, the value was held against each: what came furthest was probably meant.
    paths = [(_path(one["loc"][1:]), one) for one in found if one["loc"][1] == first["loc"][1]]
    path = max((path for path, _ in paths), key=len)
    reasons = dict.fromkeys(_reason(one) for other, one in paths if other == path)
    return ApiError(400, f"{'.'.join(path)}: {' or '.join(reasons)}", param=name)


def _path(location: Sequence[Any]) -> list[str]:
    """Fields and indices of lists, without the names of the types that were tried."""
    return [str(part) for part in location if isinstance(part, int) or part in FIELDS]


def _reason(found: Mapping[str, Any]) -> str:
    reason = str(found["msg"]).removeprefix("Value error, ")
    return reason[:1].lower() + reason[1:]


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Ours, and what Starlette itself refuses: an unknown path, a method, an unreadable body."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        error = ApiError(error.status_code, str(error.detail), headers=error.headers)
    return error.response()


async def _on_crash(request: Request, error: Exception) -> Response:
    """A fault of ours: Starlette hands it on to the server's log."""
    return ApiError(500, "the server failed; its log says why").response()


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
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > left:
            return await self._refuse_body(receive, send)

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
            await self._refuse_body(receive, send)

    async def _refuse_body(self, receive: Receive, send: Send) -> None:
        message = f"the body is over this server's limit of {self._max_body} bytes (--max_body)"
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
