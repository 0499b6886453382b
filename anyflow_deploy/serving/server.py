"""uvicorn, stopped gently.

The first SIGTERM or Ctrl-C: no more videos are taken (503), those that wait end as
`server_shutdown`, and the one being made has its grace to finish. Meanwhile everything is still
answered, so whoever waits gets the file. The second one cancels it between two transitions. A video
is whole or was never there, whenever that happens.
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
"""Seconds in which those who wait hear how it ended, before their connections are closed."""


class Server(uvicorn.Server):
    """See the module.

    Args:
        config: from `configured`.
        service: is drained before the connections are closed.
        grace: seconds for the running video.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service = service
        self._grace = grace
        self._leaving = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: work on another thread, since locks may be held where this one was
        interrupted."""
        work = self._service.abandon if self._leaving else self._leave
        self._leaving = True
        threading.Thread(target=work, name="anyflow-stop", daemon=True).start()

    def _leave(self) -> None:
        self._service.drain(self._grace)
        time.sleep(_LINGER)
        self.should_exit = True


def configure_uvicorn(app: ASGIApp, host: str, port: int, limits: Limits) -> uvicorn.Config:
    """uvicorn's settings for an app of ours."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,  # the guard writes these lines
        server_header=False,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=4096,  # what clients send us: a word or two
        limit_concurrency=limits.streams + 256,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=32 << 10,
    )
