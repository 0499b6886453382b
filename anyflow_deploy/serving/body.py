"""Read a request's body completely before the app gets it, within limits of bytes and seconds.

What is longer than the limit is read to its end all the same and thrown away: a client that is
still sending when the answer comes may never see it. The refusal names the field that made the body
long, such as a picture, where the beginning of the body shows it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Mapping

from starlette.types import Message, Receive

from anyflow_deploy.serving.errors import ApiError
from anyflow_deploy.serving.limits import Limits
from anyflow_deploy.serving.request import MEDIA_FIELDS, unsupported_field_error

_DISCARD_BYTES = 256 << 20
"""Of a body that is too long, at most so much is read and thrown away."""

_FILE_PART = re.compile(rb'[ ;]name="([A-Za-z0-9_.\[\]-]{1,64})"; *filename')
_MEDIA_KEY = re.compile(rb'"(' + "|".join(MEDIA_FIELDS).encode() + rb')" *:')


async def read_body(headers: Mapping[str, str], receive: Receive, limits: Limits) -> Receive:
    """Read a body; return what replays it to the app, followed by later messages.

    Args:
        headers: of the request, names in lower case.
        receive: ASGI's.
        limits: of bodies.

    Raises:
        ApiError: a body that is too long or takes too long.
    """
    messages: deque[Message] = deque()
    size, end = 0, time.monotonic() + limits.body_seconds
    while True:
        try:
            message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
        except asyncio.TimeoutError:
            if size > limits.body_bytes:
                break
            raise ApiError(
                408, f"the body did not arrive within {limits.body_seconds:g} s."
            ) from None
        if size <= limits.body_bytes:
            messages.append(message)
        size += len(message.get("body", b""))
        is_last = message["type"] != "http.request" or not message.get("more_body")
        if is_last or size > _DISCARD_BYTES:
            break
    if size > limits.body_bytes:
        head = b"".join(message.get("body", b"") for message in messages)
        raise _explain_length(headers.get("content-type", ""), head, limits.body_bytes)

    async def replay() -> Message:
        return messages.popleft() if messages else await receive()

    return replay


def _explain_length(content_type: str, head: bytes, limit: int) -> ApiError:
    pattern = _FILE_PART if content_type.lower().startswith("multipart/") else _MEDIA_KEY
    found = pattern.search(head)
    if found:
        refusal = unsupported_field_error(found[1].decode())
        return ApiError(400, str(refusal), refusal.param)
    return ApiError(
        413, f"the body is larger than {limit:,} bytes, which is what this server takes."
    )
