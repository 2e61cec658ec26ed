"""A plot of a number over the training steps."""

import math

from PIL import Image, ImageDraw

SIZE = 720, 360


def curve(points: list[tuple[float, float]], name: str) -> Image.Image:
    """(step, value) points and their running mean; logarithmic if all values are positive."""
    left, right, top, bottom = 64, SIZE[0] - 16, 24, SIZE[1] - 32
    xs, ys = [x for x, _ in points], [y for _, y in points]
    finite = [y for y in ys if math.isfinite(y)] or [1.0]
    log = min(finite) > 0
    scale = (lambda y: math.log10(y)) if log else (lambda y: y)
    low, high = scale(min(finite)), scale(max(finite))
    span_x, span_y = max(xs[-1] - xs[0], 1), (high - low) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        along, up = (x - xs[0]) / span_x, (scale(y) - low) / span_y
        return left + along * (right - left), bottom - up * (bottom - top)

    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    for i in range(5):
        level = low + i / 4 * span_y
        y = bottom - i / 4 * (bottom - top)
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text((6, y - 6), f"{10**level if log else level:.3g}", fill="#444444")
        x = xs[0] + i / 4 * span_x
        draw.text((at(x, min(finite))[0] - 10, bottom + 8), f"{x:.0f}", fill="#444444")
    draw.text((left, 6), f"{name} over steps{', logarithmic' if log else ''}", fill="black")
    draw.line([at(x, y) for x, y in points if math.isfinite(y)], fill="#9fc5e8", width=1)
    half = len(points) // 40  # the mean over a twentieth of the run around each point
    means = []
    for i, (x, _) in enumerate(points):
        around = [y for y in ys[max(i - half, 0) : i + half + 1] if math.isfinite(y)]
        if around:
            means.append(at(x, sum(around) / len(around)))
    draw.line(means, fill="#1f5fa8", width=2)
    return image
