"""The report as one HTML file with everything in it, that opens without a network and asks none for anything."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.images import BROKEN_IMAGE
from asdm_compress.core.provenance import package_version
from asdm_compress.reporting.report import Report

KEPT_AS_IT_IS: Final = 256  # pixels of the longer side: larger images go in as WebP of this quality
WEBP_QUALITY: Final = 92


def render_html(report: Report) -> str:
    """The whole file as text.

    Its content security policy allows this very script and style sheet, images inside the file, and nothing else.
    """
    environment = Environment(
        loader=PackageLoader("asdm_compress.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = data_url
    environment.filters["soft"] = soft
    environment.filters["svg"] = Markup  # drawings are made by `reporting.svg`, which escapes what it is given
    style, script = (_source(environment, name) for name in ("report.css", "report.js"))
    policy = (
        "default-src 'none'; img-src data:; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    large = any(_side(pair.student) > KEPT_AS_IT_IS for pair in report.pairs)
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup(style),
        script=Markup(script),
        policy=policy,
        version=package_version("asdm-compress"),
        compressed=f"WebP, quality {WEBP_QUALITY}" if large else None,
    )


def soft(text: str) -> Markup:
    """Text in which long paths may break into lines behind their dots and underscores."""
    return Markup(re.sub(r"([._/])(?=\w)", r"\1<wbr>", str(escape(text)))) if "_" in text else escape(text)


def data_url(path: Path) -> str:
    """An image as a data URL: small ones with their own bytes, larger ones as WebP.

    Raises AsdmError for a broken one.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "PNG" and max(image.size) <= KEPT_AS_IT_IS:
                image.verify()
                return _data("image/png", content)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=WEBP_QUALITY)
    except BROKEN_IMAGE as error:
        raise AsdmError(f"the image {path} cannot be read: {error}", "Remove it, or make it again.") from error
    return _data("image/webp", buffer.getvalue())


def _side(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return int(max(image.size))
    except BROKEN_IMAGE as error:
        raise AsdmError(f"the image {path} cannot be read: {error}", "Remove it, or make it again.") from error


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
