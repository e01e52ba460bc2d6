"""The losses of a training run as an SVG picture that grows."""

import math
from collections.abc import Sequence

from midimamba.app.training_run import Point

_WIDTH, _HEIGHT = 720.0, 260.0
_LEFT, _TOP, _BOTTOM = 46.0, 12.0, 34.0
_KINDS = (("training music", "#2f6fdb"), ("music kept aside", "#d9622b"))


def draw_curve(training: Sequence[Point], held_out: Sequence[Point], minutes: float) -> str:
    """
    Draw losses over time as HTML with an SVG picture.

    Args:
        training, held_out (`Sequence[Point]`): the losses.
        minutes (`float`): the time of the whole run, which is the width of the picture.
    """
    points = [*training, *held_out]
    losses = [point.loss for point in points if math.isfinite(point.loss)]
    low, high = (math.floor(min(losses) * 2) / 2, math.ceil(max(losses) * 2) / 2) if losses else (0.0, 1.0)
    high = max(high, low + 0.5)
    last = max([minutes, *(point.minutes for point in points)])
    right, bottom = _WIDTH - 12, _HEIGHT - _BOTTOM

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + (right - _LEFT) * point.minutes / last
        return x, bottom - (bottom - _TOP) * (point.loss - low) / (high - low)

    parts = []
    for step in range(5):
        loss = low + (high - low) * step / 4
        y = place(Point(0, loss))[1]
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
        at = last * step / 4
        x = place(Point(at, low))[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{at:.3g}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">minutes</text>')
    for (_, colour), kind in zip(_KINDS, (training, held_out), strict=True):
        places = [place(point) for point in kind if math.isfinite(point.loss)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    legend = "".join(f'<span><i style="background:{colour}"></i>loss on {name}</span>' for name, colour in _KINDS)
    return (
        f'<div class="roll"><div class="roll-legend">{legend}</div><div class="roll-paper">'
        f'<svg role="img" aria-label="losses over time" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" style="width:100%">'
        f"{''.join(parts)}</svg></div></div>"
    )
