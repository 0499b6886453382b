"""The WebSocket of a video, `/v1/videos/ID/stream`: its fragments and its progress.

The server sends, as JSON text:

    {"type": "progress", "video": …}                               after every change
    {"type": "chunk", "index": …, "first_frame": …, "frames": …, "seconds": …, "messages": n}
                                                                   n binary messages follow
    {"type": "end", "video": …}                                    and the connection is closed

A fragment is one binary message of mp4 (all fragments in order are the file), or with
`?format=jpeg` one JPEG for each frame. A client that connects late gets the earlier fragments
first. The client may send {"type": "cancel"} and {"type": "finish"}. Disconnecting cancels nothing.

Fragments are read from the file one at a time, each after the one before was sent, so a slow client
needs no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass

from fastapi import APIRouter, WebSocket
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocketDisconnect

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.serving.auth import PROTOCOL
from anyflow_deploy.serving.errors import ApiError
from anyflow_deploy.serving.job import Job, Video
from anyflow_deploy.serving.routes import find_job, finish_deadline, watch_job
from anyflow_deploy.serving.service import Service
from anyflow_deploy.serving.thumbnails import encode_jpegs, read_fragment

FORMATS = ("mp4", "jpeg")
_BROKEN = 1011


def make_socket_routes(service: Service) -> APIRouter:
    """Make the WebSocket route of a service."""
    api = APIRouter()

    @api.websocket("/v1/videos/{video_id}/stream")
    async def stream(socket: WebSocket, video_id: str, format: str = "mp4") -> None:  # noqa: A002 - its name in the URL
        try:
            job = find_job(service, video_id)
            if format not in FORMATS:
                raise ApiError(
                    400,
                    f"format is {format[:40]!r}; allowed are {' and '.join(FORMATS)}.",
                    "format",
                )
            if len(open_sockets) >= service.limits.streams:
                raise ApiError(
                    429,
                    f"{len(open_sockets)} streams are open, as many as this server allows.",
                    headers={"Retry-After": "5"},
                )
        except ApiError as error:
            await socket.send_denial_response(error.to_response())
            return
        await socket.accept(PROTOCOL if PROTOCOL in socket.scope.get("subprotocols", []) else None)
        open_sockets.add(socket)
        service.metrics.streams.set(len(open_sockets))
        try:
            await _VideoStream(socket, service, job, format).run()
        finally:
            open_sockets.discard(socket)
            service.metrics.streams.set(len(open_sockets))

    open_sockets: set[WebSocket] = set()
    return api


@dataclass(frozen=True)
class _VideoStream:
    """Streams one video to one connection."""

    socket: WebSocket
    service: Service
    job: Job
    format: str

    async def run(self) -> None:
        """Send and receive until the video or the connection ends."""
        tasks = [asyncio.ensure_future(self._send()), asyncio.ensure_future(self._listen())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
                with contextlib.suppress(RuntimeError):
                    await self.socket.close(_BROKEN)
                raise result

    async def _send(self) -> None:
        sent_count = 0
        last: Video | None = None
        async with watch_job(self.job) as change_event:
            while True:
                change_event.clear()
                # Read this first, so that all fragments before the end are sent before it.
                has_ended = self.job.has_ended
                for fragment in self.job.fragments[sent_count:]:
                    if not await self._send_fragment(fragment.index):
                        break
                    sent_count += 1
                video = self.service.snapshot(self.job)
                if has_ended:
                    await self._send_event("end", video)
                    await self.socket.close()
                    return
                if video != last:
                    await self._send_event("progress", video)
                    last = video
                await change_event.wait()

    async def _send_fragment(self, index: int) -> bool:
        """Send a fragment; return False if the video was cancelled or removed meanwhile."""
        path = self.service.store.path(self.job.id)
        try:
            fragment = self.job.fragments[index]
            if self.format == "jpeg":
                parts = await run_in_threadpool(encode_jpegs, path, fragment)
            else:
                parts = [await run_in_threadpool(read_fragment, path, fragment)]
        except (OSError, IndexError, AnyFlowError):
            return False
        fields = {
            "index": index,
            "first_frame": fragment.first_frame,
            "frames": fragment.frames,
            "seconds": fragment.seconds,
        }
        await self.socket.send_text(json.dumps({"type": "chunk", **fields, "messages": len(parts)}))
        for data in parts:
            await self.socket.send_bytes(data)
        return True

    async def _listen(self) -> None:
        while True:
            try:
                kind = json.loads(await self.socket.receive_text())["type"]
                if kind == "cancel":
                    self.service.cancel(self.job)
                elif kind == "finish":
                    finish_deadline(self.job)
                else:
                    raise ApiError(400, "type is neither cancel nor finish.", "type")
            except (ValueError, TypeError, KeyError, RecursionError):
                await self._send_error("a message is not JSON with a type.")
            except (ApiError, AnyFlowError) as error:
                await self._send_error(str(error))

    async def _send_error(self, message: str) -> None:
        await self.socket.send_text(json.dumps({"type": "error", "error": {"message": message}}))

    async def _send_event(self, kind: str, video: Video) -> None:
        await self.socket.send_text(json.dumps({"type": kind, "video": video.model_dump()}))
