"""Errors that clients get, with the statuses and bodies of OpenAI's and Anthropic's APIs."""

from dataclasses import dataclass, field

RETRY_S = 2  # what Retry-After says when the queue is full


@dataclass
class ApiError(Exception):
    """status: of HTTP. message: what was found, and what is supported. code, param: OpenAI's, for programs."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, code, param)


def unsupported(what: str, instead: str, param: str | None = None) -> ApiError:
    """A feature of the API that this server does not have."""
    return ApiError(400, f"{what} is not supported; {instead}", "unsupported_value", param)


def too_many(what: str) -> ApiError:
    return ApiError(
        429, f"{what}; try again in {RETRY_S} seconds", "rate_limit_exceeded", None, {"Retry-After": str(RETRY_S)}
    )


def too_long(message: str, param: str) -> ApiError:
    return ApiError(400, message, "context_length_exceeded", param)


def late(timeout_s: float) -> ApiError:
    """No answer before the deadline. Clients repeat requests after a 504, which would be as late again."""
    message = f"the request took more than {timeout_s:g} seconds, the server's limit"
    return ApiError(504, message, "timeout", None, {"x-should-retry": "false"})


# By status: the `type` of OpenAI's and of Anthropic's errors.
OPENAI_TYPES = {429: "requests", 500: "server_error", 503: "server_error", 504: "timeout_error"}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def openai_error(error: ApiError) -> dict:
    kind = OPENAI_TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict:
    kind = ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
