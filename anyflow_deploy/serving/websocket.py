"""The WebSocket of a video, `/v1/videos/ID/stream`: its pieces as they are made, and how far it is.

The server sends, as JSON text:

    {"type": "progress", "video": …}                               whenever something changed
    {"type": "chunk", "index": …, "first_frame": …, "frames": …, "seconds": …, "messages": n}
                                                                   n binary messages follow
    {"type": "end", "video": …}                                    and the connection is closed

A piece is one binary message of mp4 (all pieces, one behind the other, are the file), or with
`?format=jpeg` one JPEG a frame. Who comes late gets what is there first. The client may send
{"type": "cancel"} and {"type": "finish"}. Leaving cancels nothing.

Everything is read from the file, one piece at a time and only when the one before was sent, so a
slow client needs no memory.
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
from anyflow_deploy.serving.routes import finish_now, job_of, news_of
from anyflow_deploy.serving.service import Service
from anyflow_deploy.serving.thumbnails import jpegs, part

FORMATS = ("mp4", "jpeg")
_BROKEN = 1011


def sockets(service: Service) -> APIRouter:
    """The WebSocket route of a service."""
    api = APIRouter()

    @api.websocket("/v1/videos/{video_id}/stream")
    async def stream(socket: WebSocket, video_id: str, format: str = "mp4") -> None:  # noqa: A002 - its name in the URL
        try:
            job = job_of(service, video_id)
            if format not in FORMATS:
                raise ApiError(
                    400,
                    f"format is {format[:40]!r}; allowed are {' and '.join(FORMATS)}.",
                    "format",
                )
            if len(open_now) >= service.limits.streams:
                raise ApiError(
                    429,
                    f"{len(open_now)} streams are open, as many as this server allows.",
                    headers={"Retry-After": "5"},
                )
        except ApiError as error:
            await socket.send_denial_response(error.answer())
            return
        await socket.accept(PROTOCOL if PROTOCOL in socket.scope.get("subprotocols", []) else None)
        open_now.add(socket)
        service.metrics.streams.set(len(open_now))
        try:
            await _Watching(socket, service, job, format).run()
        finally:
            open_now.discard(socket)
            service.metrics.streams.set(len(open_now))

    open_now: set[WebSocket] = set()
    return api


@dataclass(frozen=True)
class _Watching:
    """One connection."""

    socket: WebSocket
    service: Service
    job: Job
    format: str

    async def run(self) -> None:
        """Send and listen, until the video or the connection ends."""
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
        sent = 0
        last: Video | None = None
        async with news_of(self.job) as news:
            while True:
                news.clear()
                # Looked at first: what comes before the end is then sent before it
                ended = self.job.ended
                for piece in self.job.pieces[sent:]:
                    if not await self._piece(piece.index):
                        break
                    sent += 1
                video = self.service.snapshot(self.job)
                if ended:
                    await self._say("end", video)
                    await self.socket.close()
                    return
                if video != last:
                    await self._say("progress", video)
                    last = video
                await news.wait()

    async def _piece(self, index: int) -> bool:
        """Send a piece; false where the video was cancelled or removed meanwhile."""
        path = self.service.store.path(self.job.id)
        try:
            piece = self.job.pieces[index]
            if self.format == "jpeg":
                parts = await run_in_threadpool(jpegs, path, piece)
            else:
                parts = [await run_in_threadpool(part, path, piece)]
        except (OSError, IndexError, AnyFlowError):
            return False
        about = {
            "index": index,
            "first_frame": piece.first_frame,
            "frames": piece.frames,
            "seconds": piece.seconds,
        }
        await self.socket.send_text(json.dumps({"type": "chunk", **about, "messages": len(parts)}))
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
                    finish_now(self.job)
                else:
                    raise ApiError(400, "type is neither cancel nor finish.", "type")
            except (ValueError, TypeError, KeyError, RecursionError):
                await self._complain("a message is no JSON with a type.")
            except (ApiError, AnyFlowError) as error:
                await self._complain(str(error))

    async def _complain(self, message: str) -> None:
        await self.socket.send_text(json.dumps({"type": "error", "error": {"message": message}}))

    async def _say(self, kind: str, video: Video) -> None:
        await self.socket.send_text(json.dumps({"type": kind, "video": video.model_dump()}))
