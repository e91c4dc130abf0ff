"""How large a request may be. Counted while the body arrives, so that a lie in Content-Length gains nothing."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_JSON_BYTES = 4 * 1024 * 1024
_FORM_BYTES = 8 * 1024 * 1024  # the config beside the weights, and the form around both


class BodyLimit:
    """ASGI middleware: 413 for a body above the limit, which is `upload_bytes` for multipart and 4 MiB for the rest.

    FastAPI's own `max_body_size` answers in plain text where the body is announced but not read; ours is always a problem.
    """

    def __init__(self, app: ASGIApp, upload_bytes: int) -> None:
        self.app = app
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_form = headers.get("content-type", "").startswith("multipart/form-data")
        limit_bytes = self.upload_bytes + _FORM_BYTES if is_form else _JSON_BYTES
        await self.app(scope, _counted(receive, headers, limit_bytes), send)


def _counted(receive: Receive, headers: Headers, limit_bytes: int) -> Receive:
    announced = headers.get("content-length", "0")
    seen_bytes = int(announced) if announced.isdecimal() and int(announced) > limit_bytes else 0

    async def counted() -> Message:
        nonlocal seen_bytes
        message = {"type": "http.request"} if seen_bytes > limit_bytes else await receive()
        seen_bytes += len(message.get("body", b""))
        if seen_bytes > limit_bytes:
            raise HTTPException(413, f"the body is larger than the {limit_bytes} bytes allowed here")
        return message

    return counted
