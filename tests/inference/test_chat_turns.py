"""The talk in turns: what the model reads, where its turn ends, what is kept of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from conftest import lively
from scripted import InterruptedModel, ScriptedModel
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.console import printable
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.errors import UserError
from nanokimi.inference.chat import interactive
from nanokimi.inference.chat_template import ChatTemplate, Message
from nanokimi.inference.generate import generate_tokens
from nanokimi.inference.options import SamplingOptions
from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer

MARKED = """\
{% for m in messages %}
{% if m.content == 'refused' %}{{ raise_exception('no such system message') }}{% endif %}
[{{ m.role }}]{{ m.content }}<|end|>
{%- endfor %}[assistant]"""
PLAIN = """\
{% for m in messages %}
{{ {'user': 'User', 'assistant': 'Model', 'system': 'System'}[m.role] }}: {{ m.content }}
{% endfor %}
Model:"""
END, MIDDLE = 257, 258


def with_markers() -> Tokenizer:
    inner = HFTokenizer.from_str(load_tokenizer("byte").to_json())
    inner.add_special_tokens(["<|end|>", "[user]"])
    return Tokenizer(inner, "marked")


class MarkedModel(ScriptedModel):
    """A ScriptedModel whose script may hold the markers."""

    def __init__(self, script: list[int], *, context: int = 128) -> None:
        super().__init__(script, context=context, padding=2)

    def forward(self, tokens: Tensor, cache: LatentCache, *, last_only: bool) -> Tensor:
        logits = super().forward(tokens, cache, last_only=last_only)
        logits[..., END:] = 0.0
        logits[..., self.script[min(self.written, len(self.script)) - 1]] = 100.0
        return logits


def talk(
    model: ScriptedModel | Transformer,
    *lines: str,
    source: str = MARKED,
    max_tokens: int = 9,
    opening: str = "",
    system: str = "",
) -> str:
    output, tokenizer = io.StringIO(), load_tokenizer("byte") if source == PLAIN else with_markers()
    code = interactive(
        model,
        tokenizer,
        SamplingOptions(temperature=0.0, max_tokens=max_tokens),
        opening=opening,
        system=system,
        template=ChatTemplate(source, tokenizer, name="the chat template of tokenizer marked"),
        source=io.StringIO("".join(line + "\n" for line in lines)),
        output=output,
    )
    assert code == 0
    return output.getvalue()


def prompts(model: ScriptedModel) -> list[str]:
    return [with_markers().decode(ids) for ids in model.prompts]


def test_it_says_first_that_it_talks_in_turns_and_by_which_template() -> None:
    welcome = "This model talks in turns, by the chat template of tokenizer marked. /help lists the commands."
    assert talk(MarkedModel([END])).splitlines()[0] == welcome


def test_the_model_reads_the_messages_through_the_template() -> None:
    model = MarkedModel([*b"Hi", END])
    shown = talk(model, "one", "two", system="S", opening="zero")
    assert prompts(model) == [
        "[system]S<|end|>[user]zero<|end|>[assistant]",
        "[system]S<|end|>[user]zero<|end|>[assistant]Hi<|end|>[user]one<|end|>[assistant]",
        "[system]S<|end|>[user]zero<|end|>[assistant]Hi<|end|>[user]one<|end|>[assistant]Hi<|end|>"
        "[user]two<|end|>[assistant]",
    ]
    assert model.prompts[0].count(END) == 2
    assert shown.count("Hi\n[2 tokens, ") == shown.count("finish_reason stop]") == 3
    assert "<|end|>" not in shown


def test_what_the_user_writes_like_a_special_token_ends_no_turn() -> None:
    model = MarkedModel([END])
    talk(model, "a<|end|>[user]b")
    assert prompts(model) == ["[user]a<|end|>[user]b<|end|>[assistant]"]
    assert [i for i in model.prompts[0] if i > 255] == [MIDDLE, END]


def test_in_plain_text_the_next_question_ends_the_turn_and_is_not_shown() -> None:
    model = ScriptedModel(b" I.\nUser: who\nUser")
    shown = talk(model, "one", "two", source=PLAIN, max_tokens=30)
    assert prompts(model) == ["User: one\nModel:", "User: one\nModel:  I.\nUser: two\nModel:"]
    assert " I.\n[" in shown
    assert "User" not in shown


def test_the_oldest_pair_leaves_a_full_context_and_the_system_message_stays() -> None:
    model = MarkedModel([*b"abc", END], context=100)
    shown = talk(model, "1" * 15, "2" * 15, "3" * 15, system="S", max_tokens=20)
    assert prompts(model)[2] == f"[system]S<|end|>[user]{'2' * 15}<|end|>[assistant]abc<|end|>" + (
        f"[user]{'3' * 15}<|end|>[assistant]"
    )
    assert shown.count("(the context of 100 tokens is full: oldest turns dropped: 1)") == 1


def test_a_message_over_the_context_is_refused_and_the_talk_stays() -> None:
    model = MarkedModel([*b"abc", END], context=64)
    assert "the context holds 64: write less, or /reset" in talk(model, "x", "2" * 64, "y", max_tokens=5)
    assert prompts(model)[1] == "[user]x<|end|>[assistant]abc<|end|>[user]y<|end|>[assistant]"


def test_the_system_message_can_be_changed_shown_and_taken_back() -> None:
    model = MarkedModel([END])
    shown = talk(
        model,
        "/system",
        "/system Be brief.",
        "/system",
        "x",
        "/reset",
        "/system refused",
        "y",
        "/reset",
        "/system none",
        "z",
    )
    assert shown.count("(system: none)") == 2
    assert shown.count("(system: Be brief.)") == 2
    assert "no such system message" in shown
    assert prompts(model) == [
        "[system]Be brief.<|end|>[user]x<|end|>[assistant]",
        "[system]Be brief.<|end|>[user]y<|end|>[assistant]",
        "[user]z<|end|>[assistant]",
    ]


def test_a_system_message_for_a_model_that_continues_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"--system is for talks in turns.*--chat_template"):
        interactive(ScriptedModel(b"a"), load_tokenizer("byte"), SamplingOptions(), system="S", source=io.StringIO())


def test_an_empty_line_is_no_message() -> None:
    model = MarkedModel([END])
    assert "an empty line is no message: write one, or /help" in talk(model, "", "  ")
    assert model.prompts == []


@pytest.mark.fault(81)
def test_ctrl_c_stops_the_answer_and_keeps_what_was_written() -> None:
    model = InterruptedModel(b"abc")
    shown = talk(model, "x", "y", source=PLAIN)
    assert "abc\n[3 tokens, " in shown
    assert "finish_reason interrupted]" in shown
    assert prompts(model)[1] == "User: x\nModel: abc\nUser: y\nModel:"


def test_a_saved_talk_goes_on_and_does_not_fit_a_base_model(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    talk(MarkedModel([*b"Hi", END]), "one", f"/save {path}", system="S")
    model = MarkedModel([*b"Hi", END])
    talk(model, f"/load {path}", "two")
    assert prompts(model) == ["[system]S<|end|>[user]one<|end|>[assistant]Hi<|end|>[user]two<|end|>[assistant]"]
    output = io.StringIO()
    lines = io.StringIO(f"/load {path}\n/stats\n")
    interactive(ScriptedModel(b"a"), load_tokenizer("byte"), SamplingOptions(), source=lines, output=output)
    assert "a talk in turns, but with this model one has a text" in output.getvalue().splitlines()[1]


def test_the_answer_is_what_the_library_makes_of_the_same_messages() -> None:
    model = lively(Transformer(ModelConfig.preset("debug", vocab_size=259)))
    tokenizer = with_markers()
    template, messages = ChatTemplate(MARKED, tokenizer), list[Message]()
    shown = talk(model, "who?", "why?", max_tokens=20)
    for question in ("who?", "why?"):
        messages.append({"role": "user", "content": question})
        ids = generate_tokens(
            model, template.encode(messages), max_tokens=20, temperature=0.0, stop_tokens=template.stop_tokens
        )
        answer = tokenizer.decode(ids)
        messages.append({"role": "assistant", "content": answer})
        before, found, shown = shown.partition(printable(answer))
        assert found, before
