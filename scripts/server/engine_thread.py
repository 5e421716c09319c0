"""The engine in a thread of its own, and requests in asyncio: who talks to whom, and what is counted.

The engine is not thread-safe, so one thread owns it. Requests put commands into its inbox; between two steps it obeys
them, and after each step it hands all news to the event loop at once. `unfinished` counts the sequences that are
promised or running; it changes only in the event loop, so it needs no lock.
"""

import asyncio
import queue
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from model.cli import first_line
from model.inference.engine import Engine, SamplingParams, Sequence

BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # of the time to the first token, in seconds


class QueueFull(Exception):
    """All places are taken and enough requests wait already."""


class Stopping(Exception):
    """The server finishes what runs and takes nothing new."""


@dataclass
class Progress:
    """News of one sequence of a ticket: what it sampled since the last time."""

    number: int  # of the sequence in its ticket
    said: list[str | int]  # what is safe to show: text and the ids of markers
    tokens: list[tuple[int, float, list[tuple[int, float]]]]  # id, logprob, likeliest; without the stop token
    sampled: int  # tokens in all, the stop token included
    num_cached_tokens: int  # prompt tokens that were not computed again
    finish_reason: str | None


@dataclass
class Ticket:
    """A request's sequences: their Progress arrives in `events`, an exception instead when the engine has failed."""

    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    began: float | None = field(default_factory=time.perf_counter)  # None once its first token is here
    running: set[Sequence] = field(default_factory=set)  # the engine's thread owns it


@dataclass
class Live:
    """Whose a sequence is."""

    ticket: Ticket
    number: int


class EngineThread:
    """An engine that steps in its own thread while there is work. One event loop starts it, submits, cancels, stops."""

    def __init__(self, new_engine: Callable[[], Engine], max_queue: int = 128):
        self.engine, self._new_engine, self.max_queue = new_engine(), new_engine, max_queue
        self.stopping = False
        self.unfinished = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.first_token = Counter({bucket: 0 for bucket in range(len(BUCKETS) + 1)})
        self.first_token_seconds = 0.0
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._live: dict[Sequence, Live] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in."""
        self.stopping = True
        self._inbox.put(None)
        self._thread.join()

    @property
    def room(self) -> int:
        """How many sequences may be promised at a time: running and waiting ones."""
        return self.engine.max_batch + self.max_queue

    async def submit(self, prompts: list[list[int]], samplings: list[SamplingParams]) -> Ticket:
        """A ticket for one sequence a prompt. Raises QueueFull, Stopping, or ValueError when the engine refuses."""
        if self.stopping:
            raise Stopping
        if self.unfinished + len(prompts) > self.room:
            raise QueueFull
        ticket, accepted = Ticket(), self._loop.create_future()
        self.unfinished += len(prompts)
        self._inbox.put(partial(self._add, ticket, prompts, samplings, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Free the places of a ticket's sequences that still run. Does nothing when all have ended."""
        self._inbox.put(partial(self._cancel, ticket))

    # -- in the engine's thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            while not self.engine.busy or not self._inbox.empty():
                command = self._inbox.get()
                if command is None:
                    return
                command()
            if self.engine.busy:
                try:
                    self._tell(self._hand_out, [self._news(sequence) for sequence in self.engine.step()])
                except Exception as error:
                    traceback.print_exc(file=sys.stderr)
                    self._give_up(RuntimeError(first_line(error)))

    def _tell(self, function, *arguments: object) -> None:
        """Call `function` in the event loop, unless that has ended."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            self._inbox.put(None)

    def _add(self, ticket: Ticket, prompts: list[list[int]], samplings: list[SamplingParams],
             accepted: asyncio.Future) -> None:
        try:
            for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                sequence = self.engine.add(prompt, sampling)
                self._live[sequence] = Live(ticket, number)
                ticket.running.add(sequence)
        except Exception as refusal:
            self._tell(self._forget, len(prompts) - len(ticket.running))
            self._cancel(ticket)
            self._tell(settle, accepted, refusal)
        else:
            self.prompt_tokens += sum({id(prompt): len(prompt) for prompt in prompts}.values())
            self._tell(settle, accepted, None)

    def _cancel(self, ticket: Ticket) -> None:
        for sequence in ticket.running:
            self.engine.cancel(sequence)
            del self._live[sequence]
        self._tell(self._forget, len(ticket.running))
        ticket.running.clear()

    def _news(self, sequence: Sequence) -> tuple[Ticket, Progress]:
        """What a sequence has to tell since the last time, and whom."""
        live, delta = self._live[sequence], sequence.next_delta()
        ended = delta.finish_reason
        news = Progress(live.number, delta.pieces, delta.tokens, len(sequence.completion_ids),
                        sequence.num_cached_tokens, ended)
        self.generated_tokens += delta.num_tokens
        if ended:
            del self._live[sequence]
            live.ticket.running.discard(sequence)
        return live.ticket, news

    def _give_up(self, error: Exception) -> None:
        """The engine broke in the middle of a step: its requests end, a new engine serves the next ones."""
        tickets, lost = {id(live.ticket): live.ticket for live in self._live.values()}, len(self._live)
        self._live.clear()
        self.engine = self._new_engine()
        for ticket in tickets.values():
            ticket.running.clear()
            self._tell(ticket.events.put_nowait, error)
        self._tell(self._forget, lost)

    # -- in the event loop ---------------------------------------------------------------------------------------------

    def _hand_out(self, news: list[tuple[Ticket, Progress]]) -> None:
        now = time.perf_counter()
        for ticket, progress in news:
            if ticket.began is not None and progress.sampled:
                self.first_token[bisect_left(BUCKETS, now - ticket.began)] += 1
                self.first_token_seconds += now - ticket.began
                ticket.began = None
            if progress.finish_reason:
                self.unfinished -= 1
            ticket.events.put_nowait(progress)

    def _forget(self, count: int) -> None:
        self.unfinished -= count


def settle(future: asyncio.Future, error: Exception | None) -> None:
    if future.done():  # its request was cancelled meanwhile
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)


def metrics_text(service: EngineThread) -> str:
    """What is counted, in Prometheus's text format, version 0.0.4."""
    engine = service.engine
    lines = []

    def family(name: str, kind: str, meaning: str, *samples: tuple[str, float]) -> None:
        lines.extend((f"# HELP minimind_{name} {meaning}", f"# TYPE minimind_{name} {kind}"))
        lines.extend(f"minimind_{name}{labels} {value}" for labels, value in samples)

    family("requests_total", "counter", "Requests answered, by path and HTTP status.",
           *((f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(service.requests.items())))
    family("prompt_tokens_total", "counter", "Tokens of accepted prompts.", ("", service.prompt_tokens))
    family("generated_tokens_total", "counter", "Tokens sampled.", ("", service.generated_tokens))
    family("reused_prompt_tokens_total", "counter", "Prompt tokens that were not computed again.",
           ("", engine.num_cached_tokens))
    family("sequences_waiting", "gauge", "Sequences without a place.", ("", engine.num_waiting))
    family("sequences_running", "gauge", "Sequences with a place.", ("", engine.num_running))
    family("places", "gauge", "Sequences that can run at a time.", ("", engine.max_batch))
    seen = 0
    buckets = []
    for number, edge in enumerate((*BUCKETS, "+Inf")):
        seen += service.first_token[number]
        buckets.append((f'_bucket{{le="{edge}"}}', seen))
    family("time_to_first_token_seconds", "histogram", "From the request to its first token.", *buckets,
           ("_sum", service.first_token_seconds), ("_count", seen))
    return "\n".join(lines) + "\n"
