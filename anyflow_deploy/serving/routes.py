"""`/v1/videos` as OpenAI has it, and `/v1/models`, `/health`, `/metrics`.

POST   /v1/videos               put a video into the queue
POST   /v1/videos/sync          the same, and wait: the answer is the mp4
GET    /v1/videos               list (after, limit, order)
GET    /v1/videos/ID            its status and progress
GET    /v1/videos/ID/content    the mp4 (variant=thumbnail: its first frame as JPEG)
POST   /v1/videos/ID/cancel     stop it between two transitions
POST   /v1/videos/ID/finish     under a deadline: finish with a single step now
DELETE /v1/videos/ID            remove it; one that is not finished is cancelled

HEAD is answered wherever GET is (`auth.py`). Other paths are answered by `endpoints.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from anyflow_deploy.errors import AnyFlowError, InvalidRequestError
from anyflow_deploy.serving.auth import IS_HEAD
from anyflow_deploy.serving.default_video import default_video
from anyflow_deploy.serving.errors import ApiError
from anyflow_deploy.serving.job import Job, Video
from anyflow_deploy.serving.logs import request_id
from anyflow_deploy.serving.request import VideoRequest, unsupported_field_error
from anyflow_deploy.serving.service import Service
from anyflow_deploy.serving.thumbnails import encode_thumbnail

_POLL = {"openai-poll-after-ms": "500"}
_OFTEN_WRONG = ("application/x-www-form-urlencoded", "text/plain")
"""What curl and browsers call a body of JSON unless they are told."""

_FAILURES = {"cancelled": 409, "server_shutdown": 503, "invalid_request": 400}


def make_routes(service: Service) -> APIRouter:
    """Make the routes of a service."""
    api = APIRouter()

    @api.post("/v1/videos", response_model=Video)
    async def create(request: Request) -> JSONResponse:
        return _video_response(service, await _submit_request(service, request))

    @api.post("/v1/videos/sync")
    async def create_and_wait(request: Request) -> Response:
        job = await _submit_request(service, request)
        await _wait_until_end(service, request, job)
        _check_completed(job)
        return _file_response(service, job)

    @api.get("/v1/videos")
    async def list_videos(
        after: str | None = None, limit: str = "20", order: str = "desc"
    ) -> JSONResponse:
        return JSONResponse(_page(service, after, limit, order))

    @api.get("/v1/videos/{video_id}", response_model=Video)
    async def retrieve(video_id: str) -> JSONResponse:
        return _video_response(service, find_job(service, video_id))

    @api.get("/v1/videos/{video_id}/content")
    async def content(video_id: str, variant: str = "video") -> Response:
        if variant not in ("video", "thumbnail"):
            raise ApiError(
                400, f"variant is {variant[:40]!r}; allowed are video and thumbnail.", "variant"
            )
        job = find_job(service, video_id)
        _check_completed(job)
        if variant == "thumbnail":
            fragment = job.fragments[0]
            return Response(
                await run_in_threadpool(encode_thumbnail, service.store.path(job.id), fragment),
                media_type="image/jpeg",
            )
        return _file_response(service, job)

    @api.delete("/v1/videos/{video_id}")
    async def delete(video_id: str) -> JSONResponse:
        job = find_job(service, video_id)
        await run_in_threadpool(service.delete, job)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    @api.post("/v1/videos/{video_id}/cancel", response_model=Video)
    async def cancel(video_id: str) -> JSONResponse:
        job = find_job(service, video_id)
        service.cancel(job)
        return _video_response(service, job)

    @api.post("/v1/videos/{video_id}/finish", response_model=Video)
    async def finish(video_id: str) -> JSONResponse:
        job = find_job(service, video_id)
        finish_deadline(job)
        return _video_response(service, job)

    _add_server_routes(api, service)
    return api


def _add_server_routes(api: APIRouter, service: Service) -> None:
    """Add the routes about the server itself."""

    @api.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [describe_service(service)]})

    @api.get("/v1/models/{model}")
    async def model(model: str) -> JSONResponse:
        if model != service.name:
            raise ApiError(
                404,
                f"model {model[:60]!r} is not here; this server has {service.name!r}.",
                "model",
                "model_not_found",
            )
        return JSONResponse(describe_service(service))

    @api.get("/health")
    async def health() -> JSONResponse:
        state = service.state
        return JSONResponse(
            {"status": state, "model": service.name, "queued": service.queue_length},
            200 if state == "ok" else 503,
        )

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(
            await run_in_threadpool(generate_latest, service.metrics.registry),
            media_type=CONTENT_TYPE_LATEST,
        )


def find_job(service: Service, video_id: str) -> Job:
    """Find a video by its id.

    Raises:
        ApiError: no such video.
    """
    job = service.get(video_id)
    if job is None:
        raise ApiError(
            404,
            f"video {video_id[:60]!r} is not here: never made, deleted, or removed to make room.",
            "video_id",
        )
    return job


def finish_deadline(job: Job) -> None:
    """Finish a deadline with a single step.

    Raises:
        InvalidRequestError: the video has no deadline.
    """
    if job.video.deadline_ms is None:
        raise InvalidRequestError(
            "this video has a number of steps, not a deadline; only a deadline can be finished"
            " early.",
            "deadline_ms",
        )
    job.stop_event.set()


def describe_service(service: Service) -> dict[str, Any]:
    """Describe the model and the limits of requests, as JSON."""
    manifest, limits = service.manifest, service.limits
    frames, height, width = default_video(manifest, limits)
    default = {
        "size": f"{width}x{height}",
        "num_frames": frames,
        "num_inference_steps": min(manifest.schedule.steps, limits.steps),
    }
    return {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "anyflow_deploy",
        "kind": manifest.kind,
        "fps": manifest.video.fps,
        "default": default,
        "limits": {
            "num_frames": limits.frames,
            "pixels": limits.pixels,
            "num_inference_steps": limits.steps,
            "deadline_ms": limits.deadline_seconds * 1000,
            "prompt_characters": limits.prompt_characters,
        },
    }


async def _submit_request(service: Service, request: Request) -> Job:
    video_request = service.validate(VideoRequest.model_validate(await _read_fields(request)))
    service.check_open()
    try:
        await run_in_threadpool(service.generator.check, video_request.prompt)
    except AnyFlowError as error:
        raise InvalidRequestError(str(error), "prompt") from None
    return service.submit(video_request, request_id.get())


async def _read_fields(request: Request) -> object:
    """Read the body, as JSON or as a form (which OpenAI's client sends)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _OFTEN_WRONG and (await request.body()).lstrip()[:1] == b"{":
        kind = "application/json"
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=1, max_fields=32) as form:
            if len(form) != len(form.multi_items()):
                raise ApiError(400, "a field is given twice.")
            for name, value in form.items():
                if isinstance(value, UploadFile):
                    raise unsupported_field_error(name[:40])
            return dict(form)
    if kind not in ("application/json", ""):
        raise ApiError(
            415,
            f"Content-Type is {kind[:60]!r}; allowed are application/json and multipart/form-data.",
        )
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON.", code="invalid_json") from None


async def _wait_until_end(service: Service, request: Request, job: Job) -> None:
    """Wait for a video; cancel it if the client disconnects."""
    try:
        async with watch_job(job) as change_event:
            while not job.has_ended:
                change_event.clear()
                if await request.is_disconnected():
                    service.cancel(job)
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(change_event.wait(), 0.5)
    except asyncio.CancelledError:
        service.cancel(job)
        raise


@contextlib.asynccontextmanager
async def watch_job(job: Job) -> AsyncIterator[asyncio.Event]:
    """Yield an event that is set whenever a video changes."""
    change_event, loop = asyncio.Event(), asyncio.get_running_loop()

    def set_event() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits any more
            loop.call_soon_threadsafe(change_event.set)

    with job.subscribe(set_event):
        yield change_event


def _check_completed(job: Job) -> None:
    video = job.snapshot()
    if video.error is not None:
        raise ApiError(
            _FAILURES.get(video.error.code, 500), video.error.message, code=video.error.code
        )
    if video.status != "completed":
        raise ApiError(
            409,
            f"the video is {video.status}, {video.progress} per cent; ask again when it is"
            " completed.",
            code="not_ready",
        )


def _file_response(service: Service, job: Job) -> Response:
    path = service.store.path(job.id)
    if not path.is_file():
        raise ApiError(404, f"video {job.id} was removed to make room.", "video_id")
    headers = {"x-video-id": job.id, "Cache-Control": "private, no-store"}
    return _VideoFile(path, media_type="video/mp4", filename=f"{job.id}.mp4", headers=headers)


class _VideoFile(FileResponse):
    """A file that is not read for HEAD."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if IS_HEAD in scope:
            scope = {**scope, "method": "HEAD"}
        await super().__call__(scope, receive, send)


def _video_response(service: Service, job: Job) -> JSONResponse:
    return JSONResponse(service.snapshot(job).model_dump(), headers={} if job.has_ended else _POLL)


def _page(service: Service, after: str | None, limit: str, order: str) -> dict[str, Any]:
    if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:5]) <= 100:
        raise ApiError(400, f"limit is {limit[:40]!r}; allowed are 1 to 100.", "limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order is {order[:40]!r}; allowed are asc and desc.", "order")
    jobs = service.list_jobs() if order == "asc" else service.list_jobs()[::-1]
    if after is not None:
        ids = [job.id for job in jobs]
        if after not in ids:
            raise ApiError(400, f"after is {after[:60]!r}, which is no video here.", "after")
        jobs = jobs[ids.index(after) + 1 :]
    count = int(limit)
    data = [service.snapshot(job).model_dump() for job in jobs[:count]]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {
        "object": "list",
        "data": data,
        "first_id": first,
        "last_id": last,
        "has_more": len(jobs) > count,
    }
