"""Tables as training data: real files as Hugging Face `datasets`, parquet writers and webdataset leave them."""

from __future__ import annotations

import io
import os
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from asdm_compress.core.distillation import Data
from asdm_compress.core.errors import AsdmError
from asdm_compress.distillation.data import open_source
from asdm_compress.distillation.sources import BadItem

CAPTIONS = ["a red circle", "a blue ring", "", "a white cross"]


@pytest.fixture(scope="module")
def pictures():
    """Three images, of which one is broken, as the bytes of their files."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    found[1] = found[1][:100]
    return found


@pytest.fixture(scope="module")
def table(pictures):
    rows = {"image": [{"bytes": p, "path": None} for p in pictures], "text": CAPTIONS}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))


def check(source):
    items = list(source.read(0, len(source), 16))
    assert [i.caption for i in items if not isinstance(i, BadItem)] == [CAPTIONS[0], CAPTIONS[3]]
    assert [(i.name, i.reason.split(":")[0]) for i in items if isinstance(i, BadItem)] == [
        ("row 1", "it is no image that can be read"), ("row 2", "it has no caption"),
    ]  # fmt: skip
    assert all(i.image.shape == (3, 16, 16) for i in items if not isinstance(i, BadItem))
    late = list(source.read(3, len(source), 16))
    assert [i.caption for i in late] == [CAPTIONS[3]]


def test_of_several_captions_the_first_is_taken(pictures, tmp_path):
    """As COCO's images have them."""
    rows = {"image": [{"bytes": p, "path": None} for p in pictures[:2]], "text": [["one", "another"], []]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(str(tmp_path / "part.parquet"))
    found = list(open_source(Data(source=str(tmp_path / "part.parquet")), False).read(0, 2, 16))
    assert found[0].caption == "one"
    assert found[1].reason == "it has no caption"


def test_a_saved_dataset_and_parquet_give_the_same(table, tmp_path):
    table.save_to_disk(str(tmp_path / "saved"))
    check(open_source(Data(source=str(tmp_path / "saved")), False))
    table.to_parquet(str(tmp_path / "part.parquet"))
    source = open_source(Data(source=str(tmp_path / "part.parquet")), False)
    check(source)
    assert source.identity()["files"][0][0] == "part.parquet"
    assert len(open_source(Data(source=str(tmp_path / "part.parquet"), size=2), False)) == 2


def test_images_named_by_their_paths_lie_beside_the_table_and_are_watched(pictures, tmp_path):
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(pictures):
        (tmp_path / f"images/{number}.png").write_bytes(picture)
    named = datasets.Dataset.from_dict({"image": [f"images/{n}.png" for n in range(4)], "text": CAPTIONS})
    named.to_parquet(str(tmp_path / "part.parquet"))
    source = open_source(Data(source=str(tmp_path / "part.parquet")), False)
    check(source)
    before = source.identity()
    assert open_source(Data(source=str(tmp_path)), False).identity()["files"] == before["files"]
    (tmp_path / "images/3.png").write_bytes(pictures[0])
    os.utime(tmp_path / "images/3.png", ns=(1, 1))
    assert open_source(Data(source=str(tmp_path / "part.parquet")), False).identity() != before


def test_webdataset_shards_are_streamed(pictures, tmp_path):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for number, (picture, caption) in enumerate(zip(pictures, CAPTIONS, strict=True)):
            for suffix, content in (("png", picture), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(AsdmError, match="no known length"):
        open_source(Data(source=str(tmp_path / "shard-0.tar")), False)
    check(open_source(Data(source=str(tmp_path / "shard-0.tar"), size=4), False))


def shard(path, pictures):
    with tarfile.open(path, "w") as tar:
        for number, picture in enumerate(pictures):
            for suffix, content in (("png", picture), ("txt", f"a caption {number}".encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_a_stream_is_read_once_however_many_ranges_are_taken_of_it(pictures, tmp_path):
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", [pictures[0]] * 6)
    source = open_source(Data(source=str(tmp_path), size=12), False)
    starts = []
    rows = source.rows

    class Counted:
        def __iter__(self):
            starts.append(1)
            return iter(rows)

    source._stream._rows = Counted()
    read = [item.caption for first in (0, 4, 8) for item in source.read(first, first + 4, 8)]
    assert read == [f"a caption {n}" for n in range(6)] * 2
    assert len(starts) == 1
    assert [item.caption for item in source.read(5, 7, 8)] == ["a caption 5", "a caption 0"]  # back to before its place
    assert len(starts) == 2


def test_a_shard_that_is_cut_short_is_named_with_the_row(pictures, tmp_path):
    shard(tmp_path / "part.tar", [pictures[0]] * 12)
    whole = (tmp_path / "part.tar").read_bytes()
    with tarfile.open(tmp_path / "part.tar") as tar:
        cut = tar.getmembers()[20].offset_data + 1000  # inside the eleventh picture
    (tmp_path / "part.tar").write_bytes(whole[:cut])
    source = open_source(Data(source=str(tmp_path / "part.tar"), size=12), False)
    with pytest.raises(AsdmError, match="cannot be read on from row 10") as caught:
        list(source.read(0, 12, 8))
    assert "--data-size" in str(caught.value.hint)
    (tmp_path / "part.tar").write_bytes(whole[:1000])  # inside the first
    with pytest.raises(AsdmError, match="cannot be opened as a dataset"):
        open_source(Data(source=str(tmp_path / "part.tar"), size=12), False)


def test_a_dataset_is_streamed_by_name(table, tmp_path):
    """What the hub holds under a name and what lies in a folder, `datasets` opens alike."""
    table.to_parquet(str(tmp_path / "named" / "train.parquet"))
    check(open_source(Data(source=f"hf:{tmp_path / 'named'}", size=4), False))


def test_wrong_columns_are_named(table, tmp_path):
    table.rename_column("text", "words").to_parquet(str(tmp_path / "part.parquet"))
    with pytest.raises(AsdmError, match="no column text; it has image, words"):
        open_source(Data(source=str(tmp_path / "part.parquet")), False)
    check(open_source(Data(source=str(tmp_path / "part.parquet"), caption_column="words"), False))


def test_what_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(AsdmError, match="cannot be opened as a dataset"):
        open_source(Data(source=str(tmp_path / "broken.parquet")), False)
