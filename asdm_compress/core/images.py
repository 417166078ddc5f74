"""What Pillow raises for images that it cannot read: its documented errors are not all that broken files lead to."""

from __future__ import annotations

from typing import Final

from PIL import Image

BROKEN_IMAGE: Final = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def what_is_wrong(error: BaseException) -> str:
    """One line about such an error; some have no words."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
