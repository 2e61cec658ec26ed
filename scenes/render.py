"""Small aerial scenes with changes whose truth is known: pairs to learn from and to judge by.

    python -m scenes.render --change solar --pairs 64 --seed 0 --out data/solar
    python -m scenes.render --change flood --pairs 8 --times 0,0.25,0.5,0.75,1 --out data/flood

A scene is a vector drawing in the unit square, fixed by its seed: fields in a rotated frame, a
road, a river or a lake, woods, houses with roofs and shadows. A change has a time in [0, 1]; it
adds, moves or recolours objects and touches nothing else, so every pixel outside its mask is equal
in all states. `urban`, `clearing` and `craters` are random given the scene (each outcome seed is
one truth); the others follow from what the before image shows.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cli import Parser, report
from durable import refuse_file

CHANGES = {  # name: what a caption says
    "urban": "with new houses",
    "flood": "flooded",
    "autumn": "in autumn",
    "clearing": "with felled trees",
    "snow": "in snow",
    "solar": "with solar farms",
    "craters": "with craters",
}
RANDOM_CHANGES = ("urban", "clearing", "craters")

SUN = np.array([0.018, 0.022])  # where shadows fall, per unit of height
BARE = np.array([191, 161, 118])
GREENS = {
    "crop": np.array([[98, 136, 62], [152, 164, 78], [78, 116, 58]]),
    "meadow": np.array([[124, 160, 86], [112, 150, 92]]),
}
WATER, MUD, ROAD = np.array([62, 96, 132]), np.array([121, 116, 98]), np.array([142, 140, 136])
ROOFS = np.array([[166, 78, 62], [122, 88, 74], [186, 122, 92], [112, 116, 126]])
PANEL, GRAVEL = np.array([36, 50, 92]), np.array([74, 80, 104])
PITCH = 0.1  # of the rows of panels
STUMP = np.array([146, 118, 84])
RIM, PIT = np.array([206, 188, 156]), np.array([74, 60, 50])
LEAVES, NEEDLES = np.array([66, 106, 52]), np.array([38, 74, 58])
SNOW = np.array([238, 242, 247])


@dataclass(frozen=True)
class Field:
    corners: np.ndarray  # (4, 2): its rectangle in the rotated frame, in x, y
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
    light: np.ndarray  # (4, 4): brightness of the corners of a coarse grid


# ---- the scene -----------------------------------------------------------------------------------


def make_scene(seed: int) -> Scene:
    """The scene of a seed. Each has a bare field, water, trees and a road: every change applies."""
    rng = np.random.default_rng([seed, 0])
    angle = rng.uniform(-0.5, 0.5)
    rotate = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    to_xy = lambda uv: (np.asarray(uv) - 0.5) @ rotate + 0.5  # noqa: E731

    rectangles, cuts = _split(rng, (-0.35, -0.35, 1.35, 1.35))
    fields = _fields(rng, [to_xy([(a, b), (c, b), (c, d), (a, d)]) for a, b, c, d in rectangles])
    roads = [to_xy(cuts[i]) for i in range(1 + int(rng.random() < 0.4))]

    if rng.random() < 0.6:  # a river from side to side
        start, end = rng.uniform(0.15, 0.85, 2)
        x = np.linspace(-0.1, 1.1, 25)
        waves, phase = rng.uniform(0.7, 1.4), rng.random()
        bend = rng.uniform(0.03, 0.09) * np.sin(2 * np.pi * (waves * x + phase))
        water = np.stack([x, start + (end - start) * x + bend], axis=1)
        water = water[:, ::-1] if rng.random() < 0.5 else water
        width = rng.uniform(0.03, 0.055)
    else:
        water, width = rng.uniform(0.2, 0.8, (1, 2)), rng.uniform(0.09, 0.15)

    houses = _houses(rng, roads, water, width)
    trees = _trees(rng, roads, water, width, houses)
    light = np.random.default_rng([seed, 1]).uniform(0.94, 1.06, (4, 4))
    return Scene(seed, fields, water, width, roads, trees, houses, light)


def _split(rng, box) -> tuple[list, list]:
    """Halve rectangles until they are fields; the cuts come back longest first, as (2, 2) lines."""
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


def _fields(rng, quads) -> list[Field]:
    """A fifth to a half of what is visible is bare: the place where solar farms come."""
    grid = np.stack(np.meshgrid(*[(np.arange(24) + 0.5) / 24] * 2), axis=-1).reshape(-1, 2)
    share = np.array([_inside(grid, quad).mean() for quad in quads])
    bare, order = set(), rng.permutation(len(quads))
    for i in order:
        if share[list(bare)].sum() < 0.2 and share[i] > 0.04 and share[i] < 0.5:
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
    """Distance of a point from the water's edge; the course is dense enough for its points."""
    return float(np.hypot(*(water - at).T).min()) - width


def _to_line(at: np.ndarray, line: np.ndarray) -> float:
    a, along = line[0], line[1] - line[0]
    s = np.clip((at - a) @ along / (along @ along), 0, 1)
    return float(np.hypot(*(at - a - s * along)))


def _houses(rng, roads, water, width) -> list[House]:
    """A few along the roads."""
    houses: list[House] = []
    wanted = rng.integers(2, 6)
    for _ in range(60):
        if len(houses) == wanted:
            break
        road = roads[rng.integers(len(roads))]
        along = (road[1] - road[0]) / np.hypot(*(road[1] - road[0]))
        at = road[0] + rng.random() * (road[1] - road[0])
        at = at + along[::-1] * (-1, 1) * rng.choice([-1, 1]) * rng.uniform(0.075, 0.095)
        if _free(at, houses, [], roads, water, width):
            houses.append(_house(rng, at, math.atan2(along[1], along[0])))
    return houses


def _house(rng, at: np.ndarray, angle: float) -> House:
    size = (rng.uniform(0.085, 0.115), rng.uniform(0.065, 0.085))
    return House(at, size, angle, ROOFS[rng.integers(len(ROOFS))] + rng.uniform(-6, 6))


def _free(at, houses, trees, roads, water, width) -> bool:
    return (
        at.min() > 0.05
        and at.max() < 0.95
        and _to_water(at, water, width) > 0.075
        and all(_to_line(at, road) > 0.07 for road in roads)
        and all(np.hypot(*(h.at - at)) > 0.13 for h in houses)
        and all(np.hypot(*(t.at - at)) > t.radius + 0.045 for t in trees)
    )


def _trees(rng, roads, water, width, houses) -> list[Tree]:
    """One to three woods and some trees that stand alone."""
    places = list(rng.uniform(0.02, 0.98, (rng.integers(3, 8), 2)))
    for _ in range(rng.integers(1, 4)):
        centre, spread = rng.uniform(0.1, 0.9, 2), rng.uniform(0.05, 0.09)
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
        corners = np.array([(0.08, 0.08), (0.92, 0.08), (0.08, 0.92), (0.92, 0.92)])
        at = max(corners, key=lambda c: _to_water(c, water, width))
        trees.append(Tree(at, 0.04, LEAVES.astype(float), False))
    return sorted(trees, key=lambda tree: tree.at[1])


# ---- its states ----------------------------------------------------------------------------------


def new_houses(scene: Scene, outcome: int) -> list[tuple[float, House]]:
    """(when its building starts, house) of one outcome of `urban`."""
    rng = np.random.default_rng([scene.seed, 2, outcome])
    wanted, houses = rng.integers(6, 13), list(scene.houses)
    angle = rng.uniform(-0.5, 0.5)
    for _ in range(400):
        if len(houses) == len(scene.houses) + wanted:
            break
        at = rng.uniform(0.06, 0.94, 2)
        if _free(at, houses, scene.trees, scene.roads, scene.water, scene.width):
            houses.append(_house(rng, at, angle))
    new = houses[len(scene.houses) :]
    return list(zip(_starts(len(new)), new))


def felled(scene: Scene, outcome: int) -> dict[int, float]:
    """Index of a tree -> when its felling starts, in one outcome of `clearing`."""
    rng = np.random.default_rng([scene.seed, 3, outcome])
    front = rng.standard_normal(2)
    order = sorted(range(len(scene.trees)), key=lambda i: scene.trees[i].at @ front)
    count = max(1, round(rng.uniform(0.4, 0.8) * len(order)))
    return dict(zip(order[:count], _starts(count)))


def craters(scene: Scene, outcome: int) -> list[tuple[float, np.ndarray, float]]:
    """(when it appears, centre, radius) of one outcome of `craters`: anywhere on dry open land."""
    rng = np.random.default_rng([scene.seed, 6, outcome])
    wanted, found = rng.integers(5, 11), []
    for _ in range(400):
        if len(found) == wanted:
            break
        at, radius = rng.uniform(0.06, 0.94, 2), rng.uniform(0.045, 0.075)
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


def _done(time: float, start: float) -> float:
    return float(np.clip((time - start) / DURATION, 0, 1))


def render(
    scene: Scene, state: dict[str, float] | None = None, *, outcome: int = 0, size: int = 64
) -> np.ndarray:
    """The scene's picture, (size, size, 3) uint8. `state` is {change: time}; {} is summer, dry."""
    time = dict.fromkeys(CHANGES, 0.0) | (state or {})
    if unknown := sorted(set(time) - set(CHANGES)):
        raise ValueError(f"unknown change {unknown[0]!r}; there are {', '.join(CHANGES)}")
    if not all(0 <= value <= 1 for value in time.values()):
        raise ValueError(f"times are in [0, 1], not {time}")
    paint = _Paint(size)

    def snowy(colour: np.ndarray, cover: float) -> np.ndarray:
        return colour + (SNOW - colour) * cover * time["snow"]

    hedge = np.array([104, 136, 76])  # between fields, where no polygon has the pixel
    paint.polygon([(0, 0), (1, 0), (1, 1), (0, 1)], snowy(hedge, 0.95))
    for f in scene.fields:
        colour = f.colour
        if f.kind != "bare":  # greens turn to straw
            colour = colour + time["autumn"] * np.array([38, -4, -14])
        paint.polygon(f.corners, snowy(colour, 0.95))
        if f.kind == "crop":
            _furrows(paint, f.corners, snowy(colour - 9, 0.95))
        if f.kind == "bare" and time["solar"] > 0:
            _panels(paint, f.corners, time["solar"], snowy(PANEL, 0.9), snowy(GRAVEL, 0.9))

    if time["flood"] > 0:  # the water comes out of its bed by the same distance everywhere
        paint.blob(scene.water, scene.width + 0.13 * time["flood"], MUD)
    paint.blob(scene.water, scene.width, WATER)
    for road in scene.roads:
        paint.blob(road, 0.021, snowy(ROAD, 0.3))

    if time["craters"] > 0:
        for start, at, radius in craters(scene, outcome):
            r = radius * _done(time["craters"], start)
            if r > 0:
                paint.disc(at, r, snowy(RIM, 0.7))
                paint.disc(at + SUN * r / 0.3, 0.68 * r, snowy(PIT, 0.4))

    houses = [(1.0, house) for house in scene.houses]
    if time["urban"] > 0:
        built = [(_done(time["urban"], start), h) for start, h in new_houses(scene, outcome)]
        houses += [(done, house) for done, house in built if done > 0]
    for done, house in sorted(houses, key=lambda item: item[1].at[1]):
        _draw_house(paint, house, done, snowy(house.roof, 0.9))

    starts = felled(scene, outcome) if time["clearing"] > 0 else {}
    gone = {i: _done(time["clearing"], start) for i, start in starts.items()}
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
        if not tree.evergreen:  # darker leaves turn redder: the before image tells
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


def _panels(paint, corners, time, panel, gravel) -> None:
    """Rows of panels on gravel over a whole field, built one after the other from the north.

    All of it follows from what is to be seen: rows run as the fields do, and a row's turn comes
    by its place in the picture, whatever of its field lies outside.
    """
    a, along, across = corners[0], corners[1] - corners[0], corners[3] - corners[0]
    depth = float(np.hypot(*across))
    north_to_south = across / depth
    for k in range(math.ceil(depth / PITCH)):
        top, bottom = k * PITCH / depth, min((k + 1) * PITCH / depth, 1.0)
        place = (a + along / 2 + top * across - 0.5) @ north_to_south + 0.5  # 0..1 in the picture
        done = _done(time, float(np.clip((place + 0.2) / 1.4, 0, 1)) * (1 - DURATION))
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
    paint.polygon([house.at - u, house.at + u, box[2], box[3]], roof - 24)  # the side in the shade


class _Paint:
    """A canvas in unit coordinates, drawn four times too large and averaged down."""

    def __init__(self, size: int):
        self.size, self.scale = size, 4 * size
        self.image = Image.new("RGB", (self.scale, self.scale))
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
    """Where two states differ at all: (H, W) bool."""
    return (before != after).any(axis=-1)


def caption(scene: Scene, state: dict[str, float] | None = None) -> str:
    """What is to be seen: "an aerial view of fields with a river and woods, in autumn"."""
    water = "a river" if len(scene.water) > 1 else "a lake"
    woods = "woods" if len(scene.trees) > 15 else "trees"
    seen = [CHANGES[name] for name, time in sorted((state or {}).items()) if time > 0.5]
    return ", ".join([f"an aerial view of fields with {water} and {woods}", *seen])


def surroundings(seed: int, change: str) -> dict[str, float]:
    """The state a pair's scene is in apart from the change: three of ten are in autumn."""
    rng = np.random.default_rng([seed, 4])
    return {"autumn": 1.0} if rng.random() < 0.3 and change not in ("autumn", "snow") else {}


# ---- folders of pairs ----------------------------------------------------------------------------


def write_pairs(
    out: Path,
    change: str,
    pairs: int,
    *,
    seed: int = 0,
    size: int = 64,
    times: tuple[float, ...] = (),
    outcomes: int = 1,
    captions: bool = False,
) -> None:
    """before/ after/ mask/ of `pairs` scenes; with `captions`, NAME.txt beside each after image.

    `times` adds a folder per time (its true states in between), `outcomes` > 1 adds the folders
    outcome-1, outcome-2, ... with other truths of the same scenes.
    """
    if change not in CHANGES:
        raise ValueError(f"unknown change {change!r}; there are {', '.join(CHANGES)}")
    for i in range(pairs):
        scene_seed = seed * 1_000_000 + i
        scene, name = make_scene(scene_seed), f"{i:05d}.png"
        around = surroundings(scene_seed, change)

        def picture(time, outcome=0, scene=scene, around=around):
            return render(scene, around | {change: time}, outcome=outcome, size=size)

        before, after = picture(0.0), picture(1.0)
        images = {"before": before, "after": after, "mask": change_mask(before, after)}
        images |= {f"time-{time:.2f}": picture(time) for time in times}
        images |= {f"outcome-{k}": picture(1.0, k) for k in range(1, outcomes)}
        for folder, image in images.items():
            (out / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("L" if folder == "mask" else "RGB").save(
                out / folder / name
            )
        if captions:
            text = caption(scene, around | {change: 1.0})
            (out / "after" / name).with_suffix(".txt").write_text(text + "\n")


def time_list(text: str) -> tuple[float, ...]:
    """ "0,0.5,1" -> (0.0, 0.5, 1.0); each has a folder of its own"""
    try:
        times = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        times = [math.nan]
    if not all(0 <= time <= 1 for time in times):
        raise argparse.ArgumentTypeError(
            f"numbers in 0..1 with commas between them were wanted, such as 0,0.5,1, got {text!r}"
        )
    if len({f"{time:.2f}" for time in times}) < len(times):
        raise argparse.ArgumentTypeError(f"times that differ by 0.01 were wanted, got {text!r}")
    return tuple(times)


def check(args: argparse.Namespace) -> None:
    """ValueError or FileExistsError naming the flag that no pairs could be drawn with."""
    # the scenes of one seed end where those of the next begin, and seed 2000's trained the base
    bounds = {
        "pairs": (1, 1_000_000), "seed": (0, 1999), "size": (1, 2048), "outcomes": (1, 1000),
    }  # fmt: skip
    for name, (least, most) in bounds.items():
        if not least <= (value := getattr(args, name)) <= most:
            raise ValueError(f"--{name} must be in {least}..{most}, got {value}")
    refuse_file(args.out, "--out")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scenes.render", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--change", required=True, choices=CHANGES)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="other seeds are other scenes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument(
        "--times", type=time_list, default=(), metavar="0,0.5,1", help="states in between"
    )
    parser.add_argument("--outcomes", type=int, default=1, help="truths per scene, if random")
    parser.add_argument("--captions", action="store_true", help="NAME.txt beside each after image")
    args = parser.parse_args(argv)
    try:
        check(args)
        write_pairs(
            args.out, args.change, args.pairs,
            seed=args.seed, size=args.size, times=args.times, outcomes=args.outcomes,
            captions=args.captions,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        return report(parser.prog, error)
    print(f"{args.pairs} pairs in {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
