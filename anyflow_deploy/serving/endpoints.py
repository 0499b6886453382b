"""The paths of this server, for answers to requests that go elsewhere.

A client that was made for another server asks for paths that this one does not have. It is told
what there is, and where it helps, why the other thing is not.
"""

from __future__ import annotations

import difflib
import re

from anyflow_deploy.serving.errors import ApiError

ENDPOINTS = {
    "/v1/videos": ("GET", "POST"),
    "/v1/videos/sync": ("POST",),
    "/v1/videos/{video_id}": ("GET", "DELETE"),
    "/v1/videos/{video_id}/content": ("GET",),
    "/v1/videos/{video_id}/cancel": ("POST",),
    "/v1/videos/{video_id}/finish": ("POST",),
    "/v1/models": ("GET",),
    "/v1/models/{model}": ("GET",),
    "/health": ("GET",),
    "/metrics": ("GET",),
    "/openapi.json": ("GET",),
}
"""Path to methods; HEAD is answered wherever GET is. The WebSocket is no path of HTTP."""

_STREAM = re.compile(r"/v1/videos/[^/]+/stream")
_EDITS = re.compile(r"/v1/videos/(?:[^/]+/)?(remix|edits|extensions|characters)(/.*)?")
_OTHER_MEDIA = re.compile(
    r"/v1/(chat|completions|responses|embeddings|images|audio|moderations|files|batches)(/.*)?"
)


def explain_unknown_path(path: str) -> ApiError:
    """Make the answer (404) to a path that this server does not have."""
    shown = path[:100].encode("ascii", "backslashreplace").decode()
    edit, other = _EDITS.fullmatch(path), _OTHER_MEDIA.fullmatch(path)
    code = "not_supported" if edit or other else "unknown_path"
    if edit:
        reason = (
            f"{edit[1]} is not supported: a video cannot be changed after it is made. Make another"
            " one with the changed prompt and the same seed: POST /v1/videos."
        )
    elif other:
        reason = f"{shown!r} is not here: this server makes videos, POST /v1/videos."
    elif _STREAM.fullmatch(path):
        reason = f"{shown!r} is a WebSocket; connect to it with ws:// or wss://."
    else:
        near = [f"/v1{path}"] if _find_pattern(f"/v1{path}") else _nearest(path)
        advice = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(ENDPOINTS)}."
        reason = f"{shown!r} is no path of this server. {advice}"
    return ApiError(404, reason, code=code)


def explain_method(method: str, path: str) -> ApiError:
    """Make the answer (405) to a method that a path does not have.

    What other servers have where this one sees an id (`/v1/videos/edits`) is answered as unknown.
    """
    if _EDITS.fullmatch(path):
        return explain_unknown_path(path)
    pattern = _find_pattern(path)
    allowed = [*ENDPOINTS[pattern]] if pattern else ["GET"]
    if "GET" in allowed:
        allowed.insert(1, "HEAD")
    return ApiError(
        405,
        f"{method[:20]} is not for {path[:100]!r}; allowed are {', '.join(allowed)}.",
        headers={"Allow": ", ".join(allowed)},
    )


def _find_pattern(path: str) -> str | None:
    """Return the endpoint of a path, the fixed ones before those with an id."""
    if path in ENDPOINTS:
        return path
    for pattern in ENDPOINTS:
        if "{" in pattern and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", pattern), path):
            return pattern
    return None


def _nearest(path: str) -> list[str]:
    """Return the endpoint that is spelt almost so, if there is one."""
    stripped = path.rstrip("/") or "/"
    if _find_pattern(stripped):
        return [stripped]
    return difflib.get_close_matches(stripped, ENDPOINTS, n=1, cutoff=0.75)
