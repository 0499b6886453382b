"""What stands before every request: an id, a log line, who may ask, and how much may be sent.

Who may ask:

- With a token, every path but `/health` and the page's own files needs `Authorization: Bearer
  TOKEN`, compared in constant time. A browser cannot set that header on a WebSocket; there the
  token comes as a subprotocol, `token.TOKEN`.
- Without one the server listens on this machine only. Any web page that its user visits could still
  reach it, so a request has to name this machine in `Host` (a foreign name that resolves to
  127.0.0.1 is refused), and one that a page sends has to come from this server's own page
  (`Origin`).

A body is read whole before anything else sees it, up to a limit in bytes and in seconds.
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
"""Paths that need no token: nothing in them is secret, and the page has to be there to ask for
one."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class AuthMiddleware:
    """ASGI middleware; see the module.

    Args:
        app: what it stands before.
        token: None for a server that this machine alone can reach.
        limits: of bodies.
        metrics: told of every request.
    """

    def __init__(self, app: ASGIApp, token: str | None, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._token = token
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        given = headers.get("x-request-id", "")
        own = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        request_id.set(own)
        sent = _ResponseRecorder(scope, send, own, self._metrics)
        try:
            self._check(scope, headers)
            if scope["type"] == "http":
                receive = await self._whole_body(headers, receive)
        except ApiError as error:
            await error.answer()(scope, receive, sent)
            return
        await self._app(scope, receive, sent)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        if self._token is None:
            _check_local(headers)
        elif scope["path"] not in OPEN and not self._known(headers):
            raise ApiError(
                401,
                "this server needs its token: Authorization: Bearer TOKEN (a browser's WebSocket:"
                " the subprotocol token.TOKEN).",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _known(self, headers: dict[str, str]) -> bool:
        """Whether the request has the token; every way is tried, so that time tells nothing."""
        assert self._token is not None
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        offered = [word.strip() for word in headers.get("sec-websocket-protocol", "").split(",")]
        given = [word[len(TOKEN_PROTOCOL) :] for word in offered if word.startswith(TOKEN_PROTOCOL)]
        given.append(bearer.strip() if kind.lower() == "bearer" else "")
        return any([hmac.compare_digest(word.encode(), self._token.encode()) for word in given])  # noqa: C419 - no short cut

    async def _whole_body(self, headers: dict[str, str], receive: Receive) -> Receive:
        """Read the body; returns what gives it to the app, and then whatever else the client
        does."""
        most = self._limits.body_bytes
        too_large = ApiError(
            413, f"the body is larger than {most:,} bytes, which is what this server takes."
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > most:
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
            if size > most:
                raise too_large
            messages.append(message)

        async def replay() -> Message:
            return messages.popleft() if messages else await receive()

        return replay


class _ResponseRecorder:
    """Notes what is answered: the id as a header, a line in the log, a count."""

    def __init__(self, scope: Scope, send: Send, own: str, metrics: Metrics) -> None:
        self._scope = scope
        self._send = send
        self._own = own
        self._metrics = metrics
        self._started = time.perf_counter()

    async def __call__(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
            message = {
                **message,
                "headers": [*message.get("headers", []), (b"x-request-id", self._own.encode())],
            }
            self._note(int(message.get("status", 101)))
        await self._send(message)

    def _note(self, status: int) -> None:
        seconds = time.perf_counter() - self._started
        scope = self._scope
        # The pattern, not the path: labels stay few
        route = getattr(scope.get("route"), "path", "none")
        method = str(scope.get("method", "WS"))
        method = method if method in ("GET", "HEAD", "POST", "DELETE", "WS") else "other"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
        shown = scope["path"][:200].encode("ascii", "backslashreplace").decode()
        _log.log(level, "%s %r %d %.1f ms", method, shown, status, seconds * 1000)


def _check_local(headers: dict[str, str]) -> None:
    host = headers.get("host", "")
    if not is_local(_name_of(f"//{host}") or ""):
        raise ApiError(
            403,
            f"Host is {host[:100]!r}; without a token this server answers to localhost and"
            " 127.0.0.1 only.",
        )
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        raise ApiError(
            403, f"Origin is {origin[:100]!r}; without a token only this server's own page may ask."
        )


def _name_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
