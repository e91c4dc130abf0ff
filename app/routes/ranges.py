"""Range requests as RFC 9110 has them, before starlette sees them: it answers what it cannot read in plain text, with 400."""

import re

from fastapi import HTTPException, Request

_RANGE = re.compile(r"([0-9]{0,18})-([0-9]{0,18})")


def settle_range(request: Request, size_bytes: int, *, etag: str) -> None:
    """Leave in the request only ranges that can be sent: what is malformed or for another version is ignored.

    Raises HTTPException 416 where ranges were asked for and none of them can be sent.
    """
    asked = request.headers.get("range")
    if asked is None:
        return
    wanted = _parse(asked) if request.method == "GET" and request.headers.get("if-range", etag) == etag else ()
    sendable = [f"{first}-{last}" for first, last in wanted if _is_within(first, last, size_bytes)]
    if wanted and not sendable:
        raise HTTPException(416, f"the file has {size_bytes} bytes", headers={"content-range": f"bytes */{size_bytes}"})
    kept = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
    request.scope["headers"] = [*kept, (b"range", f"bytes={','.join(sendable)}".encode())] if sendable else kept


def _parse(asked: str) -> tuple[tuple[str, str], ...]:
    """First and last byte of each range as written, `5-9`, `5-` or `-5`; none if any of it is malformed."""
    unit, _, listed = asked.partition("=")
    found = [_RANGE.fullmatch(text.strip()) for text in listed.split(",") if text.strip()]
    ranges = tuple((match[1], match[2]) for match in found if match is not None and _is_forward(match[1], match[2]))
    return ranges if unit.strip().lower() == "bytes" and len(ranges) == len(found) else ()


def _is_forward(first: str, last: str) -> bool:
    return int(first) <= int(last) if first and last else bool(first or last)


def _is_within(first: str, last: str, size_bytes: int) -> bool:
    return int(first) < size_bytes if first else int(last) > 0 < size_bytes
