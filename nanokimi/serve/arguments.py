"""The flags of ``nanokimi serve``, checked. Imports nothing heavy, so that ``--help`` stays fast."""

from __future__ import annotations

import argparse
import math
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nanokimi.cli_settings import spellings
from nanokimi.errors import UserError
from nanokimi.inference.options import DECODERS, PREFILL_CHUNK, WEIGHT_FORMATS
from nanokimi.serve.rules import Rules, is_address, is_loopback

KEY_VARIABLE = "NANOKIMI_API_KEY"
_HOST_NAME = re.compile(r"(?!-)[a-z0-9-]+(\.[a-z0-9-]+)*", re.IGNORECASE)
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?", re.IGNORECASE)
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class ServeOptions:
    """What ``nanokimi serve`` is told; checked.

    Attributes:
        max_tokens: None: the model's context.
        model_name: empty: the name of the checkpoint's file or folder.
        chat_template: see ``chat_template.chat_template_of``.

    Raises:
        UserError: a value that cannot be; the message names the flag.
    """

    checkpoint: str
    rules: Rules
    port: int = 8000
    slots: int = 16
    max_queue: int = 128
    max_tokens: int | None = None
    max_n: int = 8
    max_body: int = 1 << 20
    prefill_chunk: int = PREFILL_CHUNK
    max_seconds: float = 600.0
    drain_seconds: float = 30.0
    model_name: str = ""
    chat_template: str = ""
    device: str = "auto"
    weights: str = "fp32"
    decoder: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port must be from 1 to 65535, or 0 for any free one, got {self.port}")
        for name, least in (
            ("slots", 1), ("max_queue", 0), ("max_tokens", 1), ("max_n", 1), ("max_body", 1),
            ("prefill_chunk", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name} must be {least} or more, got {value}")
        if not 0 < self.max_seconds < math.inf:
            raise UserError(f"--max_seconds must be positive and finite, got {self.max_seconds:g}")
        if not 0 <= self.drain_seconds < math.inf:
            raise UserError(f"--drain_seconds must be 0 or more and finite, got {self.drain_seconds:g}")

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.model_name or Path(self.checkpoint).resolve().name


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``options_of``; their defaults are those of ``ServeOptions``."""
    default = ServeOptions("", Rules())
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a folder in Hugging Face format")
    add("--host", default=default.rules.host, help="address to listen on; any but loopback needs a key (%(default)s)")
    for name, about in (
        ("port", "0 takes any free one (%(default)s)"),
        ("slots", "sequences that are written together (%(default)s)"),
        ("max_queue", "sequences that wait for a slot; more are refused (%(default)s)"),
        ("max_tokens", "most tokens a request may ask for (default: the context)"),
        ("max_n", "most choices for a prompt (%(default)s)"),
        ("max_body", "bytes of a request (%(default)s)"),
        ("prefill_chunk", "prompt tokens read between two tokens of other sequences (%(default)s)"),
    ):
        add(*spellings(name), type=int, default=getattr(default, name), metavar="N", help=about)
    for name, about in (("max_seconds", "for a request"), ("drain_seconds", "for running requests after SIGTERM")):
        add(
            *spellings(name), type=float, default=getattr(default, name), metavar="SECONDS",
            help=f"most time {about} (%(default)g)",
        )  # fmt: skip
    add(*spellings("api_key_file"), default="", metavar="FILE", help=f"holds the key (default: ${KEY_VARIABLE})")
    for name, target, about in (
        ("allowed_host", "NAME", "another name of this server; may be given several times"),
        ("allowed_origin", "ORIGIN", "whose pages may use it, as https://example.org; may be given several times"),
    ):
        add(*spellings(name), action="append", default=[], metavar=target, help=about)
    add(*spellings("model_name"), default="", metavar="NAME", help="for clients (default: that of the file or folder)")
    about = "a Jinja template that turns messages into text; none: no chat (default: the tokenizer's)"
    add(*spellings("chat_template"), default="", metavar="FILE", help=about)
    add("--device", default=default.device, help="auto, cpu, cuda, cuda:N or mps (%(default)s)")
    add("--weights", choices=WEIGHT_FORMATS, default=default.weights, help="what weights are kept in (%(default)s)")
    about = "PyTorch, compiled kernels or CUDA graphs (%(default)s)"
    add("--decoder", choices=DECODERS, default=default.decoder, help=about)


def options_of(args: argparse.Namespace) -> ServeOptions:
    """The options that the flags and the environment give.

    Raises:
        UserError: a value that cannot be, or a package that is missing.
    """
    if not args.host:
        raise UserError("--host is empty: name an address to listen on, such as 127.0.0.1")
    for name in args.allowed_host:
        if not _HOST_NAME.fullmatch(name) and not is_address(name):
            raise UserError(f"--allowed_host {name}: give a name without scheme and port, such as example.org")
    for origin in args.allowed_origin:
        if not _ORIGIN.fullmatch(origin):
            raise UserError(f"--allowed_origin {origin}: give scheme and name, such as https://example.org")
    key = _api_key(args.api_key_file)
    if key is None and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host}: others can reach it, so it needs a key: --api_key_file FILE or ${KEY_VARIABLE}"
        )
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"nanokimi serve needs {package}: pip install 'nanokimi[serve]'")
    rules = Rules(
        args.host.lower(), tuple(map(str.lower, args.allowed_host)), tuple(map(str.lower, args.allowed_origin)), key
    )
    return ServeOptions(
        args.checkpoint, rules, args.port, args.slots, args.max_queue, args.max_tokens, args.max_n, args.max_body,
        args.prefill_chunk, args.max_seconds, args.drain_seconds, args.model_name, args.chat_template, args.device,
        args.weights, args.decoder,
    )  # fmt: skip


def _api_key(path: str) -> str | None:
    """The key; it is never a flag, which every user of the machine could see in the list of processes."""
    if path:
        try:
            key, source = Path(path).read_text(encoding="ascii").strip(), f"--api_key_file {path}"
        except OSError as error:
            raise UserError(f"--api_key_file {path}: {error.strerror}: name a file that holds the key") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--api_key_file {path}: the key must be ASCII") from error
    elif KEY_VARIABLE in os.environ:
        key, source = os.environ[KEY_VARIABLE], f"${KEY_VARIABLE}"
    else:
        return None
    if not _KEY.fullmatch(key):
        raise UserError(f"{source}: the key must be one word of visible ASCII characters")
    return key
