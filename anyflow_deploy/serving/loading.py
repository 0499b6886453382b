"""Load the model while the server listens already.

Importing PyTorch and reading weights takes seconds to minutes. Meanwhile `/health` answers 503 with
`loading`, requests for videos are answered 503 with `Retry-After`, and the videos of earlier
servers are served. If loading fails, the server ends with the reason.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from anyflow_deploy.serving.server import Server
from anyflow_deploy.serving.service import Service


class BackgroundLoader:
    """Loads in a thread of its own, and opens the service when everything is there.

    Args:
        service: opened at the end.
        server: stopped if loading fails.
        load: loads the parts; a stop of the server does not wait for it.
        warm_up: runs afterwards; a stop of the server waits for it, since it may have files to
            remove.
    """

    def __init__(
        self,
        service: Service,
        server: Server,
        load: Callable[[], None],
        warm_up: Callable[[], None],
    ) -> None:
        self._service = service
        self._server = server
        self._load = load
        self._warm_up = warm_up
        self._has_parts = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="anyflow-load", daemon=True)

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def finish(self) -> None:
        """Call after the server has ended: wait, and raise what loading raised.

        Where parts are still being loaded, the process ends here, with status 0. Nothing is being
        written then, and a thread inside an import of PyTorch cannot be asked to stop.
        """
        if self._thread.is_alive() and not self._has_parts.is_set():
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(0)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._load()
            self._has_parts.set()
            self._warm_up()
        except BaseException as error:  # noqa: BLE001 - the main thread raises it again
            self._error = error
            self._has_parts.set()
            self._server.should_exit = True
        else:
            self._service.finish_loading()
