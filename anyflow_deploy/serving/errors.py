"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`.

Every answer of this server that is not a success has this form, also those of the framework (no
such page, no such method).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from anyflow_deploy.errors import AnyFlowError, InvalidRequestError
from anyflow_deploy.serving.request import VideoRequest, explain_unknown_field
from anyflow_deploy.serving.service import BusyError, ClosingError, LoadingError

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
        status: HTTP status.
        message: for people.
        param: the field that is wrong.
        code: for programs; by default that of the status.
        headers: additional headers.
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

    def to_response(self) -> JSONResponse:
        """Make the HTTP response."""
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        param = None if self.param is None else _escape_surrogates(self.param)
        body = {
            "message": _escape_surrogates(self.message),
            "type": kind,
            "param": param,
            "code": self.code,
        }
        return JSONResponse({"error": body}, self.status, self.headers)


def api_error_from_exception(error: Exception) -> ApiError:
    """Turn an exception into the answer that a client gets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), error.param)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), headers={"Retry-After": str(error.seconds)})
    if isinstance(error, ClosingError):
        return ApiError(503, str(error), code="server_shutdown", headers={"Retry-After": "30"})
    if isinstance(error, LoadingError):
        return ApiError(
            503, str(error), code="loading", headers={"Retry-After": str(error.seconds)}
        )
    if isinstance(error, ValidationError):
        return _api_error_from_validation(error)
    if isinstance(error, AnyFlowError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.", headers=error.headers)
    return ApiError(
        500, "an error of the server; its log has it under the request id of this answer."
    )


def install_error_handlers(
    app: FastAPI,
    explain_unknown_path: Callable[[str], ApiError],
    explain_method: Callable[[str, str], ApiError],
) -> None:
    """Let every error of an app be answered in this form.

    Args:
        app: whose errors are answered.
        explain_unknown_path: makes the answer to a path that the app does not have.
        explain_method: makes the answer to a method that a path does not have.
    """

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return api_error_from_exception(error).to_response()

    async def answer_router(request: Request, error: Exception) -> JSONResponse:
        scope = request.scope
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        status = getattr(error, "status_code", 500)
        if status == 404:
            return explain_unknown_path(path).to_response()
        if status == 405:
            return explain_method(request.method, path).to_response()
        return await answer(request, error)

    for kind in (ApiError, AnyFlowError, ValidationError, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(HTTPException, answer_router)


def _escape_surrogates(text: str) -> str:
    """Escape half characters, which a client may send and UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _api_error_from_validation(error: ValidationError) -> ApiError:
    """Report the first thing that is wrong with a request's fields."""
    problem: Any = error.errors(include_url=False)[0]
    field = str(problem["loc"][0])[:40] if problem["loc"] else None
    if problem["type"] == "missing":
        return ApiError(400, f"{field} is missing.", field, "missing_required_parameter")
    if problem["type"] == "extra_forbidden":
        message = explain_unknown_field(str(field), VideoRequest.model_fields)
        return ApiError(400, message, field, "unknown_parameter")
    value = repr(problem["input"])
    return ApiError(400, f"{field or 'the body'} is {value[:60]}: {problem['msg'].lower()}.", field)
