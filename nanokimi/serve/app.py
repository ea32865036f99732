"""The application: OpenAI's routes, those of the page, health and metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from nanokimi.errors import UserError
from nanokimi.inference.engine import Engine
from nanokimi.inference.inspection import TokenView, inspect_tokens
from nanokimi.serve.answers import Answer, EventStream
from nanokimi.serve.errors import install_handlers, refused
from nanokimi.serve.guards import guarded
from nanokimi.serve.metrics import CONTENT_TYPE, Metrics
from nanokimi.serve.plans import Plan, Served, plan_chat, plan_completion
from nanokimi.serve.rules import Rules
from nanokimi.serve.schemas import ChatBody, CompletionBody, ErrorBody, InspectBody
from nanokimi.serve.shapes import ChatShape, CompletionShape, Shape, finite
from nanokimi.serve.worker import RETRY, Worker

WEB = Path(__file__).parent / "web"
FRESH = {"Cache-Control": "no-cache"}
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
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _MISTAKES.items()
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def new_app(served: Served, worker: Worker, rules: Rules, metrics: Metrics, *, max_body: int) -> ASGIApp:
    """The ASGI application; its lifespan starts and stops ``worker``."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(
        title="nanokimi", lifespan=lifespan, responses=ERRORS,
        docs_url=None, redoc_url=None,  # their pages come from elsewhere
    )  # fmt: skip
    install_handlers(app)
    routes = Routes(served, worker, metrics)
    app.add_api_route("/v1/models", routes.models)
    app.add_api_route("/v1/models/{name:path}", routes.model)
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"], responses=STREAMED)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], responses=STREAMED)
    app.add_api_route("/v1/inspect", routes.inspect, methods=["POST"])
    app.add_api_route("/health", routes.health)
    app.add_api_route("/metrics", routes.metrics, response_class=PlainTextResponse)
    app.add_api_route("/", page, include_in_schema=False)
    app.mount("/web", PageFiles(directory=WEB))
    return guarded(app, rules, metrics, max_body=max_body)


async def page() -> FileResponse:
    """The page."""
    return FileResponse(WEB / "index.html", headers=FRESH)


class PageFiles(StaticFiles):
    """What the page is made of; a browser asks for it anew, so that no old part meets a new one."""

    def file_response(self, *args: Any, **named: Any) -> Response:
        """See ``StaticFiles``."""
        response = super().file_response(*args, **named)
        response.headers.update(FRESH)
        return response


class Routes:
    """What each route does."""

    def __init__(self, served: Served, worker: Worker, metrics: Metrics) -> None:
        self._served, self._worker, self._metrics = served, worker, metrics
        self._completion, self._chat = CompletionShape(served.tokenizer), ChatShape(served.tokenizer)

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
            "id": served.name, "object": "model", "created": served.created, "owned_by": "nanokimi",
            "max_model_len": served.context, "chat": served.template is not None,
            "n_routed_experts": served.model.config.n_routed_experts if served.model.moe_layers() else 0,
        }  # fmt: skip

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continues one or more prompts."""
        return await self._answer(await plan_completion(body, self._served), self._completion, request)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Writes the next turn of a talk."""
        return await self._answer(await plan_chat(body, self._served), self._chat, request)

    async def _answer(self, plan: Plan, shape: Shape, request: Request) -> Response:
        job = self._worker.submit(plan.requests)
        self._metrics.prompt_tokens += plan.prompt_tokens
        answer = Answer(self._worker, job, plan, shape, self._served.name)
        if plan.stream:
            return EventStream(answer, self._worker.max_seconds)
        return JSONResponse(await answer.whole(request.receive))

    async def inspect(self, body: InspectBody) -> JSONResponse:
        """What the model expected in the place of each token, and which experts each token visited."""
        served = self._served
        served.check_name(body.model)
        start, top = body.start or 0, 5 if body.top is None else body.top

        def look(_: Engine) -> list[TokenView]:
            return inspect_tokens(served.model, served.tokenizer, body.tokens, start=start, top=top)

        try:
            views = await self._worker.call(look)
        except UserError as error:
            raise refused(error, param="tokens") from error
        return JSONResponse({"tokens": [_view(view) for view in views]})

    async def health(self) -> JSONResponse:
        """Whether new requests are accepted, and how busy the server is."""
        worker = self._worker
        state = {
            "status": "draining" if worker.draining else "ok", "slots": worker.slots, "running": worker.running,
            "waiting": worker.waiting, "capacity": worker.capacity, "failures": worker.failures,
            "last_failure": worker.last_failure,
        }  # fmt: skip
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
    alternatives = [{"id": token, "text": text, "logprob": finite(logprob)} for token, text, logprob in view.likeliest]
    return {
        "id": view.id, "text": view.text, "logprob": None if view.logprob is None else finite(view.logprob),
        "alternatives": alternatives, "experts": view.experts,
    }  # fmt: skip
