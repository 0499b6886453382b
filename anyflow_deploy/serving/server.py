"""Run uvicorn, and stop it gently.

After the first SIGTERM or Ctrl-C, no more videos are accepted (503), those that wait end as
`server_shutdown`, and the running one has its grace time to finish. Meanwhile all requests are
still answered, so clients that wait get the file. The second signal cancels the running video
between two transitions. Either way, a video is whole or leaves nothing.
"""

from __future__ import annotations

import threading
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.service import Service

_LINGER = 0.3
"""Seconds for the last answers to clients that wait, before their connections are closed."""


class Server(uvicorn.Server):
    """A uvicorn server that drains the service before it closes connections.

    Args:
        config: from `configure_uvicorn`.
        service: the service to drain.
        grace: seconds for the running video.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service = service
        self._grace = grace
        self._is_stopping = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal on another thread, since the interrupted one may hold locks."""
        stop = self._service.abandon if self._is_stopping else self._stop_gently
        self._is_stopping = True
        threading.Thread(target=stop, name="anyflow-stop", daemon=True).start()

    def _stop_gently(self) -> None:
        self._service.drain(self._grace)
        time.sleep(_LINGER)
        self.should_exit = True


def configure_uvicorn(app: ASGIApp, host: str, port: int, limits: Limits) -> uvicorn.Config:
    """Make uvicorn's settings for the app."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,  # AuthMiddleware writes these lines
        server_header=False,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=4096,  # clients send a few words
        limit_concurrency=limits.streams + 256,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=32 << 10,
    )
