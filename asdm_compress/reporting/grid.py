"""Labelled grids of images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont

_MARGIN: Final = 6
_FONT_SIZE: Final = 12
_LINE: Final = 15


def labelled_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """One row of images per model with its label on the left, one column per caption with the caption on top."""
    width, height = rows[0][1][0].size
    font = ImageFont.load_default(_FONT_SIZE)
    characters = max(8, int(width / 6.3))
    wrapped = [textwrap.wrap(caption, characters) for caption in captions]
    head = _LINE * max((len(lines) for lines in wrapped), default=0) + _MARGIN
    labels = [label.splitlines() for label, _ in rows]
    side = int(max(font.getlength(line) for lines in labels for line in lines)) + 2 * _MARGIN
    canvas = Image.new(
        "RGB",
        (side + len(captions) * (width + _MARGIN), head + len(rows) * (height + _MARGIN)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(wrapped):
        for i, line in enumerate(lines):
            draw.text((side + column * (width + _MARGIN), 2 + i * _LINE), line, fill="black", font=font)
    for row, ((_, images), lines) in enumerate(zip(rows, labels, strict=True)):
        top = head + row * (height + _MARGIN)
        for i, line in enumerate(lines):
            draw.text((_MARGIN, top + _MARGIN + i * _LINE), line, fill="black", font=font)
        for column, image in enumerate(images):
            canvas.paste(image.convert("RGB"), (side + column * (width + _MARGIN), top))
    return canvas
