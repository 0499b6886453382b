"""`/v1/videos` and what goes with it, in OpenAI's shape; `/v1/models`, `/health`, `/metrics`.

POST   /v1/videos               put a video into the queue
POST   /v1/videos/sync          the same, and wait: the answer is the mp4
GET    /v1/videos               list (after, limit, order)
GET    /v1/videos/ID            how far it is
GET    /v1/videos/ID/content    the mp4 (variant=thumbnail: its first frame as JPEG)
POST   /v1/videos/ID/cancel     stop it between two transitions
POST   /v1/videos/ID/finish     under a deadline: finish with one jump now
DELETE /v1/videos/ID            forget it; one that is not finished is cancelled
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

from anyflow_deploy.errors import AnyFlowError, InvalidRequestError
from anyflow_deploy.serving.errors import ApiError
from anyflow_deploy.serving.job import Job, Video
from anyflow_deploy.serving.logs import request_id
from anyflow_deploy.serving.request import VideoRequest
from anyflow_deploy.serving.service import Service
from anyflow_deploy.serving.thumbnails import thumbnail

_POLL = {"openai-poll-after-ms": "500"}
_FAILURES = {"cancelled": 409, "server_shutdown": 503, "invalid_request": 400}


def routes(service: Service) -> APIRouter:
    """The routes of a service."""
    api = APIRouter()

    @api.post("/v1/videos", response_model=Video)
    async def create(request: Request) -> JSONResponse:
        return _shown(service, await _submitted(service, request))

    @api.post("/v1/videos/sync")
    async def create_and_wait(request: Request) -> Response:
        job = await _submitted(service, request)
        await _ended(service, request, job)
        _check_completed(job)
        return _file(service, job)

    @api.get("/v1/videos")
    async def listed(
        after: str | None = None, limit: str = "20", order: str = "desc"
    ) -> JSONResponse:
        return JSONResponse(_page(service, after, limit, order))

    @api.get("/v1/videos/{video_id}", response_model=Video)
    async def retrieve(video_id: str) -> JSONResponse:
        return _shown(service, job_of(service, video_id))

    @api.get("/v1/videos/{video_id}/content")
    async def content(video_id: str, variant: str = "video") -> Response:
        if variant not in ("video", "thumbnail"):
            raise ApiError(
                400, f"variant is {variant[:40]!r}; allowed are video and thumbnail.", "variant"
            )
        job = job_of(service, video_id)
        _check_completed(job)
        if variant == "thumbnail":
            piece = job.pieces[0]
            return Response(
                await run_in_threadpool(thumbnail, service.store.path(job.id), piece),
                media_type="image/jpeg",
            )
        return _file(service, job)

    @api.delete("/v1/videos/{video_id}")
    async def delete(video_id: str) -> JSONResponse:
        job = job_of(service, video_id)
        await run_in_threadpool(service.delete, job)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    @api.post("/v1/videos/{video_id}/cancel", response_model=Video)
    async def cancel(video_id: str) -> JSONResponse:
        job = job_of(service, video_id)
        service.cancel(job)
        return _shown(service, job)

    @api.post("/v1/videos/{video_id}/finish", response_model=Video)
    async def finish(video_id: str) -> JSONResponse:
        job = job_of(service, video_id)
        finish_now(job)
        return _shown(service, job)

    _about(api, service)
    return api


def _about(api: APIRouter, service: Service) -> None:
    """What the server says of itself."""

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
        state = "ok" if service.healthy else "unavailable"
        return JSONResponse(
            {"status": state, "model": service.name, "queued": service.waiting},
            200 if service.healthy else 503,
        )

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(
            await run_in_threadpool(generate_latest, service.metrics.registry),
            media_type=CONTENT_TYPE_LATEST,
        )


def job_of(service: Service, video_id: str) -> Job:
    """A video by its id; raises `ApiError`."""
    job = service.get(video_id)
    if job is None:
        raise ApiError(
            404,
            f"video {video_id[:60]!r} is not here: never made, deleted, or removed to make room.",
            "video_id",
        )
    return job


def finish_now(job: Job) -> None:
    """Finish a deadline with one jump; raises `InvalidRequestError`."""
    if job.video.deadline_ms is None:
        raise InvalidRequestError(
            "this video has a number of steps, not a deadline; only a deadline can be finished"
            " early.",
            "deadline_ms",
        )
    job.stop_event.set()


def describe_service(service: Service) -> dict[str, Any]:
    """The model, with what may be asked of it."""
    manifest, limits = service.manifest, service.limits
    video, schedule = manifest.video, manifest.schedule
    default = {
        "size": f"{video.width}x{video.height}",
        "num_frames": video.frames,
        "num_inference_steps": schedule.steps,
    }
    return {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "anyflow_deploy",
        "kind": manifest.kind,
        "fps": video.fps,
        "default": default,
        "limits": {
            "num_frames": limits.frames,
            "pixels": limits.pixels,
            "num_inference_steps": limits.steps,
            "deadline_ms": limits.deadline_seconds * 1000,
            "prompt_characters": limits.prompt_characters,
        },
    }


async def _submitted(service: Service, request: Request) -> Job:
    video_request = service.validate(VideoRequest.model_validate(await _fields(request)))
    try:
        await run_in_threadpool(service.generator.check, video_request.prompt)
    except AnyFlowError as error:
        raise InvalidRequestError(str(error), "prompt") from None
    return service.submit(video_request, request_id.get())


async def _fields(request: Request) -> object:
    """The body, as JSON or as a form (which is what OpenAI's client sends)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form(max_files=1, max_fields=32) as form:
            if len(form) != len(form.multi_items()):
                raise ApiError(400, "a field is given twice.")
            if any(isinstance(value, UploadFile) for value in form.values()):
                raise InvalidRequestError(
                    "this server takes no files; describe the video in words.", "input_reference"
                )
            return dict(form)
    if kind not in ("application/json", ""):
        raise ApiError(
            415,
            f"Content-Type is {kind[:60]!r}; allowed are application/json and multipart/form-data.",
        )
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON.", code="invalid_json") from None


async def _ended(service: Service, request: Request, job: Job) -> None:
    """Wait for a video; who goes away does not want it any more."""
    try:
        async with news_of(job) as news:
            while not job.ended:
                news.clear()
                if await request.is_disconnected():
                    service.cancel(job)
                    return
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), 0.5)
    except asyncio.CancelledError:
        service.cancel(job)
        raise


@contextlib.asynccontextmanager
async def news_of(job: Job) -> AsyncIterator[asyncio.Event]:
    """An event that is set whenever something about a video changed."""
    news, loop = asyncio.Event(), asyncio.get_running_loop()

    def told() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(news.set)

    with job.subscribe(told):
        yield news


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


def _file(service: Service, job: Job) -> Response:
    path = service.store.path(job.id)
    if not path.is_file():
        raise ApiError(404, f"video {job.id} was removed to make room.", "video_id")
    headers = {"x-video-id": job.id, "Cache-Control": "private, no-store"}
    return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4", headers=headers)


def _shown(service: Service, job: Job) -> JSONResponse:
    return JSONResponse(service.snapshot(job).model_dump(), headers={} if job.ended else _POLL)


def _page(service: Service, after: str | None, limit: str, order: str) -> dict[str, Any]:
    if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:5]) <= 100:
        raise ApiError(400, f"limit is {limit[:40]!r}; allowed are 1 to 100.", "limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order is {order[:40]!r}; allowed are asc and desc.", "order")
    jobs = service.all() if order == "asc" else service.all()[::-1]
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
