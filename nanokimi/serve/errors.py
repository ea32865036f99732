"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` with the right status."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanokimi.errors import UserError
from nanokimi.serve.schemas import FIELDS, UNSUPPORTED

INVALID = "invalid_request_error"
FAILED = "server_error"


class ApiError(Exception):
    """What the client is told, and with which status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def json(self) -> str:
        """The body. ASCII throughout: a field's name may hold lone surrogates, which UTF-8 cannot."""
        return json.dumps(self.content)

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.json(), self.status, self.headers, "application/json")


def refused(error: UserError, *, param: str | None = None) -> ApiError:
    """A user's mistake as status 400; flags of the command line are fields here."""
    return ApiError(400, str(error).removeprefix("--").replace(" --", " "), param=param)


def install_handlers(app: FastAPI) -> None:
    """Makes every error of ``app`` one in OpenAI's shape."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_crash)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        return ApiError(415, f"the body's type is {kind or 'not given'}: send application/json").response()
    return _explained(error.errors()).response()


def _explained(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first field that is wrong, and why."""
    first = found[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}")
    name = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    if name is None:
        return ApiError(400, f"the body must be a JSON object: {_reason(first)}")
    if name in UNSUPPORTED:
        return ApiError(400, f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")
    if first["type"] == "extra_forbidden":
        where = ".".join([*_path(first["loc"][1:-1]), str(first["loc"][-1])])
        return ApiError(400, f"unknown field {where}: leave it out", param=where, code="unknown_parameter")
    # Where several types are allowed, the value was held against each: what came furthest was probably meant.
    paths = [(_path(one["loc"][1:]), one) for one in found if one["loc"][1] == first["loc"][1]]
    path = max((path for path, _ in paths), key=len)
    reasons = dict.fromkeys(_reason(one) for other, one in paths if other == path)
    return ApiError(400, f"{'.'.join(path)}: {' or '.join(reasons)}", param=name)


def _path(location: Sequence[Any]) -> list[str]:
    """Fields and places in lists, without the names of the types that were tried."""
    return [str(part) for part in location if isinstance(part, int) or part in FIELDS]


def _reason(found: Mapping[str, Any]) -> str:
    reason = str(found["msg"]).removeprefix("Value error, ")
    return reason[:1].lower() + reason[1:]


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: an unknown path, a method, an oversized or unreadable body."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _on_crash(request: Request, error: Exception) -> Response:
    """A fault of ours: Starlette hands it on to the server's log."""
    return ApiError(500, "the server failed; its log says why", kind=FAILED).response()
