"""The curve of a training as a picture: an SVG that any browser shows, drawn here so that looking at it needs no script."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 48  # margins
_COLOURS = {"training": "#b35900", "held out": "#00589c"}


def curve_svg(training: Mapping[str, Any]) -> str:
    """Loss against step: of the batches trained on, and of the held-out rows, whose least is marked.

    training: as a job's `learning`, or `training` of a certificate.
    """
    curve = training["curve"]
    lines = {
        "training": [(p["step"], p["loss"]) for p in curve if p["loss"] is not None],
        "held out": [(p["step"], -p["score"]) for p in curve],
    }
    values = [value for line in lines.values() for _, value in line]
    scale = _Scale(max(1, curve[-1]["step"]), min(values), max(values))
    best = next(p for p in curve if p["step"] == training["best_step"])
    body = [
        *_axes(scale, f"best at step {best['step']} of {training['steps']}: {-best['score']:.4g}"),
        *(_line(name, line, scale) for name, line in lines.items()),
        f'<circle cx="{scale.x(best["step"]):.1f}" cy="{scale.y(-best["score"]):.1f}" r="4" fill="{_COLOURS["held out"]}"/>',
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>', *body, "</svg>\n"])


class _Scale:
    """Steps and losses to places in the picture."""

    def __init__(self, steps: int, low: float, high: float) -> None:
        self.steps, self.low, self.high = steps, low, high

    def x(self, step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / self.steps

    def y(self, loss: float) -> float:
        share = (loss - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def _axes(scale: _Scale, title: str) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    ticks = [scale.low, (scale.low + scale.high) / 2, scale.high] if scale.high > scale.low else [scale.low]
    return [
        _text(_LEFT, 20, title),
        *(f'<path d="M{_LEFT} {scale.y(t):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>' for t in ticks),
        *(_text(_LEFT - 6, scale.y(t) + 4, f"{t:.4g}", "end") for t in ticks),
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}" fill="none" stroke="#444"/>',
        _text(_LEFT, bottom + 16, "0", "middle"),
        _text(_WIDTH - _RIGHT, bottom + 16, str(scale.steps), "end"),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 16, "step", "middle"),
        _text(_LEFT, _HEIGHT - 8, "loss of the batches", colour=_COLOURS["training"]),
        _text(_LEFT + 140, _HEIGHT - 8, "loss of the held-out rows", colour=_COLOURS["held out"]),
    ]


def _line(name: str, points: Sequence[tuple[int, float]], scale: _Scale) -> str:
    placed = " ".join(f"{scale.x(step):.1f},{scale.y(loss):.1f}" for step, loss in points)
    return f'<polyline points="{placed}" fill="none" stroke="{_COLOURS[name]}" stroke-width="2"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
