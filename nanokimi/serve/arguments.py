"""The flags of ``nanokimi serve``, checked. Imports nothing heavy, so that ``--help`` stays fast."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hmac
import ipaddress
import math
import os
import re
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanokimi.errors import UserError
from nanokimi.inference.options import DECODERS, PREFILL_CHUNK, WEIGHT_FORMATS

KEY_VARIABLE = "NANOKIMI_API_KEY"
_HOST_NAME = re.compile(r"(?!-)[a-z0-9-]+(\.[a-z0-9-]+)*", re.IGNORECASE)
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?", re.IGNORECASE)
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Rules:
    """Who may ask the server."""

    host: str = "127.0.0.1"  # the address that the server listens on
    allowed_hosts: tuple[str, ...] = ()  # further names of the server, in lower case
    allowed_origins: tuple[str, ...] = ()  # other sites whose scripts may use it, such as https://example.org
    api_key: str | None = field(default=None, repr=False)  # None if no key is needed

    def host_is_ours(self, value: str) -> bool:
        """Whether a Host header names this server.

        A foreign page can reach a server on loopback by a name of its own that resolves to 127.0.0.1 (DNS rebinding).
        An address cannot be rebound, so a server on all interfaces accepts any address.
        """
        try:
            name = (urlsplit(f"//{value}").hostname or "").removesuffix(".")
        except ValueError:
            return False
        if name in ("localhost", self.host, *self.allowed_hosts):
            return True
        address, own = ip_address(name), ip_address(self.host)
        return address is not None and (address.is_loopback or (own is not None and own.is_unspecified))

    def origin_is_ours(self, origin: str, host: str) -> bool:
        """Whether an Origin header names the page that came from ``host``, or an allowed one; ``null`` does not."""
        if origin.lower() in self.allowed_origins:
            return True
        scheme, _, rest = origin.lower().partition("://")
        port = {"http": ":80", "https": ":443"}.get(scheme)
        return port is not None and rest.removesuffix(port) == host.lower().removesuffix(port)

    def key_is_right(self, authorization: str) -> bool:
        """Whether the header holds the key: as ``Bearer``, or as the password of ``Basic``, which browsers ask for."""
        if self.api_key is None:
            return True
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(value.strip().encode(), self.api_key.encode())


def ip_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that ``name`` spells out, or None."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``."""
    address = ip_address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _flag(default: Any, about: str, **more: Any) -> Any:
    """A field that is a flag: its help, further arguments of ``add_argument``, and the ``least`` that it may be."""
    return field(default=default, metadata={"help": about, **more})


_count = partial(_flag, metavar="N", type=int)
_seconds = partial(_flag, metavar="SECONDS", type=float)


@dataclass(frozen=True)
class ServeOptions:
    """What the user asked of ``nanokimi serve``; UserError names the flag whose value is out of range."""

    checkpoint: str
    rules: Rules
    port: int = _count(8000, "0 takes any free one (%(default)s)", least=0)
    slots: int = _count(16, "sequences that are written together (%(default)s)", least=1)
    max_queue: int = _count(128, "sequences that wait for a slot; more are refused (%(default)s)", least=0)
    max_tokens: int | None = _count(None, "most tokens a request may ask for (default: the context)", least=1)
    max_n: int = _count(8, "most choices for a prompt (%(default)s)", least=1)
    max_body: int = _count(1 << 20, "bytes of a request (%(default)s)", least=1)
    prefill_chunk: int = _count(
        PREFILL_CHUNK, "prompt tokens read between two tokens of other sequences (%(default)s)", least=1
    )
    max_seconds: float = _seconds(600.0, "most time for a request (%(default)g)")
    drain_seconds: float = _seconds(30.0, "most time for running requests after SIGTERM (%(default)g)")
    model_name: str = _flag("", "for clients (default: that of the file or folder)", metavar="NAME")
    chat_template: str = _flag(
        "", "a Jinja template that turns messages into text; none: no chat (default: the tokenizer's)", metavar="FILE"
    )
    device: str = _flag("auto", "auto, cpu, cuda, cuda:N or mps (%(default)s)")
    weights: str = _flag("fp32", "what weights are kept in (%(default)s)", choices=WEIGHT_FORMATS)
    decoder: str = _flag("auto", "PyTorch, compiled kernels or CUDA graphs (%(default)s)", choices=DECODERS)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port must be from 1 to 65535, or 0 for any free one, got {self.port}")
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least")
            if value is not None and least is not None and value < least:
                raise UserError(f"--{f.name} must be {least} or more, got {value}")
        if not 0 < self.max_seconds < math.inf:
            raise UserError(f"--max_seconds must be positive and finite, got {self.max_seconds:g}")
        if not 0 <= self.drain_seconds < math.inf:
            raise UserError(f"--drain_seconds must be 0 or more and finite, got {self.drain_seconds:g}")

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.model_name or Path(self.checkpoint).resolve().name


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ``options_of`` reads."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a folder in Hugging Face format")
    add("--host", default=Rules.host, help="address to listen on; any but loopback needs a key (%(default)s)")
    for f in dataclasses.fields(ServeOptions):
        if f.metadata:
            more = {name: value for name, value in f.metadata.items() if name != "least"}
            add(f"--{f.name}", default=f.default, **more)
    add("--api_key_file", default="", metavar="FILE", help=f"holds the key (default: ${KEY_VARIABLE})")
    about = "another name of this server; may be given several times"
    add("--allowed_host", action="append", default=[], metavar="NAME", help=about)
    about = "whose pages may use it, as https://example.org; may be given several times"
    add("--allowed_origin", action="append", default=[], metavar="ORIGIN", help=about)


def options_of(args: argparse.Namespace) -> ServeOptions:
    """What the flags and the environment ask for; UserError if it cannot be done, or a package is missing."""
    if not args.host:
        raise UserError("--host is empty: name an address to listen on, such as 127.0.0.1")
    for name in args.allowed_host:
        if not _HOST_NAME.fullmatch(name) and ip_address(name) is None:
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
    hosts, origins = (tuple(map(str.lower, names)) for names in (args.allowed_host, args.allowed_origin))
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(ServeOptions) if f.name != "rules"}
    return ServeOptions(rules=Rules(args.host.lower(), hosts, origins, key), **given)


def _api_key(path: str) -> str | None:
    """The key; it is never a flag, which every user of the machine could see in the list of processes."""
    key, source = os.environ.get(KEY_VARIABLE), f"${KEY_VARIABLE}"
    if path:
        source = f"--api_key_file {path}"
        try:
            key = Path(path).read_text(encoding="ascii").strip()
        except OSError as error:
            raise UserError(f"{source}: {error.strerror}: name a file that holds the key") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: the key must be ASCII") from error
    if key is not None and not _KEY.fullmatch(key):
        raise UserError(f"{source}: the key must be one word of visible ASCII characters")
    return key
