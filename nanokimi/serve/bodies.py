"""What clients may send: OpenAI's bodies, checked strictly. What this server cannot do is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, model_validator

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
    """A JSON object without unknown fields; null is the same as leaving a field out, a known one or not."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: x for name, x in body.items() if x is not None} if isinstance(body, dict) else body


class StreamOptions(Body):
    """``include_usage`` adds a last chunk with the counts of tokens, ``continuous_usage_stats`` counts in every one."""

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = Field(None, description="only with include_usage")
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    """The one format there is."""

    type: Literal["text"]


class Unsupported(Body):
    """Fields of OpenAI's and of other servers' that only take the value which asks for nothing."""

    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    repetition_penalty: One | None = None
    repeat_penalty: One | None = None
    length_penalty: One | None = None
    typical_p: One | None = None
    min_tokens: Zero | None = None
    use_beam_search: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    logit_bias: NoEntries | None = None
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
    verbosity: None = None
    web_search_options: None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    chat_template_kwargs: NoEntries | None = None


UNSUPPORTED = frozenset(Unsupported.model_fields)


class Sampling(Unsupported):
    """What completions and chat completions have in common.

    Who asks (``user``), which cache would suit (``prompt_cache_key``), and whether tools that are not there may be
    called together (``parallel_tool_calls``) have no effect.
    """

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
    ignore_eos: StrictBool | None = Field(None, description="write on after an end of text or of a turn")
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    safety_identifier: Text | None = Field(None, description="the newer name of user")
    prompt_cache_key: Text | None = None
    parallel_tool_calls: StrictBool | None = None
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
    echo: StrictBool | None = Field(None, description="begin with the prompt; logprobs holds its tokens too")
    logprobs: Logprobs | None = None
    best_of: Choices | None = Field(None, description="only as n")


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text
    cache_control: dict[str, Any] | None = None


class MessageBody(Body):
    """One turn of a talk. ``developer`` is what OpenAI calls ``system`` now.

    Names, hints for caches and what a reply was thought over (``reasoning_content``) have no effect.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None
    cache_control: dict[str, Any] | None = None
    reasoning_content: Text | None = None
    refusal: None = None
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
    echo: Literal[False] | None = None
    best_of: One | None = None


class InspectBody(Body):
    """The body of ``POST /v1/inspect``: ``tokens`` from ``start`` on, with ``top`` alternatives each."""

    model: Text | None = None
    tokens: Ids
    start: Count | None = None
    top: Logprobs | None = None


_BODIES = (CompletionBody, ChatBody, InspectBody, MessageBody, TextPart, TextFormat, StreamOptions)
FIELDS = frozenset(name for body in _BODIES for name in body.model_fields)
