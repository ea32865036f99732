"""How what clients send becomes what the engine is given; errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nanokimi.config import MAX_SEED
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.chat_template import ChatTemplate
from nanokimi.inference.engine import GenerationArguments, check_prompt
from nanokimi.inference.options import SamplingOptions
from nanokimi.model.transformer import Transformer
from nanokimi.serve.bodies import FIELDS, UNSUPPORTED, ChatBody, CompletionBody, Sampling

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a reply in a chat may fill the context
DEFAULTS = {"temperature": 1.0, "top_p": 1.0}  # OpenAI's
Headers = Mapping[str, str] | None
DRAWN_BY = ("temperature", "top_k", "top_p", "min_p", "seed")  # fields with the names of our options

# ---- errors -------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    """What went wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(HTTPException):
    """What the client is told, and with which status; ``body`` is JSON."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Headers = None
    ) -> None:
        super().__init__(status, message, headers)
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        # ASCII throughout: a field's name may hold lone surrogates, which UTF-8 cannot.
        self.body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.body, self.status_code, self.headers, "application/json")


@contextmanager
def refusing(param: str) -> Iterator[None]:
    """Answers a user's mistake with status 400; the flags that it names are fields here."""
    try:
        yield
    except UserError as error:
        raise ApiError(400, str(error).removeprefix("--").replace(" --", " "), param=param) from error


async def on_error(request: Request, error: Exception) -> Response:
    """Makes every error one in OpenAI's shape; Starlette also hands a fault of ours on to the server's log."""
    if isinstance(error, RequestValidationError):
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            return _explained(error.errors()).response()
        return ApiError(415, f"the body's type is {kind or 'not given'}: send application/json").response()
    if not isinstance(error, HTTPException):
        return ApiError(500, "the server failed; its log says why").response()
    if not isinstance(error, ApiError):  # what Starlette itself refuses: an unknown path, a method, an unreadable body
        detail = str(error.detail)
        if isinstance(error.__cause__, (ValueError, RecursionError)):
            detail = f"the body is not JSON: {error.__cause__}"
        error = ApiError(error.status_code, detail, headers=error.headers)
    return error.response()


def _explained(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first field that is wrong, and why."""
    first = found[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}")
    if first["type"] == "missing" and len(first["loc"]) < 2:
        return ApiError(400, "the body is empty: send a JSON object")
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


# ---- from bodies to what the engine is given ----------------------------------------------------


@dataclass(frozen=True)
class Served:
    """The one model of a server, and what may be asked of it."""

    name: str  # what clients call the model
    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None if it cannot chat
    context: int  # most tokens of prompt and continuation
    max_tokens: int  # most tokens that a request may ask for
    max_n: int  # most choices for a prompt
    created: int  # Unix time

    def check_name(self, name: str | None) -> None:
        """ApiError with status 404 unless ``name`` is the model's, or None."""
        if name is not None and name != self.name:
            message = f"there is no model {name!r} here: this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


async def completion_arguments(body: CompletionBody, served: Served) -> list[GenerationArguments]:
    """What the engine is given for each choice, prompt by prompt; ApiError if it is not what this server can do."""
    served.check_name(body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        message = "best_of is not supported: leave it out, or set it to n"
        raise ApiError(400, message, param="best_of", code="unsupported_parameter")
    options = _options(body, served, "max_tokens", COMPLETION_TOKENS)
    prompts = await asyncio.to_thread(_prompts, body.prompt, served.tokenizer)
    stop_tokens = () if body.ignore_eos else (served.tokenizer.eot_id,)
    # Beside a prompt's tokens clients look for one more, as many as they have asked for, whichever it is.
    pattern = GenerationArguments((), options, stop_tokens, body.logprobs, report_stop=bool(body.echo))
    return _choices(body, served, "prompt", prompts, pattern)


async def chat_arguments(body: ChatBody, served: Served) -> list[GenerationArguments]:
    """The same for a chat; without a chat template the error has status 400."""
    served.check_name(body.model)
    template = served.template
    if template is None:
        message = f"{served.name} is a base model without a chat template"
        message += ": use /v1/completions, or start the server with --chat_template FILE"
        raise ApiError(400, message, code="no_chat_template")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs true", param="top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        message = "max_tokens is the old name of max_completion_tokens: give one of them"
        raise ApiError(400, message, param="max_completion_tokens")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    options = _options(body, served, name, served.max_tokens)
    with refusing("messages"):
        prompt = await asyncio.to_thread(template.encode, [message.message() for message in body.messages])
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    stop, stop_tokens = ((), ()) if body.ignore_eos else (template.stop, template.stop_tokens)
    options = dataclasses.replace(options, stop=options.stop + stop)
    pattern = GenerationArguments((), options, stop_tokens, logprobs)
    return _choices(body, served, "messages", [prompt], pattern)


def _options(body: Sampling, served: Served, limit: str, default: int) -> SamplingOptions:
    """How tokens are drawn; the field ``limit`` holds the most tokens to generate."""
    max_tokens = getattr(body, limit)
    if max_tokens is not None and max_tokens > served.max_tokens:
        raise ApiError(400, f"{limit} {max_tokens} is over this server's limit of {served.max_tokens}", param=limit)
    if (body.n or 1) > served.max_n:
        raise ApiError(400, f"n {body.n} is over this server's limit of {served.max_n}", param="n")
    if body.stream_options is not None and any(body.stream_options.model_dump().values()) and not body.stream:
        raise ApiError(400, "stream_options: only with stream true", param="stream_options")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    given = {name: value for name in DRAWN_BY if (value := getattr(body, name)) not in (None, -1)}
    most = min(default, served.max_tokens) if max_tokens is None else max_tokens
    return SamplingOptions(**{**DEFAULTS, **given}, max_tokens=most, stop=stop)


def _prompts(prompt: str | Sequence[Any] | None, tokenizer: Tokenizer) -> list[Sequence[int]]:
    """The ids of each prompt; an empty one starts a new document."""
    if prompt is None or isinstance(prompt, str):
        prompt = [prompt or ""]
    elif isinstance(prompt[0], int):
        prompt = [prompt]
    return [(tokenizer.encode(one) if isinstance(one, str) else one) or [tokenizer.eot_id] for one in prompt]


def _choices(
    body: Sampling, served: Served, field: str, prompts: Sequence[Sequence[int]], pattern: GenerationArguments
) -> list[GenerationArguments]:
    """``pattern`` for every choice of every prompt, each with a seed of its own; ``field`` holds the prompts."""
    n, seed = body.n or 1, body.seed
    if seed is not None and seed + n * len(prompts) - 1 > MAX_SEED:
        raise ApiError(400, f"seed: choice i draws with seed + i, which must not be over {MAX_SEED}", param="seed")
    with refusing(field):
        for prompt in prompts:
            check_prompt(prompt, served.context, served.tokenizer.vocab_size)
    found: list[GenerationArguments] = []
    for i in range(n * len(prompts)):
        options = dataclasses.replace(pattern.options, seed=None if seed is None else seed + i)
        found.append(dataclasses.replace(pattern, prompt=tuple(prompts[i // n]), options=options))
    return found
