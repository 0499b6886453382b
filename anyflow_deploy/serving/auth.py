"""Handle every request first: its id, a log line, its permission, and its size.

Who may send requests:

- With a token, every path but `/health` and the page's own files (and `/metrics`, if it is public)
  needs `Authorization: Bearer TOKEN`, compared in constant time. A browser cannot set that header
  on a WebSocket; there the token comes as a subprotocol, `token.TOKEN`.
- Without one the server listens on this machine only. Any web page that its user visits could still
  reach it, so a request has to name this machine in `Host` (a foreign name that resolves to
  127.0.0.1 is refused), and one that a page sends has to come from this server's own page
  (`Origin`) or from one that `--cors-origin` names.

A body is read completely before the app gets it (`body.py`). Behind a proxy the paths may begin
with a prefix, which the proxy removes or leaves; both are understood.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyflow_deploy.serving.access import AccessRules
from anyflow_deploy.serving.body import read_body
from anyflow_deploy.serving.errors import ApiError
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.logs import request_id
from anyflow_deploy.serving.loopback import is_local
from anyflow_deploy.serving.metrics import Metrics

_log = logging.getLogger("anyflow.serve")

IS_HEAD = "anyflow.is_head"
"""Key of a scope: the request is HEAD, and a long body need not be read from the disk."""

PROTOCOL, TOKEN_PROTOCOL = "anyflow", "token."
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class AuthMiddleware:
    """ASGI middleware that checks, limits, logs and counts every request.

    Args:
        app: the app behind it.
        rules: who may send requests.
        limits: limits of bodies.
        metrics: counts every request.
    """

    def __init__(self, app: ASGIApp, rules: AccessRules, limits: Limits, metrics: Metrics) -> None:
        self._app = app
        self._rules = rules
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
        path = self._remove_prefix(scope)
        if scope.get("method") == "HEAD":  # answered as GET; uvicorn leaves the body out
            scope = {**scope, "method": "GET", IS_HEAD: True}
        recorder = _ResponseRecorder(scope, send, own_id, self._metrics)
        try:
            self._check(path, headers)
            if scope["type"] == "http":
                receive = await read_body(headers, receive, self._limits)
        except ApiError as error:
            await error.to_response()(scope, receive, recorder)
            return
        await self._app(scope, receive, recorder)

    def _remove_prefix(self, scope: Scope) -> str:
        """Return the path as this server's routes have it; the scope says the same in ASGI's way,
        where the path begins with the prefix."""
        prefix, path = self._rules.root_path, str(scope["path"])
        if not prefix:
            return path
        if path == prefix or path.startswith(prefix + "/"):
            path = path[len(prefix) :]
        scope["root_path"] = prefix
        scope["path"] = prefix + path
        return path or "/"  # to which the router redirects, so that the page finds its files

    def _check(self, path: str, headers: dict[str, str]) -> None:
        if self._rules.token is None:
            _check_local(headers, self._rules.origins)
        elif not self._rules.is_open(path) and not _has_token(self._rules.token, headers):
            raise ApiError(
                401,
                "this server needs its token: Authorization: Bearer TOKEN (a browser's WebSocket:"
                " the subprotocol token.TOKEN).",
                headers={"WWW-Authenticate": "Bearer"},
            )


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
        method = "HEAD" if IS_HEAD in scope else str(scope.get("method", "WS"))
        method = method if method in ("GET", "HEAD", "POST", "DELETE", "WS") else "other"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        quiet = scope["path"].endswith(("/health", "/metrics"))
        level = logging.DEBUG if quiet else logging.INFO
        path = scope["path"][:200].encode("ascii", "backslashreplace").decode()
        _log.log(level, "%s %r %d %.1f ms", method, path, status, seconds * 1000)


def _has_token(token: str, headers: dict[str, str]) -> bool:
    """Return whether the request has the token; all ways are tried, in constant time."""
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    protocols = [text.strip() for text in headers.get("sec-websocket-protocol", "").split(",")]
    tokens = [text[len(TOKEN_PROTOCOL) :] for text in protocols if text.startswith(TOKEN_PROTOCOL)]
    tokens.append(bearer.strip() if kind.lower() == "bearer" else "")
    return any([hmac.compare_digest(text.encode(), token.encode()) for text in tokens])  # noqa: C419 - no short cut


def _check_local(headers: dict[str, str], origins: Collection[str]) -> None:
    host = headers.get("host", "")
    if not is_local(_host_name(f"//{host}") or ""):
        raise ApiError(
            403,
            f"Host is {host[:100]!r}; without a token this server answers to localhost and"
            " 127.0.0.1 only.",
        )
    origin = headers.get("origin")
    if origin is None or origin in origins:
        return
    if urlsplit(origin).netloc.lower() != host.lower():
        raise ApiError(
            403,
            f"Origin is {origin[:100]!r}; without a token only this server's own page may send"
            " requests, and those that --cors-origin names.",
        )


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
