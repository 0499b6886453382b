"""Handle every request first: its id, a log line, its permission, and its size.

Who may send requests:

- With a token, every path but `/health` and the page's own files needs `Authorization: Bearer
  TOKEN`, compared in constant time. A browser cannot set that header on a WebSocket; there the
  token comes as a subprotocol, `token.TOKEN`.
- Without one the server listens on this machine only. Any web page that its user visits could still
  reach it, so a request has to name this machine in `Host` (a foreign name that resolves to
  127.0.0.1 is refused), and one that a page sends has to come from this server's own page
  (`Origin`).

A body is read completely before the app gets it, within limits of bytes and seconds.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections import deque
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyflow_deploy.serving.errors import ApiError
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.logs import request_id
from anyflow_deploy.serving.loopback import is_local
from anyflow_deploy.serving.metrics import Metrics

_log = logging.getLogger("anyflow.serve")

PROTOCOL, TOKEN_PROTOCOL = "anyflow", "token."
OPEN = ("/", "/page.js", "/page.css", "/health")
"""Paths that need no token: they hold no secret, and the page has to load to ask for a token."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class AuthMiddleware:
    """ASGI middleware that checks, limits, logs and counts every request.

    Args:
        app: the app behind it.
        token: what clients have to send; None for a server that this machine alone can reach.
        limits: limits of bodies.
        metrics: counts every request.
    """

    def __init__(self, app: ASGIApp, token: str | None, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._token = token
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it to the app; the arguments are ASGI's."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        client_id = headers.get("x-request-id", "")
        own_id = client_id if _ID.fullmatch(client_id) else f"req_{secrets.token_hex(12)}"
        request_id.set(own_id)
        recorder = _ResponseRecorder(scope, send, own_id, self._metrics)
        try:
            self._check(scope, headers)
            if scope["type"] == "http":
                receive = await self._read_body(headers, receive)
        except ApiError as error:
            await error.to_response()(scope, receive, recorder)
            return
        await self._app(scope, receive, recorder)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        if self._token is None:
            _check_local(headers)
        elif scope["path"] not in OPEN and not self._has_token(headers):
            raise ApiError(
                401,
                "this server needs its token: Authorization: Bearer TOKEN (a browser's WebSocket:"
                " the subprotocol token.TOKEN).",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _has_token(self, headers: dict[str, str]) -> bool:
        """Return whether the request has the token; all ways are tried, in constant time."""
        assert self._token is not None
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        protocols = [text.strip() for text in headers.get("sec-websocket-protocol", "").split(",")]
        tokens = [
            text[len(TOKEN_PROTOCOL) :] for text in protocols if text.startswith(TOKEN_PROTOCOL)
        ]
        tokens.append(bearer.strip() if kind.lower() == "bearer" else "")
        return any([hmac.compare_digest(text.encode(), self._token.encode()) for text in tokens])  # noqa: C419 - no short cut

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> Receive:
        """Read the body; return what replays it to the app, followed by later messages."""
        limit = self._limits.body_bytes
        too_large = ApiError(
            413, f"the body is larger than {limit:,} bytes, which is what this server takes."
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        messages: deque[Message] = deque()
        size, end = 0, time.monotonic() + self._limits.body_seconds
        while not messages or (
            messages[-1]["type"] == "http.request" and messages[-1].get("more_body")
        ):
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {self._limits.body_seconds:g} s."
                ) from None
            size += len(message.get("body", b""))
            if size > limit:
                raise too_large
            messages.append(message)

        async def replay() -> Message:
            return messages.popleft() if messages else await receive()

        return replay


class _ResponseRecorder:
    """Adds the id to an answer's headers, logs the answer, and counts it."""

    def __init__(self, scope: Scope, send: Send, own_id: str, metrics: Metrics) -> None:
        self._scope = scope
        self._send = send
        self._request_id = own_id
        self._metrics = metrics
        self._start = time.perf_counter()

    async def __call__(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
            message = {
                **message,
                "headers": [
                    *message.get("headers", []),
                    (b"x-request-id", self._request_id.encode()),
                ],
            }
            self._record(int(message.get("status", 101)))
        await self._send(message)

    def _record(self, status: int) -> None:
        seconds = time.perf_counter() - self._start
        scope = self._scope
        # The route's pattern and not the path, so that there are few labels.
        route = getattr(scope.get("route"), "path", "none")
        method = str(scope.get("method", "WS"))
        method = method if method in ("GET", "HEAD", "POST", "DELETE", "WS") else "other"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
        path = scope["path"][:200].encode("ascii", "backslashreplace").decode()
        _log.log(level, "%s %r %d %.1f ms", method, path, status, seconds * 1000)


def _check_local(headers: dict[str, str]) -> None:
    host = headers.get("host", "")
    if not is_local(_host_name(f"//{host}") or ""):
        raise ApiError(
            403,
            f"Host is {host[:100]!r}; without a token this server answers to localhost and"
            " 127.0.0.1 only.",
        )
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        raise ApiError(
            403,
            f"Origin is {origin[:100]!r}; without a token only this server's own page may send"
            " requests.",
        )


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
