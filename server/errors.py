"""Every error that a user or a machine can cause, in one tree. Each knows its HTTP status, OpenAI type and code.

ServerError
├── ClientError           400, the request is at fault
│   ├── AuthenticationError 401, NotFoundError 404, MethodNotAllowedError 405, TooLargeError 413, MediaTypeError 415,
│     HeadersTooLargeError 431
├── DeadlineError         408, the request's time is over
├── CapacityError         429, try again later
│   └── QuotaError          429, one client's share is used up
├── UnavailableError      503, loading or draining
│   └── EngineDeadError   503, the engine is gone
└── RequestFailedError    500, a step failed for this request alone

ConfigError and CheckpointError stop the start, EngineBrokenError ends a running engine; they never reach a client.
Messages name the parameter, the limit and the value given; they never repeat a payload.
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of all that is answered to a client as an OpenAI error object."""

    status = 500
    type = "server_error"
    default_code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after = retry_after


class ClientError(ServerError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class AuthenticationError(ClientError):
    status = 401
    default_code = "invalid_api_key"


class NotFoundError(ClientError):
    status = 404
    default_code = "not_found"


class MethodNotAllowedError(ClientError):
    status = 405
    default_code = "method_not_allowed"


class TooLargeError(ClientError):
    status = 413
    default_code = "request_too_large"


class MediaTypeError(ClientError):
    status = 415
    default_code = "unsupported_media_type"


class HeadersTooLargeError(ClientError):
    status = 431
    default_code = "headers_too_large"


class CapacityError(ServerError):
    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"


class QuotaError(CapacityError):
    default_code = "rate_limit_exceeded"


class DeadlineError(ServerError):
    status = 408
    type = "timeout_error"
    default_code = "request_timeout"


class UnavailableError(ServerError):
    status = 503
    default_code = "server_shutting_down"


class EngineDeadError(UnavailableError):
    default_code = "engine_unavailable"


class RequestFailedError(ServerError):
    """A step failed and the failure belongs to this request."""


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key."""


class CheckpointError(Exception):
    """The checkpoint cannot be used; the message names the file or the tensor."""


class EngineBrokenError(Exception):
    """No later step of this engine can succeed; only a new one helps."""
