"""Asking a real server to learn."""

from typing import Any

from serving import Server


def add_file(server: Server, data: bytes, name: str = "data") -> str:
    answer = server.http.post("/data", files={"file": (name, data)})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def run(server: Server, body: dict[str, Any], *, wait_s: float = 180) -> dict[str, Any]:
    answer = server.http.post("/merge", json=body)
    assert answer.status_code in {200, 202}, answer.text
    return server.ended(answer.json()["id"], wait_s=wait_s)
