"""Serve a model under OpenAI's API: /v1/chat/completions, /v1/responses, /v1/completions, /v1/models, and /health,
/metrics.

    python scripts/serve_openai_api.py --weight full_sft
    curl http://127.0.0.1:8998/v1/chat/completions -H "Content-Type: application/json" \
         -d '{"messages": [{"role": "user", "content": "Who are you?"}]}'

Requests run together in one engine. A client that disconnects frees its slots; Ctrl-C or SIGTERM finishes what runs,
answers 503 to new requests, and ends with status 0; a second one ends at once.
"""

import argparse
import asyncio
import json
import os
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
from starlette.types import Receive, Scope, Send

from model.chat import ChatTokenizer
from model.cli import (
    SWITCH,
    Parser,
    UserError,
    add_sampling_args,
    nonneg_int,
    port_number,
    positive_int,
    run_main,
    whole_number,
)
from model.inference.engine import Engine
from model.loading import add_loading_args, load_from_args
from model.threads import run_in_thread
from scripts.server.engine_thread import EngineThread, QueueFull, Stopping, metrics_text
from scripts.server.generation import Defaults, GenerationRequest
from scripts.server.middleware import AuthMiddleware, error_response, internal_error
from scripts.server.protocol import ApiError, ChatBody, CompletionBody, validation_error
from scripts.server.responses import RecentItems, ResponsesRequest
from scripts.server.responses_body import ResponsesBody

KEY_VARIABLE = "MINIMIND_API_KEY"


def create_app(service: EngineThread, tokenizer: ChatTokenizer, defaults: Defaults, api_key: str | None = None,
               cors: list[str] | None = None) -> FastAPI:
    """The application; `service` starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="MiniMind", lifespan=lifespan, docs_url=None, redoc_url=None)
    recent_items = RecentItems()
    errors = {"4XX": {"description": "an error object: the request is invalid, or cannot be served now"},
              "5XX": {"description": "an error object: the server failed, or is stopping"}}
    stream_or_errors = errors | {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", responses=stream_or_errors)
    async def chat_completions(body: ChatBody, http_request: Request) -> Response:
        return await generate(http_request, body.model,
                              partial(GenerationRequest.from_chat_body, body, tokenizer, defaults))

    @app.post("/v1/completions", responses=stream_or_errors)
    async def completions(body: CompletionBody, http_request: Request) -> Response:
        return await generate(http_request, body.model,
                              partial(GenerationRequest.from_completion_body, body, tokenizer, defaults))

    @app.post("/v1/responses", responses=stream_or_errors)
    async def responses(body: ResponsesBody, http_request: Request) -> Response:
        return await generate(http_request, body.model,
                              partial(ResponsesRequest.from_responses_body, body, tokenizer, defaults, recent_items))

    async def generate(http_request: Request, model: str | None,
                       make_request: Callable[[], GenerationRequest]) -> Response:
        """Body → GenerationRequest → a Sequence of the engine per choice; what they sample comes back in chunks."""
        if model not in (None, defaults.model):
            raise unknown_model(model)
        request = await asyncio.to_thread(make_request)  # a long prompt takes a while to tokenise
        if len(request.choices) > service.max_pending:
            raise ApiError(400, f"n: {len(request.choices)} choices; this server accepts at most {service.max_pending} "
                           "at a time", "n")
        try:
            await service.submit(request)
        except ValueError as error:
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        response = EventStream(service, request) if request.stream else await full_response(
            http_request, service, request)
        response.headers.update(request.headers)
        return response

    def unknown_model(name: str) -> ApiError:
        return ApiError(404, f"there is no model {name!r} here, only {defaults.model!r}", "model", "model_not_found")

    model_object = {"id": defaults.model, "object": "model", "created": int(time.time()), "owned_by": "minimind"}

    @app.get("/v1/models", responses=errors)
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model_object]})

    @app.get("/v1/models/{name:path}", responses=errors)
    async def model(name: str) -> JSONResponse:
        if name != defaults.model:
            raise unknown_model(name)
        return JSONResponse(model_object)

    @app.get("/health", responses=errors)
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
        RequestValidationError: lambda _, error: error_response(validation_error(error.errors())),
        HTTPException: lambda request, error: error_response(
            ApiError(error.status_code,
                     not_found_message(request.url.path) if error.status_code == 404 else error.detail),
            getattr(error, "headers", None)),
        UnicodeEncodeError: lambda *_: error_response(  # pydantic cannot quote it in an error
            ApiError(400, "the body contains half a surrogate pair (\\ud800 to \\udfff), which is not text")),
        Exception: lambda _, error: error_response(internal_error(error)),
    }
    app.add_middleware(AuthMiddleware, service=service, api_key=api_key)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])
    return app


def not_found_message(path: str) -> str:
    """Why there is nothing under a path."""
    reasons = {"/v1/embeddings": "; this server has no embedding model",
               "/v1/responses/": "; responses are not stored", "/v1/messages": "; use /v1/chat/completions"}
    return f"there is no {path} here" + next((why for start, why in reasons.items() if path.startswith(start)), "")


async def full_response(http_request: Request, service: EngineThread, request: GenerationRequest) -> Response:
    """The response in one piece, unless its client disconnects before."""

    async def finish() -> None:
        async for _ in request.events():
            pass

    async def disconnect() -> None:
        while (await http_request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(finish()), asyncio.create_task(disconnect())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return Response(status_code=499)  # nobody reads it
        await tasks[0]
    finally:
        service.cancel(request)
        for task in tasks:
            task.cancel()
    return JSONResponse(request.to_response())


class EventStream(StreamingResponse):
    """The response as server-sent events. However it ends, its slots are free afterwards."""

    def __init__(self, service: EngineThread, request: GenerationRequest):
        super().__init__(self._events(request), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._cancel = partial(service.cancel, request)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()

    @staticmethod
    async def _events(request: GenerationRequest) -> AsyncIterator[str]:
        def to_text(event: dict) -> str:
            name = f"event: {event['type']}\n" if "type" in event else ""
            return f"{name}data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"

        try:
            async with aclosing(request.events()) as events:
                async for event in events:
                    yield to_text(event)
        except Exception as error:  # the status has been sent
            yield to_text(request.error_event(internal_error(error)))
            return
        yield request.end_of_stream


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
        self.should_exit |= self.service.stopping and not self.service.num_pending
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
    parser.add_argument("--weight", default="full_sft", help="name of the weights (%(default)s)")
    add_loading_args(parser)
    add_sampling_args(parser.add_argument_group("defaults for fields that a request leaves out"), open_thinking=0,
                      max_new_tokens=1024, temperature=0.85, top_p=0.95)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one (%(default)s)")
    group.add_argument("--port", type=port_number, default=8998, help="0 takes a free one (%(default)s)")
    group.add_argument("--model_name", default=Defaults.model, help="what clients call the model (%(default)s)")
    group.add_argument("--api_key", help=f"key that clients must send (default: ${KEY_VARIABLE}; if unset, none)")
    group.add_argument("--cors", nargs="+", metavar="ORIGIN",
                       help="origins whose web pages may call the API, or '*' for all")
    group.add_argument("--max_batch", type=whole_number(1, 65_536), default=32,
                       help="choices that are generated at the same time (%(default)s)")
    group.add_argument("--max_cache_tokens", type=positive_int,
                       help="tokens that the key-value cache holds (2,048 per --max_batch, at least 32,768)")
    group.add_argument("--use_compile", **SWITCH, default=0, help="torch.compile the decoding step: faster tokens, "
                       "after half a minute of compiling at the start, or seconds once that is cached")
    parser.add_aliases(max_seq_len=None)  # the model's own length holds
    group.add_argument("--max_tools", type=nonneg_int, help="tools of a request that reach the model (all); the header "
                       "X-Tools-Left-Out counts the others")
    group.add_argument("--max_queue", type=nonneg_int, default=128,
                       help="choices that may wait while --max_batch others run (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with listen(args.host, args.port) as listener:
        model, tokenizer = run_in_thread(load_from_args, args, args.weight)
        new_engine = partial(Engine, model, tokenizer, args.max_batch, args.max_cache_tokens, adapt_threads=True,
                             compile=bool(args.use_compile))
        service = run_in_thread(EngineThread, new_engine, args.max_queue)
        defaults = Defaults(args.model_name, args.max_new_tokens, args.temperature, args.top_p,
                            bool(args.open_thinking), args.max_tools)
        app = create_app(service, tokenizer, defaults, args.api_key or os.environ.get(KEY_VARIABLE), args.cors)
        host, port = listener.getsockname()[:2]
        print(f"serving {defaults.model} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        Server(uvicorn.Config(app, log_level="warning", access_log=False), service).run([listener])


if __name__ == "__main__":
    run_main(main)
