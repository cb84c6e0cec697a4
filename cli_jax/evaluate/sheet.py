"""The contact sheet: pictures with question, answer and prediction on one PNG (Pillow only)."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

from etils import epath
from PIL import Image, ImageDraw, ImageFont

from cli_jax.output import write_file

COLUMNS = 6
WIDTH = 260  # of one example, in pixels
MARGIN = 8
PICTURE = (WIDTH - 2 * MARGIN, 150)  # the most that the picture(s) of one example take
LINE = 15
QUESTION_LINES = 3
TEXT = (QUESTION_LINES + 2) * LINE + MARGIN  # height of question, answer and prediction
INK, GREEN, RED, GRAY = (30, 30, 30), (0, 120, 40), (190, 20, 20), (120, 120, 120)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclasses.dataclass(frozen=True)
class Example:
    """One cell; `images` may be empty (a question without a picture, or an unreadable one)."""

    images: Sequence[Image.Image]
    question: str
    answer: str
    prediction: str
    correct: bool


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices evenly spread over 0..count-1 (all of them if there are fewer).

    The examples shown are chosen by position alone, never by whether they are right.
    """
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def contact_sheet(examples: Sequence[Example], path: epath.Path) -> None:
    """Draws the examples row by row and writes the PNG; ValueError if there are none.

    Cells are WIDTH pixels wide and as high as the highest picture, fitted to that width, needs.
    """
    if not examples:
        raise ValueError("a contact sheet needs at least one example")
    strips = [_strip(example.images) for example in examples]
    height = max(strip.height for strip in strips)
    cell = WIDTH, height + TEXT + 3 * MARGIN
    size = min(COLUMNS, len(examples)) * cell[0], -(-len(examples) // COLUMNS) * cell[1]
    sheet = Image.new("RGB", size, "white")
    for i, (example, strip) in enumerate(zip(examples, strips, strict=True)):
        row, column = divmod(i, COLUMNS)
        corner = column * cell[0], row * cell[1]
        sheet.paste(_cell(example, strip, cell, height), corner)
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    write_file(path, png.getvalue())


def _cell(
    example: Example, strip: Image.Image, size: tuple[int, int], picture_height: int
) -> Image.Image:
    cell = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(cell)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=(225, 225, 225))
    cell.paste(strip, (MARGIN, MARGIN + (picture_height - strip.height) // 2))
    font = ImageFont.load_default(12)
    width = size[0] - 2 * MARGIN
    top = picture_height + 2 * MARGIN
    for i, line in enumerate(_wrap(example.question, font, width, QUESTION_LINES)):
        draw.text((MARGIN, top + i * LINE), line, INK, font)
    top = size[1] - 2 * LINE - MARGIN
    answer = _cut(f"answer: {example.answer}", font, width)
    prediction = _cut(f"model: {example.prediction}", font, width)
    draw.text((MARGIN, top), answer, GRAY, font)
    draw.text((MARGIN, top + LINE), prediction, GREEN if example.correct else RED, font)
    return cell


def _strip(images: Sequence[Image.Image]) -> Image.Image:
    """The pictures of one row side by side, fitted into PICTURE."""
    width = PICTURE[0] // max(len(images), 1)
    fitted = [_fit(image, (width, PICTURE[1])) for image in images]
    strip = Image.new("RGB", (PICTURE[0], max([1, *(f.height for f in fitted)])), "white")
    for i, image in enumerate(fitted):
        strip.paste(image, (i * width, 0))
    return strip


def _fit(image: Image.Image, box: tuple[int, int]) -> Image.Image:
    """Scales into the box and keeps the shape; small pictures are enlarged."""
    scale = min(box[0] / image.width, box[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrap(text: str, font: Font, width: int, most: int) -> list[str]:
    """Breaks at white space into at most `most` lines that fit; what does not fit is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: Font, width: int) -> str:
    """One line of at most `width` pixels; line breaks become spaces."""
    line = " ".join(line.split())[:width]  # no character is narrower than a pixel
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
