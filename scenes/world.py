"""The content of a scene and its changes: fields, water, roads, trees, houses; no pixels yet.

A scene fills a square of side 1, or `extent`, and is a function of its seed: fields in a rotated
frame, roads, a river or a lake, woods, houses. `urban`, `clearing` and `craters` are random given
the scene: each outcome seed is one truth.
"""

import math
from dataclasses import dataclass

import numpy as np

CHANGES = {  # name: its phrase in captions
    "urban": "with new houses",
    "flood": "flooded",
    "autumn": "in autumn",
    "clearing": "with felled trees",
    "snow": "in snow",
    "solar": "with solar farms",
    "craters": "with craters",
}

BARE = np.array([191, 161, 118])
GREENS = {
    "crop": np.array([[98, 136, 62], [152, 164, 78], [78, 116, 58]]),
    "meadow": np.array([[124, 160, 86], [112, 150, 92]]),
}
ROOFS = np.array([[166, 78, 62], [122, 88, 74], [186, 122, 92], [112, 116, 126]])
LEAVES, NEEDLES = np.array([66, 106, 52]), np.array([38, 74, 58])


@dataclass(frozen=True)
class Field:
    corners: np.ndarray  # (4, 2): a rectangle of the rotated frame, in x, y
    kind: str  # bare, crop or meadow
    colour: np.ndarray


@dataclass(frozen=True)
class Tree:
    at: np.ndarray
    radius: float
    colour: np.ndarray
    evergreen: bool


@dataclass(frozen=True)
class House:
    at: np.ndarray
    size: tuple[float, float]
    angle: float
    roof: np.ndarray


@dataclass(frozen=True)
class Scene:
    seed: int
    fields: list[Field]
    water: np.ndarray  # (n, 2): the river's course, or one point, the lake's centre
    width: float  # half the river's width, or the lake's radius
    roads: list[np.ndarray]  # each (2, 2)
    trees: list[Tree]
    houses: list[House]
    light: np.ndarray  # (4 extent, 4 extent): brightness at the corners of a coarse grid
    extent: int = 1  # the square's side; objects have the same size in all


# ---- the scene -----------------------------------------------------------------------------------


def make_scene(seed: int, extent: int = 1) -> Scene:
    """The scene of a seed. Each has a bare field, water, trees and a road: every change applies."""
    rng = np.random.default_rng([seed, 0])
    angle = rng.uniform(-0.5, 0.5)
    rotate = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    middle = extent / 2
    to_xy = lambda uv: (np.asarray(uv) - middle) @ rotate + middle  # noqa: E731

    low, high = -0.35 * extent, 1.35 * extent
    rectangles, cuts = _split(rng, (low, low, high, high))
    quads = [to_xy([(a, b), (c, b), (c, d), (a, d)]) for a, b, c, d in rectangles]
    fields = _fields(rng, quads, extent)
    roads = [to_xy(cuts[i]) for i in range(extent * (1 + int(rng.random() < 0.4)))]

    if rng.random() < 0.6:  # a river from side to side
        start, end = extent * rng.uniform(0.15, 0.85, 2)
        x = np.linspace(-0.1, extent + 0.1, 25 * extent)
        waves, phase = rng.uniform(0.7, 1.4), rng.random()
        bend = rng.uniform(0.03, 0.09) * np.sin(2 * np.pi * (waves * x + phase))
        water = np.stack([x, start + (end - start) / extent * x + bend], axis=1)
        water = water[:, ::-1] if rng.random() < 0.5 else water
        width = rng.uniform(0.03, 0.055)
    else:
        water, width = extent * rng.uniform(0.2, 0.8, (1, 2)), rng.uniform(0.09, 0.15)

    houses = _houses(rng, roads, water, width, extent)
    trees = _trees(rng, roads, water, width, houses, extent)
    light = np.random.default_rng([seed, 1]).uniform(0.94, 1.06, (4 * extent, 4 * extent))
    return Scene(seed, fields, water, width, roads, trees, houses, light, extent)


def _split(rng, box) -> tuple[list, list]:
    """Split rectangles until they are fields; returns the cuts too, longest first, as (2, 2)."""
    done, cuts, todo = [], [], [box]
    while todo:
        a, b, c, d = todo.pop(0)
        if min(c - a, d - b) < 0.5 or ((c - a) * (d - b) < 0.45 and rng.random() < 0.4):
            done.append((a, b, c, d))
            continue
        part = rng.uniform(0.38, 0.62)
        if c - a > d - b:
            x = a + part * (c - a)
            todo += [(a, b, x, d), (x, b, c, d)]
            cuts.append([(x, b), (x, d)])
        else:
            y = b + part * (d - b)
            todo += [(a, b, c, y), (a, y, c, d)]
            cuts.append([(a, y), (c, y)])
    return done, cuts


def _fields(rng, quads, extent: int) -> list[Field]:
    """A fifth to a half of the visible area is bare: where solar farms are built."""
    grid = np.stack(np.meshgrid(*[(np.arange(24 * extent) + 0.5) / 24] * 2), axis=-1).reshape(-1, 2)
    share = np.array([extent**2 * _inside(grid, quad).mean() for quad in quads])
    bare, order = set(), rng.permutation(len(quads))
    for i in order:
        if share[list(bare)].sum() < 0.2 * extent**2 and share[i] > 0.04 and share[i] < 0.5:
            bare.add(i)
    if not bare:
        bare.add(int(share.argmax()))
    fields = []
    for i, quad in enumerate(quads):
        kind = "bare" if i in bare else str(rng.choice(["crop", "meadow"]))
        colour = BARE if kind == "bare" else GREENS[kind][rng.integers(len(GREENS[kind]))]
        fields.append(Field(quad, kind, colour + rng.uniform(-8, 8)))
    return fields


def _inside(points: np.ndarray, quad: np.ndarray) -> np.ndarray:
    edges = np.roll(quad, -1, axis=0) - quad
    to = points[:, None] - quad
    side = edges[:, 0] * to[..., 1] - edges[:, 1] * to[..., 0]
    return (side >= 0).all(1) | (side <= 0).all(1)


def _to_water(at: np.ndarray, water: np.ndarray, width: float) -> float:
    """Distance of a point to the water's edge; the course's points are dense enough."""
    return float(np.hypot(*(water - at).T).min()) - width


def _to_line(at: np.ndarray, line: np.ndarray) -> float:
    a, along = line[0], line[1] - line[0]
    s = np.clip((at - a) @ along / (along @ along), 0, 1)
    return float(np.hypot(*(at - a - s * along)))


def _houses(rng, roads, water, width, extent: int) -> list[House]:
    """A few along the roads."""
    houses: list[House] = []
    wanted = extent**2 * rng.integers(2, 6)
    for _ in range(60 * extent**2):
        if len(houses) == wanted:
            break
        road = roads[rng.integers(len(roads))]
        along = (road[1] - road[0]) / np.hypot(*(road[1] - road[0]))
        at = road[0] + rng.random() * (road[1] - road[0])
        at = at + along[::-1] * (-1, 1) * rng.choice([-1, 1]) * rng.uniform(0.075, 0.095)
        if _free(at, houses, [], roads, water, width, extent):
            houses.append(_house(rng, at, math.atan2(along[1], along[0])))
    return houses


def _house(rng, at: np.ndarray, angle: float) -> House:
    size = (rng.uniform(0.085, 0.115), rng.uniform(0.065, 0.085))
    return House(at, size, angle, ROOFS[rng.integers(len(ROOFS))] + rng.uniform(-6, 6))


def _free(at, houses, trees, roads, water, width, extent) -> bool:
    return (
        at.min() > 0.05
        and at.max() < extent - 0.05
        and _to_water(at, water, width) > 0.075
        and all(_to_line(at, road) > 0.07 for road in roads)
        and all(np.hypot(*(h.at - at)) > 0.13 for h in houses)
        and all(np.hypot(*(t.at - at)) > t.radius + 0.045 for t in trees)
    )


def _trees(rng, roads, water, width, houses, extent: int) -> list[Tree]:
    """One to three woods and some single trees."""
    places = list(rng.uniform(0.02, extent - 0.02, (extent**2 * rng.integers(3, 8), 2)))
    for _ in range(extent**2 * rng.integers(1, 4)):
        centre, spread = rng.uniform(0.1, extent - 0.1, 2), rng.uniform(0.05, 0.09)
        places += list(centre + spread * rng.standard_normal((rng.integers(6, 14), 2)))
    trees = []
    for at in places:
        radius, evergreen, shade = rng.uniform(0.026, 0.045), rng.random() < 0.3, rng.uniform(-9, 9)
        dry = _to_water(at, water, width) > 0.3 * radius
        if (
            dry
            and all(_to_line(at, r) > 0.02 + radius for r in roads)
            and all(np.hypot(*(h.at - at)) > 0.06 + radius for h in houses)
        ):
            trees.append(Tree(at, radius, (NEEDLES if evergreen else LEAVES) + shade, evergreen))
    if not trees:  # on the driest corner
        corners = extent * np.array([(0.08, 0.08), (0.92, 0.08), (0.08, 0.92), (0.92, 0.92)])
        at = max(corners, key=lambda c: _to_water(c, water, width))
        trees.append(Tree(at, 0.04, LEAVES.astype(float), False))
    return sorted(trees, key=lambda tree: tree.at[1])


# ---- its states ----------------------------------------------------------------------------------


def new_houses(scene: Scene, outcome: int) -> list[tuple[float, House]]:
    """(start of its construction, house) in one outcome of `urban`."""
    rng = np.random.default_rng([scene.seed, 2, outcome])
    side = scene.extent
    wanted, houses = side**2 * rng.integers(6, 13), list(scene.houses)
    angle = rng.uniform(-0.5, 0.5)
    for _ in range(400 * side**2):
        if len(houses) == len(scene.houses) + wanted:
            break
        at = rng.uniform(0.06, side - 0.06, 2)
        if _free(at, houses, scene.trees, scene.roads, scene.water, scene.width, side):
            houses.append(_house(rng, at, angle))
    new = houses[len(scene.houses) :]
    return list(zip(_starts(len(new)), new))


def felled(scene: Scene, outcome: int) -> dict[int, float]:
    """{index of a tree: start of its felling} in one outcome of `clearing`."""
    rng = np.random.default_rng([scene.seed, 3, outcome])
    front = rng.standard_normal(2)
    order = sorted(range(len(scene.trees)), key=lambda i: scene.trees[i].at @ front)
    count = max(1, round(rng.uniform(0.4, 0.8) * len(order)))
    return dict(zip(order[:count], _starts(count)))


def craters(scene: Scene, outcome: int) -> list[tuple[float, np.ndarray, float]]:
    """(time of appearance, centre, radius) in one outcome of `craters`, on dry open land."""
    rng = np.random.default_rng([scene.seed, 6, outcome])
    side = scene.extent
    wanted, found = side**2 * rng.integers(5, 11), []
    for _ in range(400 * side**2):
        if len(found) == wanted:
            break
        at, radius = rng.uniform(0.06, side - 0.06, 2), rng.uniform(0.045, 0.075)
        clear = radius + 0.02
        if (
            _to_water(at, scene.water, scene.width) > clear
            and all(np.hypot(*(h.at - at)) > clear + 0.07 for h in scene.houses)
            and all(np.hypot(*(t.at - at)) > clear + t.radius for t in scene.trees)
            and all(np.hypot(*(other - at)) > clear + r for other, r in found)
        ):
            found.append((at, radius))
    return [(start, *one) for start, one in zip(_starts(len(found)), found)]


DURATION = 0.2  # of the building of a house or the felling of a tree, in units of time


def _starts(count: int) -> np.ndarray:
    return np.linspace(0, 1 - DURATION, count) if count > 1 else np.zeros(count)


def so_far(time: float, start: float) -> float:
    """Progress, 0..1, at `time` of what began at `start`."""
    return float(np.clip((time - start) / DURATION, 0, 1))


def caption(scene: Scene, state: dict[str, float] | None = None) -> str:
    """For example "an aerial view of fields with a river and woods, in autumn"."""
    water = "a river" if len(scene.water) > 1 else "a lake"
    woods = "woods" if len(scene.trees) > 15 else "trees"
    seen = [CHANGES[name] for name, time in sorted((state or {}).items()) if time > 0.5]
    return ", ".join([f"an aerial view of fields with {water} and {woods}", *seen])


def surroundings(seed: int, change: str) -> dict[str, float]:
    """The state of a pair's scene apart from the change: three of ten are in autumn."""
    rng = np.random.default_rng([seed, 4])
    return {"autumn": 1.0} if rng.random() < 0.3 and change not in ("autumn", "snow") else {}
