"""Contact sheets: images in a grid."""

import contextlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

LARGEST = 384  # longest side of an image in a contact sheet, in pixels
# of the systems at hand, for names that Pillow's own font cannot show
FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "msyh.ttc", "simhei.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "DejaVuSans.ttf",
    "Arial Unicode.ttf", "arial.ttf",
)  # fmt: skip


def thumbnail(image: Image.Image) -> Image.Image:
    """Downscaled to what a contact sheet shows, for one made later; small images unchanged."""
    return image if max(image.size) <= LARGEST else ImageOps.contain(image, (LARGEST, LARGEST))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str],
    names: Sequence[str],
    largest: int = LARGEST,
) -> Image.Image:
    """A grid with column titles above and each row's name below it; images keep their aspect.

    All are enlarged or shrunk to the longest side of any, but at most `largest` pixels; a column is
    as wide as the widest.
    """
    side = min(max(max(image.size) for row in rows for image in row), largest)
    line, gap = 16, 6
    small = [[ImageOps.contain(image, (side, side)) for image in row] for row in rows]
    heights = [max(image.height for image in row) for row in small]
    cell = max(min(side, 96), *(image.width for row in small for image in row))  # 96: its title
    width, height = (
        len(columns) * (cell + gap) + gap,
        sum(heights) + len(rows) * (line + gap) + line,
    )
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), line
    for j, column in enumerate(columns):
        pen.text((gap + j * (cell + gap), 3), column, fill="black")
    for row, tall, name in zip(small, heights, names):
        for j, image in enumerate(row):
            sheet.paste(image, (gap + j * (cell + gap), y))
        label, font = lettering(name)
        label = label if len(label) <= 72 else label[:69] + "..."
        pen.text((gap, y + tall + 1), label, "#444444", font=font)
        y += tall + line + gap
    return sheet


def lettering(name: str) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """What to draw of a name, and with which font: escapes where no font here has its letters."""
    usual = ImageFont.load_default()
    if name.isascii() and name.isprintable():
        return name, usual
    for file in FONTS if name.isprintable() else ():
        with contextlib.suppress(OSError, ImportError):
            font = ImageFont.truetype(file, 11)
            missing = bytes(font.getmask("\U0010fffe"))
            if all(bytes(font.getmask(letter)) != missing for letter in {*name} - {" "}):
                return name, font
    return ascii(name)[1:-1], usual
