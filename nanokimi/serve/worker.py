"""One thread owns the engine; the event loop hands it requests and gets text back, one wake-up per engine step."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from nanokimi.inference.engine import Continuation, Engine, GenerationArguments, TextChunk
from nanokimi.serve.errors import FAILED, ApiError
from nanokimi.serve.metrics import Metrics

RETRY = {"Retry-After": "1"}
GATHERING = 0.02  # seconds: fifty times a second looks like a flow
T = TypeVar("T")
V = TypeVar("V")


class EngineThread:
    """One thread for everything that the model does, from loading on.

    PyTorch's OpenMP runtime keeps a team of threads for each thread that ever computed something. More threads in all
    teams than there are cores, and the teams no longer spin between two steps: a small model takes twice as long.
    It is a daemon: whatever it does, the program can end.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Calls ``function`` when the calls before it are done."""
        future: Future[T] = Future()
        self._calls.put(partial(_fulfil, future, function, *arguments))
        return future

    def _run(self) -> None:
        while True:
            self._calls.get()()


def _fulfil(future: Future[T], function: Callable[..., T], *arguments: Any) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)


class End(NamedTuple):
    """How a sequence ended: ``finish_reason`` is None when it was broken off."""

    finish_reason: str | None = None
    tokens: int = 0
    error: str = ""


class Update(NamedTuple):
    """What is new of one choice of a job: text, its end, or both."""

    choice: int
    piece: TextChunk | None
    end: End | None


class Owner(NamedTuple):
    """Whose choice a sequence of the engine is."""

    job: Job
    choice: int
    sequence: Continuation


class Job:
    """The sequences of one HTTP request, as the event loop sees them.

    Attributes:
        requests: choice i comes from the i-th.
        running: sequences that have not ended yet.
        error: why there will be no (further) answer.
    """

    def __init__(self, requests: Sequence[GenerationArguments]) -> None:
        self.requests = tuple(requests)
        self.running = len(self.requests)
        self.error: ApiError | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.last_news = [time.perf_counter()] * self.running
        self.begun = [False] * self.running
        self._updates: list[Update] = []
        self._news: asyncio.Future[None] | None = None

    async def news(self) -> list[Update]:
        """Waits for something new and takes it; empty once all is taken.

        Whoever asks late gets all that has come by then: what waits here is never more than the text itself.

        Raises:
            ApiError: the job was broken off, and what it had written by then is taken.
        """
        while not self._updates and self.running and self.error is None:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        if not self._updates and self.error is not None:
            raise self.error
        updates, self._updates = self._updates, []
        return updates if len(updates) == 1 else _merged(updates)

    def add(self, update: Update) -> None:
        """Keeps what is new until it is asked for; nothing more once the job is broken off."""
        if self.error is None:
            self._updates.append(update)
            self._wake()

    def fail(self, error: ApiError) -> None:
        """Breaks the job off for whoever waits for it."""
        self.error = self.error or error
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class Worker:
    """The engine's thread, and the way to it from the event loop.

    Every public method is called on the event loop. Sequences that wait or run are counted there, so that a full
    queue is known without asking the thread.

    Args:
        new_engine: makes another engine when one has failed altogether.
        max_queue: most sequences that wait for a slot.
        max_seconds: from a request's arrival to its end.
        thread: the one thread in which the model has worked so far (default: a new one).

    Attributes:
        outstanding: sequences accepted and not ended.
        draining: nothing new is accepted.
        failures: how often an engine failed altogether; ``last_failure`` says when and how.
    """

    def __init__(
        self,
        engine: Engine,
        new_engine: Callable[[], Engine],
        *,
        max_queue: int,
        max_seconds: float,
        metrics: Metrics,
        thread: EngineThread | None = None,
    ) -> None:
        self.slots, self.slot_bytes = engine.slots, engine.slot_bytes
        self.capacity = engine.slots + max_queue
        self.outstanding = 0
        self.draining = False
        self.failures = 0
        self.last_failure = ""
        self.max_seconds = max_seconds
        self._metrics = metrics
        self._engine: Engine | None = engine
        self._new_engine = new_engine
        self._jobs: set[Job] = set()
        self._owners: dict[int, Owner] = {}  # by id of the sequence; the thread's alone
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = thread or EngineThread()
        self._work: Future[None] | None = None
        self._told = 0.0
        self._loop: asyncio.AbstractEventLoop

    # ---- on the event loop ----------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread; news go to the loop that is running now."""
        self._loop = asyncio.get_running_loop()
        self._work = self._thread.submit(self._run)

    def stop(self) -> None:
        """Ends the work within a step; nothing happens when it has ended."""
        self._orders.put(None)
        if self._work is not None:
            self._work.result()

    @property
    def running(self) -> int:
        """Sequences in slots."""
        engine = self._engine
        return 0 if engine is None else engine.running

    @property
    def waiting(self) -> int:
        """Sequences behind them."""
        return max(0, self.outstanding - self.running)

    def submit(self, requests: Sequence[GenerationArguments]) -> Job:
        """Queues all of ``requests`` or none of them; whoever submits calls ``close``.

        Raises:
            ApiError: 503 while draining, 429 when the queue has no room, 400 when it never will.
        """
        self._reserve(len(requests))
        job = Job(requests)
        job.timer = self._loop.call_later(self.max_seconds, self._expire, job)
        self._jobs.add(job)
        self._orders.put(partial(self._begin, job))
        return job

    def close(self, job: Job) -> None:
        """Forgets ``job``; what still runs of it is cancelled before the engine's next step."""
        if job.timer is not None:
            job.timer.cancel()
        self._jobs.discard(job)
        if job.running:
            self._orders.put(partial(self._abandon, job))

    def break_off(self) -> None:
        """Ends every job with an error: the time to drain is over."""
        for job in tuple(self._jobs):
            self._fail(job, ApiError(503, "the server is shutting down", kind=FAILED))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """What ``function`` makes of the engine, between two steps; meanwhile it takes a place in the queue.

        Raises:
            ApiError: as ``submit``; and whatever ``function`` raises.
        """
        self._reserve(1)
        answer: asyncio.Future[T] = self._loop.create_future()
        self._orders.put(partial(self._answer, function, answer))
        try:
            return await asyncio.wait_for(answer, self.max_seconds)
        except asyncio.TimeoutError:
            raise self._too_long() from None
        finally:
            self.outstanding -= 1

    def _reserve(self, count: int) -> None:
        if self.draining:
            raise ApiError(503, "the server is shutting down", kind=FAILED, headers=RETRY)
        if count > self.capacity:
            raise ApiError(400, f"{count} choices in all, and the server holds {self.capacity}: send fewer prompts")
        if self.outstanding + count > self.capacity:
            self._metrics.queue_refusals += 1
            raise ApiError(429, "the queue is full: try again later", kind="rate_limit_error", headers=RETRY)
        self.outstanding += count

    def _too_long(self) -> ApiError:
        limit = f"{self.max_seconds:g} seconds (--max_seconds)"
        return ApiError(504, f"the request took longer than {limit}", kind=FAILED, code="timeout")

    def _expire(self, job: Job) -> None:
        self._fail(job, self._too_long())

    def _fail(self, job: Job, error: ApiError) -> None:
        job.fail(error)
        self.close(job)

    def _deliver(self, news: list[tuple[Job, Update]]) -> None:
        """Takes over what a step has brought."""
        now = time.perf_counter()
        for job, update in news:
            index, piece, end = update
            if piece is not None and piece.tokens:
                self._metrics.take(len(piece.tokens), now - job.last_news[index], first=not job.begun[index])
                job.last_news[index], job.begun[index] = now, True
            if end is not None:
                job.running -= 1
                self.outstanding -= 1
                if end.error:
                    job.add(Update(index, piece, None))
                    self._fail(job, ApiError(500, end.error, kind=FAILED))
            job.add(update)

    # ---- on the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            while self._idle or not self._orders.empty():
                order = self._orders.get()
                if order is None:
                    return
                self._guarded(order)
            self._guarded(self._step)

    @property
    def _idle(self) -> bool:
        return self._engine is None or self._engine.idle

    def _guarded(self, action: Callable[[], None]) -> None:
        """Runs ``action``; when that fails, all sequences end with an error and the next job gets a new engine."""
        try:
            action()
        except Exception as error:
            self.last_failure = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {type(error).__name__}: {error}"
            self.failures += 1
            self._engine = None
            message = "the engine failed (GET /health says why); the next request starts it anew"
            self._publish([(job, Update(index, None, End(error=message))) for job, index, _ in self._owners.values()])
            self._owners.clear()

    def _ready_engine(self) -> Engine:
        if self._engine is None:
            self._engine = self._new_engine()
        return self._engine

    def _begin(self, job: Job) -> None:
        for index, request in enumerate(job.requests):
            try:
                sequence = self._ready_engine().submit(request)
            except Exception as error:
                self._publish([(job, Update(index, None, End(error=f"{error}")))])
            else:
                self._owners[id(sequence)] = Owner(job, index, sequence)
                if sequence.done:  # there was nothing to write
                    self._report([sequence])

    def _abandon(self, job: Job) -> None:
        for key, (owner, index, sequence) in tuple(self._owners.items()):
            if owner is job:
                self._ready_engine().cancel(sequence)
                del self._owners[key]
                self._publish([(job, Update(index, None, End()))])

    def _answer(self, function: Callable[[Engine], T], answer: asyncio.Future[T]) -> None:
        if answer.cancelled():
            return
        try:
            tell = partial(_settle, answer.set_result, function(self._ready_engine()))
        except Exception as error:
            tell = partial(_settle, answer.set_exception, error)
        self._tell(tell)

    def _step(self) -> None:
        self._report(self._ready_engine().step())

    def _report(self, sequences: Sequence[Continuation]) -> None:
        """Tells what is new; the text of several gathers for a moment, which saves most wake-ups and events."""
        now = time.monotonic()
        due = len(sequences) == 1 or now - self._told > GATHERING
        if due:
            self._told = now
        news, ended = [], []
        for sequence in sequences:
            if not due and not sequence.done:
                continue
            piece, end = sequence.take(), None
            if sequence.done:
                ended.append(id(sequence))
                end = _end_of(sequence)
            if piece is not None or end is not None:
                owner = self._owners[id(sequence)]
                news.append((owner.job, Update(owner.choice, piece, end)))
        self._publish(news)
        for key in ended:
            del self._owners[key]

    def _publish(self, news: list[tuple[Job, Update]]) -> None:
        """One wake-up of the event loop for all that is new."""
        if news:
            self._tell(partial(self._deliver, news))

    def _tell(self, callback: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: the program ends
            self._loop.call_soon_threadsafe(callback)


def _end_of(sequence: Continuation) -> End:
    result = sequence.result
    return End(result.finish_reason, result.tokens, f"{sequence.error}" if sequence.error else "")


def _merged(updates: Sequence[Update]) -> list[Update]:
    """One update for each choice, for a reader who has fallen behind."""
    by_choice: dict[int, list[Update]] = {}
    for update in updates:
        by_choice.setdefault(update.choice, []).append(update)
    return [Update(index, _joined(group), group[-1].end) for index, group in by_choice.items()]


def _joined(updates: Sequence[Update]) -> TextChunk | None:
    pieces = [update.piece for update in updates if update.piece is not None]
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    return TextChunk("".join(piece.text for piece in pieces), tuple(chain(*(piece.tokens for piece in pieces))))


def _settle(settle: Callable[[V], None], value: V) -> None:
    with suppress(asyncio.InvalidStateError):  # nobody waits any more
        settle(value)
