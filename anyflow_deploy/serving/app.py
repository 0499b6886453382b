"""The ASGI app: routes, WebSocket and page behind the authentication."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse
from starlette.types import ASGIApp

from anyflow_deploy.serving.access import AccessRules
from anyflow_deploy.serving.auth import AuthMiddleware
from anyflow_deploy.serving.endpoints import explain_method, explain_unknown_path
from anyflow_deploy.serving.errors import install_error_handlers
from anyflow_deploy.serving.routes import make_routes
from anyflow_deploy.serving.service import Service
from anyflow_deploy.serving.websocket import make_socket_routes

_PAGE = Path(__file__).parent / "page"
_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src"
        " 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_READABLE_HEADERS = ("X-Request-ID", "X-Video-ID", "Retry-After", "OpenAI-Poll-After-MS")
"""What another web page's script may read of an answer."""

LOCAL = AccessRules()


def make_app(service: Service, rules: AccessRules = LOCAL) -> ASGIApp:
    """Make the ASGI app of a service.

    Args:
        service: makes and keeps the videos.
        rules: who may send requests; without a token only where this machine alone can reach the
            server.
    """
    # FastAPI's own pages load scripts from other servers, so they are off.
    app = FastAPI(title="anyflow-serve", docs_url=None, redoc_url=None)
    install_error_handlers(app, explain_unknown_path, explain_method)
    app.include_router(make_routes(service))
    app.include_router(make_socket_routes(service))
    for path, name in _FILES.items():
        app.add_api_route(
            path, _make_file_route(name), include_in_schema=False, response_model=None
        )
    guarded = AuthMiddleware(app, rules, service.limits, service.metrics)
    if not rules.origins:
        return guarded
    # In front of the guard: a browser asks for permission without the token, and a page may read
    # refusals, too.
    return CORSMiddleware(
        guarded,
        allow_origins=rules.origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=_READABLE_HEADERS,
    )


def _make_file_route(name: str) -> Callable[[], Awaitable[FileResponse]]:
    async def answer() -> FileResponse:
        return FileResponse(_PAGE / name, headers=_HEADERS)

    return answer
