"""From the body of a request to what the engine is asked for, within the limits of this server."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanokimi.config import MAX_SEED
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.chat_template import ChatTemplate, Message, Role
from nanokimi.inference.engine import GenerationArguments, check_prompt
from nanokimi.inference.options import SamplingOptions
from nanokimi.model.transformer import Transformer
from nanokimi.serve.errors import ApiError, refused
from nanokimi.serve.schemas import ChatBody, CompletionBody, MessageBody, Sampling

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a reply in a chat may fill the context
LONG_TEXT = 10_000  # characters: longer ones are split into tokens beside the event loop


@dataclass(frozen=True)
class Served:
    """The one model of a server, and what may be asked of it.

    Attributes:
        name: what clients call the model.
        template: None if it cannot chat.
        context: most tokens of prompt and continuation.
        max_tokens: most tokens that a request may ask for.
        max_n: most choices for a prompt.
        created: Unix time.
    """

    name: str
    model: Transformer
    tokenizer: Tokenizer
    template: ChatTemplate | None
    context: int
    max_tokens: int
    max_n: int
    created: int

    def check_name(self, name: str | None) -> None:
        """ApiError with status 404 unless ``name`` is the model's, or None."""
        if name is not None and name != self.name:
            message = f"there is no model {name!r} here: this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


@dataclass(frozen=True)
class Plan:
    """What a request comes to.

    Attributes:
        requests: one for each choice.
        prompt_tokens: of every prompt once, whatever ``n`` is.
        logprobs: whether choices report log-probabilities.
        token_ids: whether choices tell their tokens' ids.
    """

    requests: tuple[GenerationArguments, ...]
    prompt_tokens: int
    stream: bool
    include_usage: bool
    logprobs: bool
    token_ids: bool


async def plan_completion(body: CompletionBody, served: Served) -> Plan:
    """See ``Plan``.

    Raises:
        ApiError: the model is another one, or something is over a limit.
    """
    served.check_name(body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        message = "best_of is not supported: leave it out, or set it to n"
        raise ApiError(400, message, param="best_of", code="unsupported_parameter")
    settings = _settings(body, served, _limited(body.max_tokens, COMPLETION_TOKENS, served, "max_tokens"))
    encode = partial(_prompts, body.prompt, served.tokenizer)
    prompts = encode() if _length(body.prompt) < LONG_TEXT else await asyncio.to_thread(encode)
    stop_tokens = (served.tokenizer.eot_id,)
    return _plan(body, served, prompts, settings, stop_tokens, body.logprobs, "prompt")


async def plan_chat(body: ChatBody, served: Served) -> Plan:
    """See ``Plan``; errors as for ``plan_completion``, and without a chat template status 400."""
    served.check_name(body.model)
    template = served.template
    if template is None:
        raise ApiError(
            400, f"{served.name} is a base model without a chat template: use /v1/completions, or start the server "
            "with --chat_template FILE", code="no_chat_template",
        )  # fmt: skip
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        message = "max_tokens is the old name of max_completion_tokens: give one of them"
        raise ApiError(400, message, param="max_completion_tokens")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    settings = _settings(body, served, _limited(wanted, served.max_tokens, served, name))
    messages = [_message(message) for message in body.messages]
    try:
        ids = await asyncio.to_thread(template.encode, messages)
    except UserError as error:
        raise refused(error, param="messages") from error
    settings = dataclasses.replace(settings, stop=settings.stop + template.stop)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _plan(body, served, [ids], settings, template.stop_tokens, logprobs, "messages")


def _message(body: MessageBody) -> Message:
    role: Role = "system" if body.role == "developer" else body.role
    parts = [body.content] if isinstance(body.content, str) else [part.text for part in body.content]
    return {"role": role, "content": "".join(parts)}


def _limited(wanted: int | None, default: int, served: Served, name: str) -> int:
    if wanted is not None and wanted > served.max_tokens:
        raise ApiError(400, f"{name} {wanted} is over this server's limit of {served.max_tokens}", param=name)
    return min(default, served.max_tokens) if wanted is None else wanted


def _settings(body: Sampling, served: Served, max_tokens: int) -> SamplingOptions:
    """How tokens are drawn. The defaults are OpenAI's."""
    if (body.n or 1) > served.max_n:
        raise ApiError(400, f"n {body.n} is over this server's limit of {served.max_n}", param="n")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream true", param="stream_options")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return SamplingOptions(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        max_tokens=max_tokens,
        stop=stop,
    )


def _length(prompt: str | Sequence[object] | None) -> int:
    if prompt is None or isinstance(prompt, str):
        return len(prompt or "")
    return sum(len(text) for text in prompt if isinstance(text, str))


def _prompts(prompt: str | Sequence[object] | None, tokenizer: Tokenizer) -> list[Sequence[int]]:
    """The ids of each prompt; an empty one starts a new document."""
    given: list[Any]
    if prompt is None or isinstance(prompt, str):
        given = [prompt or ""]
    else:
        given = [prompt] if isinstance(prompt[0], int) else list(prompt)
    return [(tokenizer.encode(one) if isinstance(one, str) else one) or [tokenizer.eot_id] for one in given]


def _plan(
    body: Sampling,
    served: Served,
    prompts: Sequence[Sequence[int]],
    settings: SamplingOptions,
    stop_tokens: tuple[int, ...],
    logprobs: int | None,
    field: str,
) -> Plan:
    n = body.n or 1
    if body.seed is not None and body.seed + n * len(prompts) - 1 > MAX_SEED:
        raise ApiError(400, f"seed: choice i draws with seed + i, which must not be over {MAX_SEED}", param="seed")
    requests: list[GenerationArguments] = []
    for prompt in prompts:
        try:
            check_prompt(prompt, served.context, served.tokenizer.vocab_size)
        except UserError as error:
            raise refused(error, param=field) from error
        for _ in range(n):
            seed = None if body.seed is None else body.seed + len(requests)
            choice = dataclasses.replace(settings, seed=seed)
            requests.append(GenerationArguments(tuple(prompt), choice, stop_tokens, logprobs))
    return Plan(
        tuple(requests), sum(map(len, prompts)), bool(body.stream),
        bool(body.stream_options and body.stream_options.include_usage), logprobs is not None,
        bool(body.return_token_ids),
    )  # fmt: skip
