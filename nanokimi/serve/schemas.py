"""What clients may send: OpenAI's fields, checked strictly. What this server cannot do is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanokimi.config import MAX_SEED

MOST_LOGPROBS = 20
MOST_STOPS = 16
LONGEST_STOP = 200  # characters: the end of the text is compared with all beginnings of it, at every token


def _unicode(text: str) -> str:
    """JSON can escape half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not Unicode text: it holds half of a surrogate pair") from None
    return text


Text = Annotated[str, Field(strict=True), AfterValidator(_unicode)]
Flag = Annotated[bool, Field(strict=True)]
Ids = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)]
Stop = Annotated[str, Field(strict=True, min_length=1, max_length=LONGEST_STOP), AfterValidator(_unicode)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Logprobs = Annotated[int, Field(strict=True, ge=0, le=MOST_LOGPROBS)]
Zero = Annotated[float, Field(strict=True, ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]
NoEntries = Annotated[dict[str, Any], Field(max_length=0)]


class Body(BaseModel):
    """A JSON object without unknown fields; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """``include_usage`` adds a last chunk with the counts of tokens."""

    include_usage: Flag | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    """The one format there is."""

    type: Literal["text"]


class Unsupported(Body):
    """Fields of OpenAI's that only take the value which asks for nothing."""

    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: NoEntries | None = None


class UnsupportedCompletion(Unsupported):
    """The same, of completions alone."""

    suffix: Literal[""] | None = None
    echo: Literal[False] | None = None


class UnsupportedChat(Unsupported):
    """The same, of chat completions alone."""

    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    metadata: NoEntries | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: None = None
    web_search_options: None = None


UNSUPPORTED = frozenset(UnsupportedCompletion.model_fields) | frozenset(UnsupportedChat.model_fields)


class Sampling(Body):
    """What completions and chat completions have in common. ``user`` has no effect."""

    model: Text | None = Field(None, description="the served model's name; it is the only one")
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Count | None = Field(None, description="keep so many of the likeliest tokens; 0 is off")
    min_p: Share | None = Field(None, description="keep tokens at least this likely relative to the likeliest")
    n: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] | None = Field(
        None, description="choice i draws with seed + i"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    return_token_ids: Flag | None = Field(None, description="add prompt_token_ids and token_ids to choices")


class CompletionBody(Sampling, UnsupportedCompletion):
    """The body of ``POST /v1/completions``."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Ids
        | Annotated[list[Ids | Nothing], Field(min_length=1)]
        | None
    ) = Field(None, description="nothing: a new document")
    logprobs: Logprobs | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = Field(None, description="only as n")


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class MessageBody(Body):
    """One turn of a talk. ``developer`` is what OpenAI calls ``system`` now."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: None = None
    refusal: None = None
    audio: None = None
    annotations: Nothing | None = None
    function_call: None = None
    tool_calls: Nothing | None = None


class ChatBody(Sampling, UnsupportedChat):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens")
    logprobs: Flag | None = None
    top_logprobs: Logprobs | None = None
    safety_identifier: Text | None = Field(None, description="the newer name of user")


class InspectBody(Body):
    """The body of ``POST /v1/inspect``: ``tokens`` from ``start`` on, with ``top`` alternatives each."""

    model: Text | None = None
    tokens: Ids
    start: Count | None = None
    top: Logprobs | None = None


class ErrorDetail(BaseModel):
    """What went wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


_BODIES = (CompletionBody, ChatBody, InspectBody, MessageBody, TextPart, TextFormat, StreamOptions)
FIELDS = frozenset(name for body in _BODIES for name in body.model_fields)
