"""What every request passes before it reaches a route: the API key, the limit of the body, the count of responses."""

import secrets

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.server.engine_thread import EngineThread
from scripts.server.protocol import ApiError

MAX_BODY = 4 * 2**20  # bytes; 32,768 positions hold far less text
PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/models", "/health", "/metrics")


class AuthMiddleware:
    """Refuses /v1 without the key, limits bodies, and counts responses by path and status."""

    def __init__(self, app: ASGIApp, service: EngineThread, api_key: str | None):
        self.app, self.service, self.api_key = app, service, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        has_started = False

        async def send_counted(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                path = scope["path"] if scope["path"] in PATHS else "other"
                self.service.num_responses[path, message["status"]] += 1
            await send(message)

        if self.api_key and scope["path"].startswith("/v1") and not self.has_key(scope):
            error = ApiError(401, "missing or wrong API key: send Authorization: Bearer KEY", code="invalid_api_key")
            await error_response(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send_counted)
            return
        try:
            await self.app(scope, limit_body(receive), send_counted)
        except Exception as error:  # answered here, where it is counted and gets CORS headers, and logged further out
            if not has_started:
                await error_response(internal_error(error))(scope, receive, send_counted)
            raise

    def has_key(self, scope: Scope) -> bool:
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(authorization, b"Bearer " + self.api_key.encode())


def limit_body(receive: Receive) -> Receive:
    """`receive`, which refuses too large a body, but first drops some more of it so that the client hears why."""
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        while size > MAX_BODY:
            if not message.get("more_body") or size > 8 * MAX_BODY:
                raise HTTPException(413, f"the body is larger than {MAX_BODY:,} bytes")
            message = await receive()
            size += len(message.get("body", b""))
        return message

    return receive_limited


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers)


def internal_error(error: Exception) -> ApiError:
    """A client learns that the server failed, and no more; the server's own log has the rest."""
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")
