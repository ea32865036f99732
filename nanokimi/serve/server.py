"""The server: routes and the guards in front of them, and ``nanokimi serve`` from its flags to its end."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanokimi.console import log
from nanokimi.device import resolve_device
from nanokimi.errors import RunError, UserError
from nanokimi.inference.chat_template import chat_template_of
from nanokimi.inference.decoding import cache_bytes, choose_products, limit_threads, new_decoder, use_weights_
from nanokimi.inference.engine import Engine
from nanokimi.inference.inspection import echoed, inspect_tokens
from nanokimi.interop.loading import load
from nanokimi.memory import free_memory
from nanokimi.ops.measured import NAMES
from nanokimi.serve import api
from nanokimi.serve.answers import LAST_WORDS, Answer, ChatAnswer, CompletionAnswer, EventStream, finite
from nanokimi.serve.api import ApiError, ErrorBody, Served, on_error, refusing
from nanokimi.serve.arguments import Rules, ServeOptions
from nanokimi.serve.bodies import ChatBody, CompletionBody, InspectBody
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
# Nothing is left to "auto", which takes whatever is installed: httptools loses the body of a request that offers
# an upgrade, and uvloop and websockets would be there for some and not for others.
UVICORN: dict[str, Any] = {
    "http": "h11",
    "ws": "none",
    "loop": "asyncio",
    "lifespan": "off",
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "timeout_graceful_shutdown": round(LAST_WORDS),
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

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continues one or more prompts."""
        arguments = await api.completion_arguments(body, self._served)
        prompts = arguments[:: body.n or 1] if body.echo else ()
        model, tokenizer = self._served.model, self._served.tokenizer
        looks = (partial(echoed, model, tokenizer, one.prompt, one.logprobs) for one in prompts)
        echoes = [await self._worker.call(look) for look in looks]
        return await self._respond(CompletionAnswer(self._worker, self._served, body, arguments, echoes), request)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Writes the next turn of a talk."""
        arguments = await api.chat_arguments(body, self._served)
        return await self._respond(ChatAnswer(self._worker, self._served, body, arguments), request)

    async def _respond(self, answer: Answer, request: Request) -> Response:
        self._metrics.prompt_tokens += answer.prompt_tokens
        return EventStream(answer) if answer.body.stream else JSONResponse(await answer.whole(request.receive))

    async def inspect(self, body: InspectBody) -> JSONResponse:
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
    """Checks Host and Origin, adds the security headers, counts the answers; HEAD is GET, whose body is not sent."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope.get("method") == "HEAD":  # the server itself leaves out the body
            scope = {**scope, "method": "GET"}

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


# ---- from flags to a server that listens, and to its end ----------------------------------------


def run_serve(options: ServeOptions) -> int:
    """Serves until a signal comes; returns 128 plus its number, as shells report it.

    Raises:
        UserError: a model or a chat template cannot be loaded, or as ``bind``.
        RunError: the port is taken.
    """
    listener = bind(options.rules.host, options.port, options.max_seconds)
    metrics = Metrics()
    worker = Worker(max_queue=options.max_queue, max_seconds=options.max_seconds, metrics=metrics)
    served = worker.ask(partial(prepare, options, worker)).result()
    app = new_app(served, worker, options.rules, metrics, max_body=options.max_body)
    server = DrainingServer(app, worker, options.drain_seconds, f"{served.name} at {address(listener)}")
    try:
        server.run(sockets=[listener])
    finally:
        worker.stop()
    return 0 if server.signal is None else 128 + server.signal


def prepare(options: ServeOptions, worker: Worker) -> Served:
    """The model, ready to answer; called in the thread of ``worker``. UserError if memory does not hold all slots."""
    model, tokenizer = load(options.checkpoint, device=resolve_device(options.device))
    template = chat_template_of(tokenizer, options.chat_template)
    use_weights_(model, options.weights)
    slots, on_host = f"--slots {options.slots}", next(model.parameters()).device.type == "cpu"

    def new_engine() -> Engine:
        need, free = cache_bytes(model.config, options.slots), free_memory() if on_host else None
        if free is not None and need > free:
            raise UserError(f"{slots}: their caches take {need >> 20} MiB, and {free >> 20} MiB are free: lower it")
        try:
            decoder = new_decoder(model, slots=options.slots, kind=options.decoder, weights=options.weights)
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"{slots}: their caches cannot be had ({error}): lower it") from error
        return Engine(model, tokenizer, decoder=decoder, prefill_chunk=options.prefill_chunk)

    engine = worker.use(new_engine)
    limit_threads(model)
    if choice := choose_products(model):
        log(f"products: fp32 by {NAMES[choice.library]}")
    log(f"{engine.slots} slots of {engine.max_length} tokens, {engine.slot_bytes / 1e6:.3g} MB each")
    context, created = engine.max_length, int(time.time())
    most = min(options.max_tokens or context, context)
    return Served(options.served_name, model, tokenizer, template, context, most, options.max_n, created)


class DrainingServer(uvicorn.Server):
    """Ends in good order.

    The first signal stops new requests, and the server ends when those that run are done or ``drain_seconds`` are
    over. A second signal ends it at once.
    """

    def __init__(self, app: ASGIApp, worker: Worker, drain_seconds: float, about: str) -> None:
        super().__init__(uvicorn.Config(app, **UVICORN))
        self.signal: int | None = None  # number of the first
        self._worker, self._drain_seconds, self._about, self._deadline = worker, drain_seconds, about, 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says where."""
        await super().startup(sockets)
        print(f"serving {self._about}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal; ``on_tick`` acts on it."""
        if self.signal is None:
            self.signal = sig
        else:
            self.force_exit = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        if self.signal is not None and not self.should_exit:
            if not self._worker.draining:
                self._worker.draining = True
                self._deadline = time.monotonic() + self._drain_seconds
                log(f"ending: {self._worker.outstanding} sequences are finished first; a second signal ends at once")
            if not self._worker.outstanding or time.monotonic() > self._deadline:
                self._worker.break_off()
                self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int, max_seconds: float) -> socket.socket:
    """A socket with its address, which does not listen yet; UserError and RunError say why there can be none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"--host {host}: it has no address ({error.strerror}): use 127.0.0.1") from error
    family, _, _, _, own_address = min(found)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # else a client that never reads could hold its connection for ever
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(round(max_seconds * 1000), 2**31 - 1))
    try:
        listener.bind(own_address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise RunError(f"--port {port} of {host} is taken: choose another, or 0 for any free one") from error
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port}: below 1024 they are for administrators: choose 1024 or more") from error
        raise UserError(f"--host {host}: {error.strerror}: use 127.0.0.1, or an address of this machine") from error
    return listener


def address(listener: socket.socket) -> str:
    """Where ``listener`` is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
