"""``nanokimi serve``: from flags to a server that listens, and to its end."""

from __future__ import annotations

import errno
import socket
import time
from functools import partial
from types import FrameType

import uvicorn

from nanokimi.console import log
from nanokimi.device import resolve_device
from nanokimi.errors import RunError, UserError
from nanokimi.inference.chat_template import chat_template_of
from nanokimi.inference.decoder import Decoder
from nanokimi.inference.decoding import limit_threads, new_decoder, use_weights_
from nanokimi.inference.engine import Engine
from nanokimi.interop.loading import load
from nanokimi.memory import free_memory
from nanokimi.model.transformer import Transformer
from nanokimi.serve.answers import LAST_WORDS
from nanokimi.serve.api import Served
from nanokimi.serve.app import new_app
from nanokimi.serve.arguments import ServeOptions
from nanokimi.serve.metrics import Metrics
from nanokimi.serve.worker import Worker


def run_serve(options: ServeOptions) -> int:
    """Serves until a signal comes.

    Returns:
        128 and the signal's number, as shells report it.

    Raises:
        UserError: a model or a chat template that cannot be loaded, an address that this machine does not have.
        RunError: the port is taken.
    """
    listener = bind(options.rules.host, options.port, options.max_seconds)
    metrics = Metrics()
    worker = Worker(max_queue=options.max_queue, max_seconds=options.max_seconds, metrics=metrics)
    served = worker.ask(partial(prepare, options, worker)).result()
    app = new_app(served, worker, options.rules, metrics, max_body=options.max_body)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=round(LAST_WORDS),
    )
    server = DrainingServer(config, worker, options.drain_seconds, f"{served.name} at {address(listener)}")
    try:
        server.run(sockets=[listener])
    finally:
        worker.stop()
    return 0 if server.signal is None else 128 + server.signal


def prepare(options: ServeOptions, worker: Worker) -> Served:
    """The model, ready to answer; called in the thread of ``worker``."""
    model, tokenizer = load(options.checkpoint, device=resolve_device(options.device))
    template = chat_template_of(tokenizer, options.chat_template)
    use_weights_(model, options.weights)

    def new_engine() -> Engine:
        return Engine(model, tokenizer, decoder=_decoder(model, options), prefill_chunk=options.prefill_chunk)

    engine = worker.use(new_engine)
    limit_threads(model)
    log(f"{engine.slots} slots of {engine.max_length} tokens, {engine.slot_bytes / 1e6:.3g} MB each")
    context, created = engine.max_length, int(time.time())
    most = context if options.max_tokens is None else min(options.max_tokens, context)
    return Served(options.served_name, model, tokenizer, template, context, most, options.max_n, created)


def _decoder(model: Transformer, options: ServeOptions) -> Decoder:
    """UserError if the caches of all slots do not fit into memory: they are reserved, and filled only later."""
    try:
        decoder = new_decoder(model, slots=options.slots, kind=options.decoder, weights=options.weights)
    except RuntimeError as error:
        raise UserError(f"--slots {options.slots}: their caches cannot be had ({error}): lower it") from error
    on_host = next(model.parameters()).device.type == "cpu"
    need, free = decoder.slots * decoder.slot_bytes, free_memory() if on_host else None
    if free is not None and need > free:
        raise UserError(
            f"--slots {options.slots}: their caches take {need >> 20} MiB, and {free >> 20} MiB are free: lower it"
        )
    return decoder


class DrainingServer(uvicorn.Server):
    """Ends in good order.

    The first signal stops new requests, and the server ends when those that run are done or ``drain_seconds`` are
    over. A second signal ends it at once.

    Attributes:
        signal: number of the first, or None.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, drain_seconds: float, about: str) -> None:
        super().__init__(config)
        self.signal: int | None = None
        self._worker, self._drain_seconds, self._about = worker, drain_seconds, about
        self._deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says where."""
        await super().startup(sockets)
        print(f"serving {self._about}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes a signal; ``on_tick`` acts on it."""
        if self.signal is None:
            self.signal = sig
        else:
            self.force_exit = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        if self.signal is not None and not self.should_exit:
            if not self._worker.draining:
                self._worker.draining = True
                self._deadline = time.monotonic() + self._drain_seconds
                log(f"ending: {self._worker.outstanding} sequences are finished first; a second signal ends at once")
            if not self._worker.outstanding or time.monotonic() > self._deadline:
                self._worker.break_off()
                self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int, max_seconds: float) -> socket.socket:
    """A socket with its address, which does not listen yet.

    Raises:
        UserError: the host has no address here, or the port is for administrators.
        RunError: the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"--host {host}: it has no address ({error.strerror}): use 127.0.0.1") from error
    family, _, _, _, own_address = min(found)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # else a client that never reads could hold its connection for ever
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(round(max_seconds * 1000), 2**31 - 1))
    try:
        listener.bind(own_address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise RunError(f"--port {port} of {host} is taken: choose another, or 0 for any free one") from error
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port}: below 1024 they are for administrators: choose 1024 or more") from error
        raise UserError(f"--host {host}: {error.strerror}: use 127.0.0.1, or an address of this machine") from error
    return listener


def address(listener: socket.socket) -> str:
    """Where ``listener`` is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
