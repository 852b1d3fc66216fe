"""What can go wrong with a request. Each error carries its HTTP status and says which field, which value, what was expected.

The server renders them as JSON, the client raises them again from that JSON: one vocabulary on both sides of the wire.
Knows nothing of HTTP beyond the numbers; needs the standard library only.
"""

from __future__ import annotations

import json
from typing import Any

_LONGEST_ECHO = 200  # characters of a wrong value that are sent back


class ServingError(Exception):
    """An answer other than samples. `message` is a sentence, `expected` says what would have been accepted."""

    status = 500
    code = "internal"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: Any = None,
        expected: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.field, self.value, self.expected = message, field, value, expected
        self.headers = headers or {}
        self.request_id = ""  # of the request that it answers, by which the server's logs can be searched

    def body(self) -> bytes:
        fields = {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "value": _echo(self.value),
            "expected": self.expected,
            "request_id": self.request_id,
        }
        return json.dumps({"error": fields}).encode()

    @staticmethod
    def parse(status: int, body: bytes) -> ServingError:
        """The error that a server answered with; any other body (a proxy's own page) becomes the message as it stands."""
        try:
            fields = json.loads(body)["error"]
            kind = next((kind for kind in KINDS if kind.code == fields["code"]), ServingError)
            error = kind(fields["message"], field=fields["field"], value=fields["value"], expected=fields["expected"])
            error.code, error.request_id = fields["code"], fields.get("request_id", "")
        except (ValueError, KeyError, TypeError):
            error = ServingError(f"HTTP {status}: {body[:_LONGEST_ECHO].decode(errors='replace') or 'empty answer'}")
        error.status = status
        return error


class BadRequest(ServingError):
    status, code = 400, "bad_request"


class NotFound(ServingError):
    status, code = 404, "not_found"


class MethodNotAllowed(ServingError):
    status, code = 405, "method_not_allowed"


class NotAcceptable(ServingError):
    status, code = 406, "not_acceptable"


class BodyTooLarge(ServingError):
    status, code = 413, "body_too_large"


class UnsupportedEncoding(ServingError):
    status, code = 415, "unsupported_encoding"


class InvalidValue(ServingError):
    status, code = 422, "invalid_value"


class Overloaded(ServingError):
    status, code = 429, "overloaded"


class SamplingFailed(ServingError):
    """The model itself failed on this input, or gave what the asked format cannot hold."""

    status, code = 500, "sampling_failed"


class Unavailable(ServingError):
    """A version that the registry holds but this replica refuses or has not loaded. Who asks again may reach another replica."""

    status, code = 503, "unavailable"

    def __init__(self, message: str, **about: Any) -> None:
        super().__init__(message, **about)
        self.headers = {"Retry-After": "1"} | self.headers


class RolledBack(Unavailable):
    """The version has been rolled back since it was found: its samples are for those alone who name it."""


class DeadlineExceeded(ServingError):
    """The client said how long it would wait, or the server's own limit was met."""

    status, code = 504, "deadline_exceeded"


KINDS = (
    BadRequest,
    NotFound,
    MethodNotAllowed,
    NotAcceptable,
    BodyTooLarge,
    DeadlineExceeded,
    InvalidValue,
    Overloaded,
    SamplingFailed,
    Unavailable,
    UnsupportedEncoding,
)


def _echo(value: Any) -> Any:
    """`value` if it is short and JSON can hold it, else its beginning as text."""
    text = json.dumps(value)
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return text[:_LONGEST_ECHO]
    return value if len(text) <= _LONGEST_ECHO else text[:_LONGEST_ECHO] + "..."
