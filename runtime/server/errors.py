"""Errors as OpenAI's API words them: a status and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.service import BusyError, UnavailableError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "5"},
}


class ApiError(AngelForgeError):
    """A refusal with its HTTP status; `param` is the field of the request that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def status_of(error: AngelForgeError) -> int:
    """The HTTP status of an error: the caller's (4xx), or the server's (5xx)."""
    if isinstance(error, ApiError):
        return error.status
    if isinstance(error, BusyError):
        return 429
    if isinstance(error, UnavailableError):
        return 503
    return 400 if isinstance(error, UsageError) else 500


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error; also an event of a stream that breaks off."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An answer that is an error."""
    return JSONResponse(error_body(status, message, param, code), status, headers=_HEADERS.get(status))


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error of `app` look like OpenAI's."""

    async def told(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AngelForgeError)
        param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
        return error_response(status_of(error), str(error), param, code)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = describe(error.errors(), error.body)
        return error_response(400, message, param)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(error.status_code, f"{error.detail}: {request.method} {request.url.path}.")

    async def bug(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, "The server has made an error. Its standard error says more.")

    app.add_exception_handler(AngelForgeError, told)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


def describe(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """(a sentence about the first thing that is wrong, the field) of what pydantic found in `body`.

    Never quotes the input.
    """
    place, told = _of_the_form_that_was_meant(errors, body)
    if place[:1] == ("prompt",):  # one of several forms, each of which has its own error
        return "prompt: a text, a list of texts, a list of token ids or a list of such lists is expected.", "prompt"
    param = ".".join(map(str, place)) or None
    if told[0]["type"] == "extra_forbidden":
        return f"Unrecognized request argument supplied: {param}.", param
    if told[0]["type"] == "json_invalid":
        return "The body is not valid JSON.", None
    if told[0]["type"] == "none_required":  # a field of OpenAI's that is known, and empty or nothing here
        return f"{param} is not supported here; leave it out.", param
    if not place and isinstance(body, bytes):  # what other types of content are handed on as
        return "The body is taken as JSON with the header `Content-Type: application/json` only.", None
    texts = dict.fromkeys(str(each["msg"]).removeprefix("Value error, ").rstrip(".") for each in told)
    text = " or ".join(texts).replace(" or Input should be ", " or ")
    return (f"{param}: {text}." if param else f"The body: {text}."), param


def _of_the_form_that_was_meant(
    errors: Sequence[Mapping[str, Any]], body: Any
) -> tuple[tuple[str | int, ...], list[Mapping[str, Any]]]:
    """(the field, errors there) of the first of pydantic's errors.

    A field that may have several forms has errors of each, with the form's name in their places: those count that were
    found deepest within the field.
    """
    places = [_place_in(error, body) for error in errors]
    first, branching = places[0]
    if branching is None:
        return first, [errors[0]]
    field = first[:branching]
    depth = max(len(place) for place, _ in places if place[:branching] == field)
    deepest = next(place for place, _ in places if place[:branching] == field and len(place) == depth)
    return deepest, [error for error, (place, _) in zip(errors, places, strict=True) if place == deepest]


def _place_in(error: Mapping[str, Any], body: Any) -> tuple[tuple[str | int, ...], int | None]:
    """(the names and indices of an error's place that the body has, how many come before the name of a form)."""
    place: list[str | int] = []
    branching: int | None = None
    parts = [part for part in error["loc"] if part != "body"]
    for number, part in enumerate(parts):
        if isinstance(body, Mapping) and (part in body or (number == len(parts) - 1 and error["type"] == "missing")):
            place.append(part)
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            place.append(part)
            body = body[part]
        elif branching is None:
            branching = len(place)
    return tuple(place), branching
