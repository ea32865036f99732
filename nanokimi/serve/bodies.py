"""The bodies of requests: OpenAI's fields, checked strictly, and those that other servers have added.

A value that asks for what this server cannot do is refused; one that asks for nothing is accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator

from nanokimi.config import MAX_SEED
from nanokimi.inference.chat_template import Message


def _unicode(text: str) -> str:
    """JSON can escape half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not Unicode text: it holds half of a surrogate pair") from None
    return text


Text = Annotated[str, Field(strict=True), AfterValidator(_unicode)]
# A stop string is short: the end of the text is compared with all beginnings of it, at every token.
Stop = Annotated[str, Field(strict=True, min_length=1, max_length=200)]
Ids = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1)]
Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Choices = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Logprobs = Annotated[int, Field(strict=True, ge=0, le=20)]
Zero = Annotated[float, Field(strict=True, ge=0, le=0)]
One = Annotated[float, Field(strict=True, ge=1, le=1)]
Nothing = Annotated[list[Any], Field(max_length=0)]
NoEntries = Annotated[dict[str, Any], Field(max_length=0)]


class Body(BaseModel):
    """A JSON object without unknown fields; null is the same as leaving a field out."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, json_schema_extra={"additionalProperties": {"type": "null"}}
    )

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        """``given`` without the fields that are null, those that are not known here among them."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class StreamOptions(Body):
    """Counts of tokens: ``include_usage`` in a last chunk, ``continuous_usage_stats`` so far in every chunk."""

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    """The one format there is."""

    type: Literal["text"]


class Unsupported(Body):
    """Fields of OpenAI's and of other servers, on either route, that only take a value which asks for nothing."""

    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    repetition_penalty: One | None = None
    length_penalty: One | None = None
    typical_p: One | None = None
    logit_bias: NoEntries | None = None
    min_tokens: Zero | None = None
    use_beam_search: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    stop_token_ids: Nothing | None = None
    bad_words: Nothing | None = None
    suffix: Literal[""] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
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
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    chat_template_kwargs: NoEntries | None = None


UNSUPPORTED = frozenset(Unsupported.model_fields)


class WithoutEffect(Body):
    """What clients send along and what changes no answer here: who asks, what to cache, how tools would be called."""

    user: Text | None = None
    safety_identifier: Text | None = Field(None, description="the newer name of user")
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None
    cache_prompt: StrictBool | None = None
    parallel_tool_calls: StrictBool | None = Field(None, description="there are no tools to call")


class Sampling(Unsupported, WithoutEffect):
    """What completions and chat completions have in common."""

    model: Text | None = Field(None, description="the served model's name; it is the only one")
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, le=2**31 - 1)] | None = Field(
        None, description="keep so many of the likeliest tokens; 0 and -1 are off"
    )
    min_p: Share | None = Field(None, description="keep tokens at least this likely relative to the likeliest")
    n: Choices | None = None
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] | None = Field(
        None, description="choice i draws with seed + i"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool | None = Field(None, description="go on after the end of the text or of the turn")
    return_token_ids: StrictBool | None = Field(None, description="add prompt_token_ids and token_ids to choices")


class CompletionBody(Sampling):
    """The body of ``POST /v1/completions``."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Ids
        | Annotated[list[Ids | Nothing], Field(min_length=1)]
        | None
    ) = Field(None, description="nothing: a new document")
    echo: StrictBool | None = Field(None, description="begin with the prompt, and logprobs with its tokens")
    logprobs: Annotated[Logprobs | None, BeforeValidator(lambda given: None if given is False else given)] = None
    best_of: Choices | None = Field(None, description="only as n")


class TextPart(Body):
    """A part of a message's content. ``cache_control`` has no effect."""

    cache_control: dict[str, Any] | None = None

    type: Literal["text"]
    text: Text


class MessageBody(Body):
    """One turn of a talk. ``developer`` is what OpenAI calls ``system`` now.

    Who spoke, what was thought before a reply, and what a client wants cached, do not reach the model: a chat template
    knows a role and a text.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    cache_control: dict[str, Any] | None = None
    provider_specific_fields: dict[str, Any] | None = None
    refusal: Literal[""] | None = None
    audio: None = None
    annotations: Nothing | None = None
    function_call: None = None
    tool_calls: Nothing | None = None

    def message(self) -> Message:
        """The turn as the chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Sampling):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens")
    logprobs: StrictBool | None = None
    top_logprobs: Logprobs | None = None


class InspectBody(Body):
    """The body of ``POST /v1/inspect``: ``tokens`` from ``start`` on, with ``top`` alternatives each."""

    model: Text | None = None
    tokens: Ids
    start: Count | None = None
    top: Logprobs | None = None


_BODIES = (CompletionBody, ChatBody, InspectBody, MessageBody, TextPart, TextFormat, StreamOptions)
FIELDS = frozenset(name for body in _BODIES for name in body.model_fields)
