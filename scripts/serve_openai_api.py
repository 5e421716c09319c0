"""Serve a model under OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, and /health, /metrics.

    python scripts/serve_openai_api.py --weight full_sft
    curl http://127.0.0.1:8998/v1/chat/completions -H "Content-Type: application/json" \
         -d '{"messages": [{"role": "user", "content": "Who are you?"}]}'

Requests run together in one engine. A client that leaves frees its place; Ctrl-C or SIGTERM finishes what runs, answers
503 to what is new, and ends with status 0; a second one ends at once.
"""

import argparse
import asyncio
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.chat import ChatTokenizer
from model.cli import Parser, UserError, fraction, nonneg_float, nonneg_int, positive_int, run_main
from model.inference.engine import Engine
from model.loading import add_loading_args, load_from_args
from scripts.server import protocol as protocol
from scripts.server.engine_thread import EngineThread, QueueFull, Stopping, Ticket, metrics_text
from scripts.server.protocol import ApiError, Defaults, Job

KEY_VARIABLE = "MINIMIND_API_KEY"
LARGEST_BODY = 4 * 2**20  # bytes; 32,768 positions hold far less text
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


def create_app(service: EngineThread, tokenizer: ChatTokenizer, defaults: Defaults, api_key: str | None = None,
               cors: list[str] | None = None) -> FastAPI:
    """The application; `service` starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="MiniMind", lifespan=lifespan, docs_url=None, redoc_url=None)
    refusals = {"4XX": {"description": "an error object: the request's fault, or not now"},
                "5XX": {"description": "an error object: the server's fault, or it is stopping"}}

    answers = refusals | {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", responses=answers)
    async def chat_completions(body: protocol.ChatRequest, request: Request) -> Response:
        return await answer(request, body.model, partial(protocol.chat_job, body, tokenizer, defaults))

    @app.post("/v1/completions", responses=answers)
    async def completions(body: protocol.CompletionRequest, request: Request) -> Response:
        return await answer(request, body.model, partial(protocol.completion_job, body, tokenizer, defaults))

    async def answer(request: Request, model: str | None, prepare: Callable[[], Job]) -> Response:
        if model not in (None, defaults.model):
            raise unknown_model(model)
        job = await asyncio.to_thread(prepare)  # a long prompt takes a while to tokenise
        if len(job.prompts) > service.room:
            raise ApiError(400, f"n: {len(job.prompts)} answers; this server holds {service.room} at a time", "n")
        try:
            ticket = await service.submit(job.prompts, job.samplings)
        except ValueError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        if job.stream:
            return EventStream(service, ticket, job)
        return await whole_answer(request, service, ticket, job)

    def unknown_model(name: str) -> ApiError:
        return ApiError(404, f"there is no model {name!r} here, only {defaults.model!r}", "model", "model_not_found")

    card = {"id": defaults.model, "object": "model", "created": int(time.time()), "owned_by": "minimind"}

    @app.get("/v1/models", responses=refusals)
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}", responses=refusals)
    async def model(name: str) -> JSONResponse:
        if name != defaults.model:
            raise unknown_model(name)
        return JSONResponse(card)

    @app.get("/health", responses=refusals)
    async def health() -> JSONResponse:
        if service.stopping:
            raise Stopping
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics_text(service), media_type="text/plain; version=0.0.4")

    app.exception_handlers = {
        ApiError: lambda _, error: error_response(error),
        QueueFull: lambda _, error: error_response(
            ApiError(429, "the queue is full; try again in a second", code="queue_full"), {"Retry-After": "1"}),
        Stopping: lambda _, error: error_response(
            ApiError(503, "the server is stopping", code="stopping"), {"Retry-After": "5"}),
        RequestValidationError: lambda _, error: error_response(protocol.validation_error(error.errors())),
        HTTPException: lambda _, error: error_response(
            ApiError(error.status_code, error.detail), getattr(error, "headers", None)),
        Exception: lambda _, error: error_response(failure(error)),
    }
    app.add_middleware(Door, service=service, api_key=api_key)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])
    return app


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers)


def failure(error: Exception) -> ApiError:
    """What a client learns of a mistake of ours: that it happened. The server's own log has the rest."""
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")


class Door:
    """What stands before the application: the key, the largest body, and the count of answers by path and status."""

    def __init__(self, app: ASGIApp, service: EngineThread, api_key: str | None):
        self.app, self.service, self.api_key = app, service, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in PATHS else "other"
                self.service.requests[path, message["status"]] += 1
            await send(message)

        if self.api_key and scope["path"].startswith("/v1") and not self.knows(scope):
            refusal = ApiError(401, "a wrong API key, or none: send Authorization: Bearer KEY", code="invalid_api_key")
            await error_response(refusal, {"WWW-Authenticate": "Bearer"})(scope, receive, counted)
        else:
            await self.app(scope, bounded(receive), counted)

    def knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, b"Bearer " + self.api_key.encode())


def bounded(receive: Receive) -> Receive:
    """`receive`, which refuses too large a body, but first drops some more of it so that the client hears why."""
    size = 0

    async def bounded_receive() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        while size > LARGEST_BODY:
            if not message.get("more_body") or size > 8 * LARGEST_BODY:
                raise HTTPException(413, f"the body is larger than {LARGEST_BODY:,} bytes")
            message = await receive()
            size += len(message.get("body", b""))
        return message

    return bounded_receive


class Progression:
    """The events of a ticket as chunks of its job's choices, until all of them have ended."""

    def __init__(self, ticket: Ticket, job: Job):
        self.ticket, self.job = ticket, job
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}  # tokens of each prompt that none of its choices computed

    async def chunks(self) -> AsyncIterator[dict]:
        open_choices = len(self.job.choices)
        while open_choices:
            progress = await self.ticket.events.get()
            if isinstance(progress, Exception):
                raise progress
            for chunk in self.job.choices[progress.number].advance(progress):
                yield chunk
            if progress.finish_reason:
                open_choices -= 1
                self.completion_tokens += progress.sampled
                prompt = id(self.job.prompts[progress.number])
                num_cached = progress.num_cached_tokens
                self._cached[prompt] = min(num_cached, self._cached.get(prompt, num_cached))

    @property
    def usage(self) -> dict:
        return protocol.usage_of(self.job, self.completion_tokens, sum(self._cached.values()))


async def whole_answer(request: Request, service: EngineThread, ticket: Ticket, job: Job) -> Response:
    """The answer in one piece, unless its client leaves before."""
    progression = Progression(ticket, job)

    async def finish() -> None:
        async for _ in progression.chunks():
            pass

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(finish()), asyncio.create_task(leave())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return Response(status_code=499)  # nobody reads it
        await tasks[0]
    finally:
        service.cancel(ticket)
        for task in tasks:
            task.cancel()
    return JSONResponse(protocol.envelope(job, [choice.whole() for choice in job.choices], progression.usage))


class EventStream(StreamingResponse):
    """The answer as server-sent events. However it ends, its places are free afterwards."""

    def __init__(self, service: EngineThread, ticket: Ticket, job: Job):
        super().__init__(self._events(Progression(ticket, job), job), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._cancel = partial(service.cancel, ticket)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()

    @staticmethod
    async def _events(progression: Progression, job: Job) -> AsyncIterator[str]:
        def event(value: dict) -> str:
            return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"

        for choice in job.choices:
            if first := choice.start():
                yield event(protocol.envelope(job, [first], None, chunk=True))
        try:
            async with aclosing(progression.chunks()) as chunks:
                async for chunk in chunks:
                    yield event(protocol.envelope(job, [chunk], None, chunk=True))
        except Exception as error:  # the status is sent already
            yield event(failure(error).body())
            return
        if job.include_usage:
            yield event(protocol.envelope(job, [], progression.usage, chunk=True))
        yield "data: [DONE]\n\n"


class Server(uvicorn.Server):
    """uvicorn, which on a signal goes on answering until the last running answer is finished, then exits with 0."""

    def __init__(self, config: uvicorn.Config, service: EngineThread):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: object) -> None:
        if self.service.stopping:
            self.should_exit = self.force_exit = True
        self.service.stopping = True

    async def on_tick(self, counter: int) -> bool:
        self.should_exit |= self.service.stopping and not self.service.unfinished
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError when the address is taken, or none of this machine's."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}; choose another with --port") from None


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", default="full_sft", help="name of the weight (%(default)s)")
    add_loading_args(parser)
    group = parser.add_argument_group("defaults of requests that do not say otherwise")
    group.add_argument("--open_thinking", type=int, choices=(0, 1), default=0, help="let the model think first")
    group.add_argument("--max_new_tokens", type=positive_int, default=1024,
                       help="longest answer, in tokens (%(default)s)")
    group.add_argument("--temperature", type=nonneg_float, default=0.85,
                       help="0 takes the likeliest token (%(default)s)")
    group.add_argument("--top_p", type=fraction, default=0.95, help="mass of the tokens sampled from (%(default)s)")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one (%(default)s)")
    group.add_argument("--port", type=nonneg_int, default=8998, help="0 takes a free one (%(default)s)")
    group.add_argument("--model_name", default=Defaults.model, help="what clients call the model (%(default)s)")
    group.add_argument("--api_key", help=f"what clients must send (default: ${KEY_VARIABLE}; without one, nothing)")
    group.add_argument("--cors", nargs="+", metavar="ORIGIN", help="web pages that may ask, or '*' for all")
    group.add_argument("--max_batch", type=positive_int, default=32, help="answers written together (%(default)s)")
    group.add_argument("--max_cache_tokens", type=positive_int, help="bound of the key-value cache (2,048 an answer)")
    group.add_argument("--max_queue", type=nonneg_int, default=128, help="answers that may wait beside (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with listen(args.host, args.port) as listener:
        model, tokenizer = load_from_args(args, args.weight)
        service = EngineThread(partial(Engine, model, tokenizer, args.max_batch, args.max_cache_tokens), args.max_queue)
        defaults = Defaults(args.model_name, args.max_new_tokens, args.temperature, args.top_p,
                            bool(args.open_thinking))
        app = create_app(service, tokenizer, defaults, args.api_key or os.environ.get(KEY_VARIABLE), args.cors)
        host, port = listener.getsockname()[:2]
        print(f"serving {defaults.model} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        Server(uvicorn.Config(app, log_level="warning", access_log=False), service).run([listener])


if __name__ == "__main__":
    run_main(main)
