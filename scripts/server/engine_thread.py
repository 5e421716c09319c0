"""The engine in a thread of its own, requests in asyncio, and what /metrics counts.

The engine is not thread-safe, so one thread owns it. The event loop puts commands into its inbox, which it obeys
between two steps; after each step it posts all deltas to the event loop at once. `num_pending` counts the sequences
that were accepted and have not finished; only the event loop changes it, so it needs no lock.
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
from functools import partial

from model.cli import first_line
from model.inference.engine import Engine, Sequence, TokenDelta
from scripts.server.generation import GenerationRequest

BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # of the time to the first token, in seconds


class QueueFull(Exception):
    """All slots are taken and enough requests wait already."""


class Stopping(Exception):
    """The server finishes what runs and accepts nothing new."""


class EngineThread:
    """An engine that steps in its own thread while there is work. One event loop starts it, submits, cancels, stops."""

    def __init__(self, new_engine: Callable[[], Engine], max_queue: int = 128):
        self.engine, self._new_engine, self.max_queue = new_engine(), new_engine, max_queue
        self.engine.warm_up()
        self.stopping = self._is_broken = False
        self.num_pending = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.num_responses: Counter[tuple[str, int]] = Counter()  # by path and status
        self.first_token = Counter({bucket: 0 for bucket in range(len(BUCKETS) + 1)})
        self.first_token_seconds = 0.0
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._owners: dict[Sequence, tuple[GenerationRequest, int]] = {}  # and the index of its choice
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in."""
        self.stopping = True
        self._inbox.put(None)
        self._thread.join()

    @property
    def max_pending(self) -> int:
        """How many sequences may be pending at a time: running and waiting ones."""
        return self.engine.max_batch + self.max_queue

    async def submit(self, request: GenerationRequest) -> None:
        """Queue one sequence per choice. Raises QueueFull, Stopping, or ValueError when the engine refuses one."""
        if self.stopping:
            raise Stopping
        if self.num_pending + len(request.choices) > self.max_pending:
            raise QueueFull
        accepted = self._loop.create_future()
        request.submitted_at = time.perf_counter()
        self.num_pending += len(request.choices)
        self._inbox.put(partial(self._add, request, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            self.cancel(request)
            raise

    def cancel(self, request: GenerationRequest) -> None:
        """Free the slots of a request's sequences that still run. Does nothing when all have finished."""
        self._inbox.put(partial(self._cancel, request))

    # -- in the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                while self._is_broken or not self.engine.busy or not self._inbox.empty():
                    command = self._inbox.get()
                    if command is None:
                        return
                    command()
                self._post(self._dispatch, [self._delta(sequence) for sequence in self.engine.step()])
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                self._fail_all(RuntimeError(first_line(error)))

    def _post(self, function: Callable, *arguments: object) -> None:
        """Call `function` in the event loop, unless that has ended."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            self._inbox.put(None)

    def _add(self, request: GenerationRequest, accepted: asyncio.Future) -> None:
        error = None
        try:
            if self._is_broken:
                self._replace_engine()
            for index, (prompt, params) in enumerate(zip(request.prompts, request.params, strict=True)):
                request.sequences.append(self.engine.add(prompt, params))
                self._owners[request.sequences[-1]] = request, index
            self.prompt_tokens += request.num_prompt_tokens
        except Exception as refusal:
            error = refusal
            self._post(self._release, len(request.choices) - len(request.sequences))
            self._cancel(request)
        self._post(resolve_future, accepted, error)

    def _cancel(self, request: GenerationRequest) -> None:
        unfinished = [sequence for sequence in request.sequences if self._owners.pop(sequence, None)]
        self._post(self._release, len(unfinished))
        for sequence in unfinished:
            self.engine.cancel(sequence)

    def _delta(self, sequence: Sequence) -> tuple[GenerationRequest, int, TokenDelta]:
        """What a step added to a sequence, and for which choice of which request."""
        delta = sequence.next_delta()
        self.generated_tokens += delta.num_tokens
        owner = self._owners.pop(sequence) if delta.finish_reason else self._owners[sequence]
        return *owner, delta

    def _fail_all(self, error: Exception) -> None:
        """The engine broke in the middle of a step: all its requests fail, and a new engine serves the next ones."""
        owners = list(self._owners.values())
        self._owners.clear()
        for request in {request for request, _ in owners}:
            self._post(request.deltas.put_nowait, error)
        self._post(self._release, len(owners))
        self._is_broken = True
        try:
            self._replace_engine()
        except Exception:  # there may be no memory for it yet: each request tries again
            traceback.print_exc(file=sys.stderr)

    def _replace_engine(self) -> None:
        self.engine, self._is_broken = self._new_engine(), False

    # -- in the event loop ---------------------------------------------------------------------------------------------

    def _dispatch(self, deltas: list[tuple[GenerationRequest, int, TokenDelta]]) -> None:
        now = time.perf_counter()
        for request, index, delta in deltas:
            if request.submitted_at is not None:
                self.first_token[bisect_left(BUCKETS, now - request.submitted_at)] += 1
                self.first_token_seconds += now - request.submitted_at
                request.submitted_at = None
            self.num_pending -= delta.finish_reason is not None
            request.deltas.put_nowait((index, delta))

    def _release(self, num_sequences: int) -> None:
        self.num_pending -= num_sequences


def resolve_future(future: asyncio.Future, error: Exception | None) -> None:
    if future.done():  # its request was cancelled meanwhile
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)


def metrics_text(service: EngineThread) -> str:
    """The counts in Prometheus's text format, version 0.0.4."""
    engine, responses = service.engine, sorted(service.num_responses.items())
    lines = []

    def add_metric(name: str, kind: str, meaning: str, *samples: tuple[str, float]) -> None:
        lines.extend((f"# HELP minimind_{name} {meaning}", f"# TYPE minimind_{name} {kind}"))
        lines.extend(f"minimind_{name}{labels} {value}" for labels, value in samples)

    add_metric("requests_total", "counter", "Requests answered, by path and HTTP status.",
               *((f'{{path="{path}",status="{status}"}}', n) for (path, status), n in responses))
    add_metric("prompt_tokens_total", "counter", "Tokens of accepted prompts.", ("", service.prompt_tokens))
    add_metric("generated_tokens_total", "counter", "Tokens sampled.", ("", service.generated_tokens))
    add_metric("reused_prompt_tokens_total", "counter", "Prompt tokens that were not computed again.",
               ("", engine.num_cached_tokens))
    add_metric("sequences_waiting", "gauge", "Sequences without a slot.", ("", engine.num_waiting))
    add_metric("sequences_running", "gauge", "Sequences with a slot.", ("", engine.num_running))
    add_metric("places", "gauge", "Sequences that can run at a time.", ("", engine.max_batch))
    count, buckets = 0, []
    for bucket, upper_bound in enumerate((*BUCKETS, "+Inf")):
        count += service.first_token[bucket]
        buckets.append((f'_bucket{{le="{upper_bound}"}}', count))
    add_metric("time_to_first_token_seconds", "histogram", "From the request to its first token.", *buckets,
               ("_sum", service.first_token_seconds), ("_count", count))
    return "\n".join(lines) + "\n"
