"""Errors in the shape that OpenAI's clients read: `{"error": {"message", "type", "param",
"code"}}`.

Every answer of this server that is not a success has it, also those of the framework (no such page,
no such method).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from anyflow_deploy.errors import AnyFlowError, InvalidRequestError, suggestion
from anyflow_deploy.serving.request import VideoRequest
from anyflow_deploy.serving.service import BusyError, ClosingError

_log = logging.getLogger("anyflow.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    500: "server_error",
    503: "unavailable",
}


class ApiError(Exception):
    """An answer that is not a success.

    Args:
        status: HTTP's.
        message: for the person who asked.
        param: the field that is wrong.
        code: for programs; the status's own where not given.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = headers
        self.code = code or _CODES.get(status, "error")

    def answer(self) -> JSONResponse:
        """As HTTP."""
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        param = None if self.param is None else _sendable(self.param)
        body = {"message": _sendable(self.message), "type": kind, "param": param, "code": self.code}
        return JSONResponse({"error": body}, self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), error.param)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), headers={"Retry-After": str(error.seconds)})
    if isinstance(error, ClosingError):
        return ApiError(503, str(error), code="server_shutdown", headers={"Retry-After": "30"})
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, AnyFlowError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.", headers=error.headers)
    return ApiError(
        500, "an error of the server; its log has it under the request id of this answer."
    )


def answer_in_shape(app: FastAPI) -> None:
    """Have every error of an app answered in this shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).answer()

    for kind in (ApiError, AnyFlowError, HTTPException, ValidationError, Exception):
        app.add_exception_handler(kind, answer)


def _sendable(text: str) -> str:
    """What a client wrote may hold half a character, which UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()


def _invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request's fields."""
    problem: Any = error.errors(include_url=False)[0]
    field = str(problem["loc"][0])[:40] if problem["loc"] else None
    if problem["type"] == "missing":
        return ApiError(400, f"{field} is missing.", field, "missing_required_parameter")
    if problem["type"] == "extra_forbidden":
        known = list(VideoRequest.model_fields)
        advice = suggestion(str(field), known) or f" Allowed are {', '.join(known)}."
        return ApiError(400, f"unknown field {field!r}.{advice}", field, "unknown_parameter")
    given = repr(problem["input"])
    return ApiError(400, f"{field or 'the body'} is {given[:60]}: {problem['msg'].lower()}.", field)
