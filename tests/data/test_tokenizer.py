from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from nanokimi.data.tokenizer import TextStream, Tokenizer, bpe_size, load_tokenizer, train_bpe
from nanokimi.errors import UserError

TEXT = "def main():\n    return 'hello, naïve old world of many small words'\n" * 20
ODD = [
    "",
    " ",
    "\r\n\t\0\x1b",
    "naïve café",
    "e\u0301 \u200d\ufeff",
    "👩‍👩‍👧 🇩🇪",
    "漢字かな",
    "\U0010ffff",
    "  two  spaces\n\n\n",
    "<|endoftext|>",
    "a<|endoftext|>b",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([TEXT], 300)


@pytest.fixture(params=["byte", "bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
    return {"byte": load_tokenizer("byte"), "bpe": bpe, "sentencepiece": sentencepiece()}[request.param]


def sentencepiece() -> Tokenizer:
    """A small tokenizer in the manner of Llama 2: "▁" for a space and bytes as a last resort."""
    bytes_ = {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    words = {"▁": 258, "a": 259, "▁a": 260}
    model = models.BPE(
        vocab={"<unk>": 0, "</s>": 1, **bytes_, **words}, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"
    )
    inner = HFTokenizer(model)
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["</s>"])
    return Tokenizer(inner, "small")


@pytest.mark.parametrize("text", ODD)
def test_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids


@pytest.mark.parametrize("text", ODD)
def test_bytes_are_counted_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = torch.tensor([*tokenizer.encode(text), tokenizer.eot_id])
    assert tokenizer.count_bytes(ids) == len(text.encode())


def test_special_tokens_in_a_text_are_plain_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eot_id not in tokenizer.encode(f"a{tokenizer.eot}b")


def test_special_tokens_are_shown_and_weigh_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.eot_id]) == tokenizer.eot
    assert tokenizer.count_bytes(torch.tensor(tokenizer.eot_id)) == 0


def test_a_byte_is_its_own_id() -> None:
    byte = load_tokenizer("byte")
    assert byte.encode("aé") == list("aé".encode())
    assert (byte.vocab_size, byte.eot_id) == (257, 256)
    assert [byte.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


def test_bytes_that_are_not_utf8_decode_to_replacement_characters() -> None:
    assert load_tokenizer("byte").decode([0x61, 0xFF, 0x62, 0xC3]) == "a\ufffdb\ufffd"


def test_lone_surrogates_are_refused(bpe: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        bpe.encode("caf\udce9")


def test_the_state_restores_the_tokenizer(tokenizer: Tokenizer) -> None:
    state = tokenizer.to_state()
    again = Tokenizer.from_state(json.loads(json.dumps(state)))
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.name, again.eot_id, again.vocab_size) == (tokenizer.name, tokenizer.eot_id, tokenizer.vocab_size)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_a_bpe_has_exactly_the_entries_asked_for(bpe: Tokenizer) -> None:
    assert (bpe.vocab_size, bpe.eot_id, bpe.eot) == (300, 299, "<|endoftext|>")
    assert len(bpe.encode(TEXT)) < len(TEXT) / 3


def test_a_bpe_of_a_small_text_has_fewer_entries() -> None:
    assert train_bpe(["ab"], 300).vocab_size == 257


def test_a_bpe_too_small_for_all_bytes_is_an_error() -> None:
    with pytest.raises(UserError, match="at least 257"):
        train_bpe([TEXT], 256)


def test_training_a_bpe_is_deterministic_across_processes(bpe: Tokenizer) -> None:
    code = f"from nanokimi.data.tokenizer import train_bpe; print(train_bpe([{TEXT!r}], 300).fingerprint)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == bpe.fingerprint


def test_another_vocabulary_has_another_fingerprint(bpe: Tokenizer) -> None:
    assert len({bpe.fingerprint, train_bpe([TEXT], 299).fingerprint, load_tokenizer("byte").fingerprint}) == 3


def test_a_saved_tokenizer_loads_from_its_file_and_its_folder(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    for name in (tmp_path / "tokenizer.json", tmp_path):
        assert load_tokenizer(str(name)).fingerprint == bpe.fingerprint


def test_padding_and_truncation_of_a_file_are_ignored(bpe: Tokenizer, tmp_path: Path) -> None:
    inner = HFTokenizer.from_str(bpe.to_state()["json"])
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode(TEXT) == bpe.encode(TEXT)


def test_the_end_of_text_comes_from_tokenizer_config(tmp_path: Path) -> None:
    inner = HFTokenizer(models.BPE(vocab={"a": 0, "</s>": 1, "<stop>": 2}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eot_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    stops = load_tokenizer(str(tmp_path))
    assert stops.eot_id == 2
    assert Tokenizer.from_state(stops.to_state()).eot_id == 2


def write_beside(folder: Path, config: str, template: str = "") -> None:
    load_tokenizer("byte").save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(config)
    if template:
        (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(
    ("config", "template", "found"),
    [
        ({"chat_template": "one"}, "", "one"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, "", "d"),
        ({"chat_template": [{"name": "tool_use", "template": "t"}]}, "", None),
        ({"chat_template": "one"}, "of its own", "of its own"),
        ({}, "", None),
    ],
)
def test_the_chat_template_comes_from_the_folder_and_is_carried(
    tmp_path: Path, config: dict[str, object], template: str, found: str | None
) -> None:
    write_beside(tmp_path, json.dumps(config), template)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.chat_template == found
    assert Tokenizer.from_state(json.loads(json.dumps(tokenizer.to_state()))).chat_template == found
    assert tokenizer.fingerprint == load_tokenizer("byte").fingerprint


@pytest.mark.parametrize(
    ("config", "bos"),
    [
        ('{"bos_token": "a"}', "a"),
        ('{"bos_token": {"content": "b"}}', "b"),
        ('{"bos_token": null, "eos_token": "x"}', ""),
        ("{}", "<|endoftext|>"),
    ],
)
def test_the_first_token_of_a_talk_comes_from_the_folder_and_is_carried(tmp_path: Path, config: str, bos: str) -> None:
    write_beside(tmp_path, config)
    tokenizer = Tokenizer.from_state(load_tokenizer(str(tmp_path)).to_state())
    assert tokenizer.bos == bos
    assert tokenizer.bos_id == (ord(bos) if len(bos) == 1 else tokenizer.eot_id)


def test_a_checkpoint_from_before_chat_templates_still_loads() -> None:
    state = {key: value for key, value in load_tokenizer("byte").to_state().items() if key in ("name", "json", "eot")}
    tokenizer = Tokenizer.from_state(state)
    assert (tokenizer.bos, tokenizer.chat_template) == ("<|endoftext|>", None)


@pytest.mark.parametrize("config", ["{", "[1]", "[" * 100_000, '{"chat_template": 1}', '{"chat_template": {"a": "b"}}'])
def test_a_broken_configuration_is_named(tmp_path: Path, config: str) -> None:
    write_beside(tmp_path, config)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: .*repair or remove it"):
        load_tokenizer(str(tmp_path))


def test_a_chat_template_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write_beside(tmp_path, "{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8 at byte 1"):
        load_tokenizer(str(tmp_path))


def test_special_tokens_are_known_by_their_text(bpe: Tokenizer) -> None:
    assert bpe.special_tokens == {"<|endoftext|>": 299}


def test_a_tokenizer_without_an_end_of_text_is_an_error(tmp_path: Path) -> None:
    inner = HFTokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_loses_white_space_is_an_error(tmp_path: Path) -> None:
    inner = HFTokenizer(models.WordLevel(vocab={"a": 0, "</s>": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="cannot be restored"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["a/b/c", "../secret", "", "missing/tokenizer.json", "a b", "x" * 5000 + "/é é"])
def test_an_impossible_name_is_one_line_with_the_alternatives(name: str) -> None:
    with pytest.raises(UserError, match=r"tokenizer_name=byte.*bpe:4096.*tokenizer\.json") as error:
        load_tokenizer(name)
    assert "\n" not in str(error.value)


@pytest.mark.fault(27)
def test_offline_the_alternatives_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"some/model.*cannot be reached.*tokenizer_name=byte") as error:
        load_tokenizer("some/model")
    assert "\n" not in str(error.value)


def test_bpe_sizes_are_read_from_the_name() -> None:
    assert bpe_size("bpe:4096") == 4096
    assert bpe_size("byte") is None
    with pytest.raises(UserError, match="bpe:4096"):
        bpe_size("bpe:many")


@pytest.mark.parametrize("text", ODD)
def test_a_stream_gives_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    stream, ids = TextStream(tokenizer), tokenizer.encode(text)
    assert "".join(map(stream.push, ids)) == tokenizer.decode(ids)


def test_a_stream_never_shows_an_incomplete_character() -> None:
    stream = TextStream(load_tokenizer("byte"))
    assert [stream.push(byte) for byte in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert [stream.push(byte) for byte in "😀".encode()[:3]] == ["", "", ""]


def test_a_stream_shows_special_tokens_as_decoding_does(bpe: Tokenizer) -> None:
    assert TextStream(bpe).push(bpe.eot_id) == "<|endoftext|>"


def test_bytes_are_encoded_as_the_library_would() -> None:
    byte = load_tokenizer("byte")
    for text in ("", "plain", "é😀\r\n\0", "see <|endoftext|> here", "  spaces  and 123's"):
        library = byte._inner.encode(text, add_special_tokens=False).ids
        assert byte.encode(text) == byte.encode_batch([text])[0] == library == list(text.encode())


def test_a_vocabulary_that_could_never_be_filled_is_refused() -> None:
    with pytest.raises(UserError, match="bpe:1099511627776: at most 16,777,216 entries can be learned"):
        train_bpe(["text"], 1 << 40)
