"""Contact sheets: images in a grid."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

LARGEST = 384  # longest side of an image in a contact sheet, in pixels


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

    A cell is as large as the largest image, but at most `largest` pixels.
    """
    cell = min(max(max(image.size) for row in rows for image in row), largest)
    line, gap = 16, 6
    width, height = len(columns) * (cell + gap) + gap, len(rows) * (cell + line + gap) + line
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for j, column in enumerate(columns):
        pen.text((gap + j * (cell + gap), 3), column, fill="black")
    for i, (row, name) in enumerate(zip(rows, names)):
        y = line + i * (cell + line + gap)
        for j, image in enumerate(row):
            sheet.paste(ImageOps.contain(image, (cell, cell)), (gap + j * (cell + gap), y))
        label = ascii(name)[1:-1]  # the built-in font has little beyond ASCII
        pen.text((gap, y + cell + 1), label if len(label) <= 72 else label[:69] + "...", "#444444")
    return sheet
