"""One thread owns the engine; the event loop hands it jobs and gets text back, one wake-up per engine step."""

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
from typing import NamedTuple, TypeVar

from nanokimi.inference.engine import Continuation, Engine, GenerationArguments, Token
from nanokimi.serve.api import ApiError
from nanokimi.serve.metrics import Metrics

RETRY = {"Retry-After": "1"}
GATHERING = 0.02  # seconds: fifty times a second looks like a flow
T = TypeVar("T")


class End(NamedTuple):
    """How a sequence ended: ``finish_reason`` is None when it was broken off."""

    finish_reason: str | None = None
    tokens: int = 0
    error: str = ""


class Update(NamedTuple):
    """What is new of one choice of a job: text with its tokens, the end, or both."""

    choice: int
    text: str = ""
    tokens: Sequence[Token] = ()
    end: End | None = None


class Job:
    """The sequences of one request, as the event loop sees them; choice i comes from the i-th of ``arguments``."""

    timer: asyncio.TimerHandle

    def __init__(self, arguments: Sequence[GenerationArguments]) -> None:
        self.arguments = arguments
        self.running = len(arguments)  # sequences that have not ended yet
        self.tokens = 0  # what those that have ended have written
        self.error: ApiError | None = None  # why there will be no (further) answer
        self.arrived = time.perf_counter()
        self.last_news: dict[int, float] = {}  # when the latest tokens of each choice came that has any
        self._updates: dict[int, list[Update]] = {}  # by choice
        self._changed = asyncio.Event()

    async def news(self, *, whole: bool = False) -> list[Update]:
        """Waits for something new, or for the end of the ``whole``, and takes it as one update for each choice.

        Whoever asks late gets all that has come by then: what waits here is never more than the text itself. Once
        everything is taken, there is ``error`` or an empty list.
        """
        while self.running and self.error is None and (whole or not self._updates):
            self._changed.clear()
            await self._changed.wait()
        if self.error is not None and (whole or not self._updates):
            raise self.error
        updates, self._updates = self._updates, {}
        return [
            Update(choice, "".join(u.text for u in own), tuple(chain(*(u.tokens for u in own))), own[-1].end)
            for choice, own in updates.items()
        ]

    def add(self, update: Update) -> None:
        """Keeps what is new until it is asked for; nothing more once the job is broken off."""
        if self.error is None:
            self._updates.setdefault(update.choice, []).append(update)
            self._changed.set()

    def fail(self, error: ApiError) -> None:
        """Breaks the job off for whoever waits for it."""
        self.error = self.error or error
        self._changed.set()


class Worker:
    """The thread for everything that the model does, from loading on, and the way to it from the event loop.

    PyTorch's OpenMP runtime keeps a team of threads for each thread that ever computed something. More threads in all
    teams than there are cores, and the teams no longer spin between two steps: a small model takes twice as long.
    The thread is a daemon: whatever it does, the program can end. Sequences that wait or run are counted on the event
    loop, so that a full queue is known without asking the thread.
    """

    _loop: asyncio.AbstractEventLoop
    _new_engine: Callable[[], Engine]

    def __init__(self, *, max_queue: int, max_seconds: float, metrics: Metrics) -> None:
        self.max_queue = max_queue  # most sequences that wait for a slot
        self.max_seconds = max_seconds  # from a request's arrival to its end
        self._metrics = metrics
        self.slots = self.slot_bytes = 0  # of the engine
        self.capacity = 0  # most sequences that run or wait
        self.outstanding = 0  # sequences accepted and not ended
        self.draining = False  # nothing new is accepted
        self.failures, self.last_failure = 0, ""  # how often an engine failed altogether; when and how it last did
        self._engine: Engine | None = None
        self._jobs: set[Job] = set()
        self._owners: dict[Continuation, tuple[Job, int]] = {}  # job and choice of each sequence; the thread's alone
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._told = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """Calls ``function`` in the thread, between two steps of the engine."""
        future: Future[T] = Future()

        def answer() -> None:
            if future.set_running_or_notify_cancel():  # otherwise nobody waits any more
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        self._orders.put(answer)
        return future

    def use(self, new_engine: Callable[[], Engine]) -> Engine:
        """Makes the engine, and another one whenever one has failed altogether; called before there is any job."""
        self._new_engine, self._engine = new_engine, new_engine()
        self.slots, self.slot_bytes = self._engine.slots, self._engine.slot_bytes
        self.capacity = self.slots + self.max_queue
        return self._engine

    def stop(self) -> None:
        """Ends the thread within a step; nothing happens when it has ended."""
        self._orders.put(None)
        self._thread.join()

    # ---- on the event loop ----------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Sequences in slots."""
        engine = self._engine  # the thread may take it away at any time
        return 0 if engine is None else engine.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return max(0, self.outstanding - self.running)

    def submit(self, arguments: Sequence[GenerationArguments]) -> Job:
        """Queues a sequence for each of ``arguments``; whoever submits calls ``close``.

        None is queued and ApiError is raised while draining (503), and if there is no room now (429) or ever (400).
        """
        self._reserve(len(arguments))
        job = Job(arguments)
        self._loop = asyncio.get_running_loop()
        job.timer = self._loop.call_later(self.max_seconds, self._fail, job, self._too_long())
        self._jobs.add(job)
        self._orders.put(partial(self._begin, job))
        return job

    def close(self, job: Job) -> None:
        """Forgets ``job``; what still runs of it is cancelled before the engine's next step."""
        job.timer.cancel()
        self._jobs.discard(job)
        if job.running:
            self._orders.put(partial(self._abandon, job))

    def break_off(self) -> None:
        """Ends every job that still runs with an error: the time to drain is over."""
        for job in tuple(self._jobs):
            if job.running:  # otherwise its text is only waiting to be read
                self._fail(job, ApiError(503, "the server is shutting down"))

    async def call(self, function: Callable[[], T]) -> T:
        """As ``ask``, for a request: it counts as a sequence, has ``max_seconds``, and is refused as by ``submit``."""
        self._reserve(1)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self.ask(function)), self.max_seconds)
        except asyncio.TimeoutError:
            raise self._too_long() from None
        finally:
            self.outstanding -= 1

    def _reserve(self, count: int) -> None:
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers=RETRY)
        if count > self.capacity:
            raise ApiError(400, f"{count} choices in all, and the server holds {self.capacity}: send fewer prompts")
        if self.outstanding + count > self.capacity:
            self._metrics.queue_refusals += 1
            raise ApiError(429, "the queue is full: try again later", headers=RETRY)
        self.outstanding += count

    def _too_long(self) -> ApiError:
        message = f"the request took longer than {self.max_seconds:g} seconds (--max_seconds)"
        return ApiError(504, message, code="timeout")

    def _fail(self, job: Job, error: ApiError) -> None:
        job.fail(error)
        self.close(job)

    def _deliver(self, news: list[tuple[Job, Update]]) -> None:
        now = time.perf_counter()
        for job, update in news:
            choice, end = update.choice, update.end
            if update.tokens:
                waited, first = now - job.last_news.get(choice, job.arrived), choice not in job.last_news
                self._metrics.count_tokens(len(update.tokens), waited, first=first)
                job.last_news[choice] = now
            if end is not None:
                job.running -= 1
                job.tokens += end.tokens
                self.outstanding -= 1
            if end is not None and end.error:
                job.add(update._replace(end=None))
                self._fail(job, ApiError(500, end.error))
            else:
                job.add(update)

    # ---- on the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        """Follows orders, and steps while there are none; a failure ends all sequences and the engine."""
        while True:
            busy = self._engine is not None and not self._engine.idle
            action = self._step if busy and self._orders.empty() else self._orders.get()
            if action is None:
                return
            try:
                action()
            except Exception as error:
                self.last_failure = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {type(error).__name__}: {error}"
                self.failures += 1
                self._engine = None
                end = End(error="the engine failed (GET /health says why); the next request starts it anew")
                self._publish([(job, Update(choice, end=end)) for job, choice in self._owners.values()])
                self._owners.clear()

    def _begin(self, job: Job) -> None:
        for choice, arguments in enumerate(job.arguments):
            try:
                if self._engine is None:
                    self._engine = self._new_engine()
                sequence = self._engine.submit(arguments)
            except Exception as error:
                self._publish([(job, Update(choice, end=End(error=f"{error}")))])
            else:
                self._owners[sequence] = job, choice
                if sequence.done:  # there was nothing to write
                    self._report([sequence])

    def _abandon(self, job: Job) -> None:
        for sequence, (owner, choice) in tuple(self._owners.items()):
            if owner is job and self._engine is not None:
                self._engine.cancel(sequence)
                del self._owners[sequence]
                self._publish([(job, Update(choice, end=End()))])

    def _step(self) -> None:
        assert self._engine is not None
        self._report(self._engine.step())

    def _report(self, sequences: Sequence[Continuation]) -> None:
        """Tells what is new; the text of several gathers for a moment, which saves most wake-ups and events."""
        now = time.monotonic()
        due = len(sequences) == 1 or now - self._told > GATHERING
        if due:
            self._told = now
        news = []
        for sequence in sequences:
            if not due and not sequence.done:
                continue
            job, choice = self._owners[sequence]
            (text, tokens), end = sequence.take() or ("", ()), None
            if sequence.done:
                del self._owners[sequence]
                result, error = sequence.result, sequence.error
                end = End(result.finish_reason, result.tokens, f"{error}" if error else "")
            if text or tokens or end:
                news.append((job, Update(choice, text, tokens, end)))
        self._publish(news)

    def _publish(self, news: list[tuple[Job, Update]]) -> None:
        """One wake-up of the event loop for all that is new."""
        if news:
            with suppress(RuntimeError):  # the loop is closed: the program ends
                self._loop.call_soon_threadsafe(self._deliver, news)
