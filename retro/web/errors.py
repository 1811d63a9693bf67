"""Errors in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

HALF = "the body holds half of a surrogate pair; give whole characters."
MOST = 1 << 63  # from here on a number of a request is none
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_SOON = {"Retry-After": "1"}


class _Told(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error: one sentence, and what it is about."""

    error: _Told


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI page says of errors of these statuses, and of all others."""
    about = {status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in statuses}
    return about | {"default": {"model": ErrorBody, "description": "Another error"}}


class ApiError(ValueError):
    """What went wrong, in one sentence, for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self._headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        kind = "timeout_error" if self.status == 504 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": _whole(str(self)), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        if self._headers is not None:
            return self._headers
        return {401: {"WWW-Authenticate": "Bearer"}}.get(self.status, _SOON if self.status in (429, 503) else {})


def shown(value: Any) -> str:
    """A value as JSON, cut to what fits in a sentence."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def validation_error(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's errors as one sentence that names the field and its value."""
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ApiError):
        return cause
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {cause}, at character {first['loc'][-1]}.")
    if first["type"] == "string_unicode":
        return ApiError(400, HALF)
    name = _field(first)
    if not name:
        return ApiError(400, "the body must be a JSON object, sent as application/json.")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is no field that this server knows; leave it out.", name, "unknown_field")
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing.", name, "missing_field")
    said = first["msg"][0].lower() + first["msg"][1:]
    return ApiError(400, f"{name} is {shown(first['input'])}: {said}.", name, "invalid_value")


def _field(error: Any) -> str:
    """The path of the field that an error is about; pydantic adds the types of a union that it tried."""
    path = list(error["loc"][1:])
    if error["type"] != "extra_forbidden":
        tried = (i for i, part in enumerate(path) if isinstance(part, str) and (part == "str" or "[" in part))
        path = path[: next(tried, len(path))]
    return _whole(".".join(map(str, path)))[:80]


def _whole(text: str) -> str:
    """Without half characters, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
