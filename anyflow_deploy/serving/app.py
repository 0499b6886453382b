"""The parts put together: routes, socket and page behind the guard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse
from starlette.types import ASGIApp

from anyflow_deploy.serving.auth import AuthMiddleware
from anyflow_deploy.serving.errors import answer_in_shape
from anyflow_deploy.serving.routes import routes
from anyflow_deploy.serving.service import Service
from anyflow_deploy.serving.websocket import sockets

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


def make_app(service: Service, token: str | None = None) -> ASGIApp:
    """The ASGI app of a service.

    Args:
        service: makes and keeps the videos.
        token: what clients have to know; None only where this machine alone can reach the server.
    """
    # FastAPI's pages load scripts from elsewhere
    app = FastAPI(title="anyflow-serve", docs_url=None, redoc_url=None)
    answer_in_shape(app)
    app.include_router(routes(service))
    app.include_router(sockets(service))
    for path, name in _FILES.items():
        app.add_api_route(path, _file(name), include_in_schema=False, response_model=None)
    return AuthMiddleware(app, token, service.limits, service.metrics)


def _file(name: str) -> Callable[[], Awaitable[FileResponse]]:
    async def answer() -> FileResponse:
        return FileResponse(_PAGE / name, headers=_HEADERS)

    return answer
