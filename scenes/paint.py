"""Rendering a scene in one of its states: polygons, shadows, light, supersampled.

A change adds, moves or recolours objects and nothing else, so every pixel outside its mask is equal
before and after (in between a few beside it may differ, where what grows or shrinks has its edge).
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from scenes.world import CHANGES, DURATION, House, Scene, craters, felled, new_houses, so_far

SUN = np.array([0.018, 0.022])  # offset of shadows, per unit of height
WATER, MUD, ROAD = np.array([62, 96, 132]), np.array([121, 116, 98]), np.array([142, 140, 136])
PANEL, GRAVEL = np.array([36, 50, 92]), np.array([74, 80, 104])
PITCH = 0.1  # of the rows of panels
STUMP = np.array([146, 118, 84])
RIM, PIT = np.array([206, 188, 156]), np.array([74, 60, 50])
SNOW = np.array([238, 242, 247])


def render(
    scene: Scene, state: dict[str, float] | None = None, *, outcome: int = 0, size: int = 64
) -> np.ndarray:
    """The scene's image, (size, size, 3) uint8. `state` is {change: time}; {} is summer, dry.

    A scene of a larger extent gives an image that many times as large.
    """
    time = dict.fromkeys(CHANGES, 0.0) | (state or {})
    if unknown := sorted(set(time) - set(CHANGES)):
        raise ValueError(f"unknown change {unknown[0]!r}; there are {', '.join(CHANGES)}")
    if not all(0 <= value <= 1 for value in time.values()):
        raise ValueError(f"times are in [0, 1], not {time}")
    side = scene.extent
    paint = _Paint(size, side)

    def snowy(colour: np.ndarray, cover: float) -> np.ndarray:
        return colour + (SNOW - colour) * cover * time["snow"]

    hedge = np.array([104, 136, 76])  # background, visible between fields
    paint.polygon([(0, 0), (side, 0), (side, side), (0, side)], snowy(hedge, 0.95))
    for f in scene.fields:
        colour = f.colour
        if f.kind != "bare":  # greens turn to straw
            colour = colour + time["autumn"] * np.array([38, -4, -14])
        paint.polygon(f.corners, snowy(colour, 0.95))
        if f.kind == "crop":
            _furrows(paint, f.corners, snowy(colour - 9, 0.95))
        if f.kind == "bare" and time["solar"] > 0:
            _panels(paint, f.corners, time["solar"], snowy(PANEL, 0.9), snowy(GRAVEL, 0.9), side)

    if time["flood"] > 0:  # the water rises by the same distance everywhere
        paint.blob(scene.water, scene.width + 0.13 * time["flood"], MUD)
    paint.blob(scene.water, scene.width, WATER)
    for road in scene.roads:
        paint.blob(road, 0.021, snowy(ROAD, 0.3))

    if time["craters"] > 0:
        for start, at, radius in craters(scene, outcome):
            r = radius * so_far(time["craters"], start)
            if r > 0:
                paint.disc(at, r, snowy(RIM, 0.7))
                paint.disc(at + SUN * r / 0.3, 0.68 * r, snowy(PIT, 0.4))

    houses = [(1.0, house) for house in scene.houses]
    if time["urban"] > 0:
        built = [(so_far(time["urban"], start), h) for start, h in new_houses(scene, outcome)]
        houses += [(done, house) for done, house in built if done > 0]
    for done, house in sorted(houses, key=lambda item: item[1].at[1]):
        _draw_house(paint, house, done, snowy(house.roof, 0.9))

    starts = felled(scene, outcome) if time["clearing"] > 0 else {}
    gone = {i: so_far(time["clearing"], start) for i, start in starts.items()}
    for i, tree in enumerate(scene.trees):
        if gone.get(i):
            paint.disc(tree.at, tree.radius * gone[i], snowy(STUMP, 0.8))
    for i, tree in enumerate(scene.trees):
        radius = tree.radius * (1 - gone.get(i, 0.0))
        if radius > 0:
            paint.disc(tree.at + SUN * radius / 0.04, radius, snowy(np.array([58, 72, 48]), 0.5))
    for i, tree in enumerate(scene.trees):
        radius = tree.radius * (1 - gone.get(i, 0.0))
        colour = tree.colour
        if not tree.evergreen:  # darker leaves turn redder, so the before image determines it
            colour = colour + time["autumn"] * np.array([122 - tree.colour[0] / 4, 4, -18])
        if radius > 0:
            paint.disc(tree.at, radius, snowy(colour, 0.5 if tree.evergreen else 0.65))
            paint.disc(tree.at - SUN * radius / 0.1, radius * 0.55, snowy(colour + 14, 0.75))
    return paint.finish(scene.light)


def _furrows(paint, corners, colour) -> None:
    """Darker strips along a field's longer side."""
    a, b, d = corners[0], corners[1], corners[3]
    across, along = (d - a, b - a) if np.hypot(*(b - a)) > np.hypot(*(d - a)) else (b - a, d - a)
    count = max(1, round(float(np.hypot(*across)) / 0.11))
    edge = 0.012 / float(np.hypot(*along))  # a margin at both ends
    left, right = a + edge * along, a + (1 - edge) * along
    for k in range(count):
        top, bottom = (k + 0.25) / count * across, (k + 0.75) / count * across
        paint.polygon([left + top, right + top, right + bottom, left + bottom], colour)


def _panels(paint, corners, time, panel, gravel, side) -> None:
    """Rows of panels on gravel over a whole field, built one after the other from the north.

    Determined by what is visible: rows follow the field's direction, and when a row is built
    depends on its position in the image, even if its field extends beyond it.
    """
    a, along, across = corners[0], corners[1] - corners[0], corners[3] - corners[0]
    depth = float(np.hypot(*across))
    north_to_south = across / depth
    for k in range(math.ceil(depth / PITCH)):
        top, bottom = k * PITCH / depth, min((k + 1) * PITCH / depth, 1.0)
        # 0..1 in the picture
        place = (a + along / 2 + top * across - side / 2) @ north_to_south / side + 0.5
        done = so_far(time, float(np.clip((place + 0.2) / 1.4, 0, 1)) * (1 - DURATION))
        for end, colour in ((bottom, gravel), (top + 0.7 * (bottom - top), panel)):
            row = [a + top * across, a + done * along + top * across,
                   a + done * along + end * across, a + end * across]  # fmt: skip
            if done > 0:
                paint.polygon(row, colour)


def _draw_house(paint, house: House, done: float, roof: np.ndarray) -> None:
    u = np.array([math.cos(house.angle), math.sin(house.angle)]) * house.size[0] / 2 * done
    v = np.array([-math.sin(house.angle), math.cos(house.angle)]) * house.size[1] / 2 * done
    box = np.array([house.at - u - v, house.at + u - v, house.at + u + v, house.at - u + v])
    shadow = SUN * 1.2 * done
    for step in (0.35, 0.7, 1.0):
        paint.polygon(box + step * shadow, np.array([70, 72, 66]))
    paint.polygon(box, roof)
    paint.polygon([house.at - u, house.at + u, box[2], box[3]], roof - 24)  # the shaded side


class _Paint:
    """A canvas of `side` units of `size` pixels, drawn at four times the size and averaged down."""

    def __init__(self, size: int, side: int):
        self.size, self.scale = side * size, 4 * size
        self.image = Image.new("RGB", (4 * self.size, 4 * self.size))
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points, colour) -> None:
        self.draw.polygon([tuple(p) for p in np.asarray(points) * self.scale], fill=_rgb(colour))

    def disc(self, at, radius, colour) -> None:
        (x, y), r = np.asarray(at) * self.scale, radius * self.scale
        self.draw.ellipse([x - r, y - r, x + r, y + r], fill=_rgb(colour))

    def blob(self, line, half_width, colour) -> None:
        """All points within `half_width` of a line, or of a point."""
        for at in line:  # round joints
            self.disc(at, half_width, colour)
        points = [tuple(p) for p in line * self.scale]
        self.draw.line(points, _rgb(colour), round(2 * half_width * self.scale))

    def finish(self, light: np.ndarray) -> np.ndarray:
        small = np.asarray(self.image.reduce(4), dtype=np.float32)
        shade = Image.fromarray(light.astype(np.float32)).resize((self.size,) * 2, Image.BICUBIC)
        return np.clip(small * np.asarray(shade)[..., None] + 0.5, 0, 255).astype(np.uint8)


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    r, g, b = np.clip(np.round(colour), 0, 255).astype(int).tolist()
    return r, g, b


def change_mask(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The pixels in which two states differ: (H, W) bool."""
    return (before != after).any(axis=-1)
