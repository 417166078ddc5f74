"""From what a user writes after `--data` to a source of items."""

from __future__ import annotations

from pathlib import Path

from asdm_compress.core.distillation import SCENES, Data
from asdm_compress.core.errors import AsdmError
from asdm_compress.distillation.image_folder import ImageFolder
from asdm_compress.distillation.sources import DEFAULT_SCENES, CaptionSource, SceneSource, Source
from asdm_compress.distillation.tables import is_table, open_table

_FORMS = (
    "a folder of captioned images, a .txt file of captions, a dataset on disk, parquet files, webdataset shards, "
    "hf:NAME, or `scenes` for the bundled model"
)


def open_source(data: Data, understands_scenes: bool) -> Source:
    """The source that `data` names; raises AsdmError where it is none, or not one that this model understands."""
    if data.source == SCENES:
        if not understands_scenes:
            raise AsdmError(
                "this model does not know the bundled world's words, so its scenes are no data for it",
                f"Give --data: {_FORMS}.",
            )
        return SceneSource(data.size or DEFAULT_SCENES)
    if is_table(data.source):
        return open_table(data)
    path = Path(data.source).expanduser()
    if data.image_column != Data.model_fields["image_column"].default and (path.is_dir() or path.is_file()):
        raise AsdmError(f"{data.source} is no table, and has no columns of images", "Leave --image-column out.")
    if data.caption_column != Data.model_fields["caption_column"].default and path.is_file():
        raise AsdmError(f"{data.source} is no table, and has no columns of captions", "Leave --caption-column out.")
    if path.is_dir():
        return ImageFolder.open(path, data.caption_column, data.size)
    if path.is_file() and path.suffix == ".txt":
        return CaptionSource.from_file(path, data.size)
    raise AsdmError(f"there are no training data at {data.source}", f"Give {_FORMS}.")
