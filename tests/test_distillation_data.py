"""Training data: folders of captioned images good and bad, captions alone, and the cache of what is made from them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import asdm_compress.distillation.cache as cache_module
from asdm_compress.core.distillation import Data, Distillation
from asdm_compress.core.errors import AsdmError
from asdm_compress.distillation.cache import Share, cached
from asdm_compress.distillation.data import open_source
from asdm_compress.distillation.encoding import Encoder
from asdm_compress.distillation.image_folder import ImageFolder, to_pixels
from asdm_compress.distillation.sources import BadItem, CaptionSource, SceneSource
from asdm_compress.distillation.tables import _as_pixels
from asdm_compress.sampling.settings import SamplingSettings, encode
from asdm_compress.workflows.training_run import DistillSettings, check_places, check_training


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Five images: good ones, a broken one, one without a caption, one that the table names and nobody has."""
    place = tmp_path / "images"
    (place / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 60)), ("deep/b.jpg", (64, 64)), ("silent.png", (50, 50))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(place / name)
    (place / "broken.png").write_bytes((place / "a.png").read_bytes()[:200])
    rows = [
        {"file_name": "a.png", "text": "a red circle"},
        {"file_name": "broken.png", "text": "a blue ring"},
        {"file_name": "gone.png", "text": "a green square"},
        {"file_name": "deep/b.jpg", "text": "a white cross"},
        {"file_name": "silent.png", "text": " "},
    ]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return place


def read_all(source, size=16):
    return list(source.read(0, len(source), size))


def test_a_folder_gives_its_images_and_says_what_is_wrong(folder):
    items = read_all(ImageFolder.open(folder))
    assert [(i.name, i.caption) for i in items if not isinstance(i, BadItem)] == [
        ("a.png", "a red circle"), ("deep/b.jpg", "a white cross"),
    ]  # fmt: skip
    bad = {i.name: i.reason for i in items if isinstance(i, BadItem)}
    assert set(bad) == {"broken.png", "gone.png", "silent.png"}
    assert "no image that can be read" in bad["broken.png"]
    assert "no such file" in bad["gone.png"]
    assert "no caption" in bad["silent.png"]
    assert items[0].image.shape == (3, 16, 16)
    assert -1 <= items[0].image.min() < items[0].image.max() <= 1


def test_csv_and_text_files_say_the_same_as_jsonl(folder):
    wanted = [(i.name, i.caption) for i in read_all(ImageFolder.open(folder)) if not isinstance(i, BadItem)]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\na.png,a red circle\ndeep/b.jpg,a white cross\n")
    assert [(i.name, i.caption) for i in read_all(ImageFolder.open(folder))] == wanted
    (folder / "metadata.csv").unlink()
    (folder / "a.txt").write_text("a red circle\n")
    (folder / "deep" / "b.txt").write_text("a white cross")
    found = read_all(ImageFolder.open(folder))
    assert [(i.name, i.caption) for i in found if not isinstance(i, BadItem)] == wanted
    assert {i.name for i in found if isinstance(i, BadItem)} == {"broken.png", "silent.png"}
    (folder / "a.txt").write_bytes(b"caf\xe9")
    bad = {i.name: i.reason for i in read_all(ImageFolder.open(folder)) if isinstance(i, BadItem)}
    assert bad["a.png"] == "its caption is no UTF-8 text"
    assert bad["silent.png"] == "it has no caption"


def test_captions_may_hold_commas_ends_of_lines_and_what_looks_like_them(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red\u2028circle\x85here"}\n', "utf-8")
    assert ImageFolder.open(folder).entries == (("a.png", "a red circle here"),)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\na.png,"a red circle\r\non white, alone"\n')
    assert ImageFolder.open(folder).entries == (("a.png", "a red circle on white, alone"),)
    (folder / "metadata.csv").write_text("file_name,text\na.png,a red, round circle\n")
    with pytest.raises(AsdmError, match=r"metadata\.csv:2: more values than columns"):
        ImageFolder.open(folder)
    captions = folder / "captions.txt"
    captions.write_text("\ufeffa red circle\r\na blue\u2028ring\n", "utf-8")
    assert [one.split() for one in CaptionSource.from_file(captions).captions] == [
        ["a", "red", "circle"], ["a", "blue", "ring"],
    ]  # fmt: skip


def test_an_image_that_would_fill_the_memory_is_no_crash(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    found = {item.name: item for item in read_all(ImageFolder.open(folder))}
    assert "exceeds limit" in found["a.png"].reason
    assert "exceeds limit" in _as_pixels((folder / "a.png").read_bytes(), 8, folder)


def test_an_image_is_cropped_in_the_middle_and_stands_upright():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert to_pixels(Image.fromarray(wide), 10).mean() == pytest.approx(1, abs=0.1)
    lying = np.zeros((8, 8, 3), np.uint8)
    lying[:, :4] = 255
    image = Image.fromarray(lying)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.info["exif"] = exif.tobytes()
    upright = to_pixels(image, 8)
    assert upright[:, :4].mean() > 0.9 or upright[:, 4:].mean() > 0.9


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}', "no column text; it has caption, file_name"),
        ("metadata.jsonl", '{"text": "x"}', "no column file_name"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file', r"metadata\.jsonl:2: no valid JSON"),
        ("metadata.csv", "file,text\na.png,x\n", "no column file_name; it has file, text"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(folder, name, text, message):
    (folder / "metadata.jsonl").unlink()
    (folder / name).write_text(text)
    with pytest.raises(AsdmError, match=message):
        ImageFolder.open(folder)


def test_another_column_can_hold_the_captions(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "x"}')
    assert ImageFolder.open(folder, "caption").entries == (("a.png", "x"),)


def test_folders_and_files_without_captions_are_refused(tmp_path, folder):
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(AsdmError, match="none of the 4 images"):
        ImageFolder.open(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AsdmError, match="holds no images"):
        open_source(Data(source=str(tmp_path / "empty")), True)
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(AsdmError, match="has no captions"):
        open_source(Data(source=str(tmp_path / "none.txt")), True)
    with pytest.raises(AsdmError, match="no training data at"):
        open_source(Data(source=str(tmp_path / "nowhere")), True)
    with pytest.raises(AsdmError, match="bundled world's words"):
        open_source(Data(), False)


def test_the_cache_holds_what_the_pipeline_makes(pipeline, folder):
    encoder = Encoder(pipeline)
    source = ImageFolder.open(folder)
    with pytest.raises(AsdmError, match=r"broken\.png: it is no image"):
        cached(source, encoder, "refuse")
    found = cached(source, encoder, "skip")
    assert len(found) == 2
    assert [name for name, _ in found.skipped] == ["broken.png", "gone.png", "silent.png"]
    with torch.no_grad():
        image = next(iter(read_all(source, 128))).image[None]
        latents = pipeline.vae.encode(image).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(found.latents(torch.tensor([0])), latents, rtol=2e-3, atol=2e-3)
    texts = encode(pipeline, ["a white cross", ""], 1.0)[:, 0]
    torch.testing.assert_close(found.texts(torch.tensor([1]))[0], texts[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.empty, texts[1], rtol=2e-3, atol=2e-3)
    # What was skipped before is refused when that is asked for now, without encoding again.
    with pytest.raises(AsdmError, match=r"gone\.png"):
        cached(source, encoder, "refuse")


def test_shards_are_made_once_by_whichever_process_and_again_after_a_kill(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_ITEMS", 4)
    encoder, source = Encoder(pipeline), SceneSource(10)
    waits = []

    def other_process():  # while the first waits, the second does its share
        waits.append(1)
        if len(waits) == 2:  # before, all have looked what is there
            cache_module._write_shards(place(), source, encoder, "refuse", Share(1, 2), None)

    def place():
        return next((tmp_path / "cache" / "latents").iterdir())

    whole = cached(source, encoder, "refuse", Share(0, 2), other_process)
    assert len(waits) == 3
    assert len(whole) == 10
    shards = sorted(place().glob("items-*.safetensors"))
    assert [len(load_file(s)["latents"]) for s in shards] == [4, 4, 2]
    items = torch.tensor([9, 0, 5, 4])
    before = whole.latents(items)
    # A kill leaves no index, and perhaps no last shard; another program half of one.
    (place() / "index.json").unlink()
    times = [s.stat().st_mtime_ns for s in shards]
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    again = cached(source, encoder, "refuse")
    assert torch.equal(again.latents(items), before)
    assert [s.stat().st_mtime_ns == t for s, t in zip(shards, times, strict=True)] == [True, False, True]
    # Nor does what some program has cleared away, with the index still there.
    shards[0].unlink()
    assert torch.equal(cached(source, encoder, "refuse").latents(items), before)
    # Another pipeline's, another size's and another source's latents lie elsewhere.
    cached(SceneSource(10, seed=1), encoder, "refuse")
    cached(source, Encoder(pipeline, SamplingSettings(image_size=64)), "refuse")
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 3


def test_of_captions_alone_the_teacher_makes_the_latents(pipeline, tmp_path):
    (tmp_path / "captions.txt").write_text("a small red circle\n\na large blue ring on a white background\n")
    source = open_source(Data(source=str(tmp_path / "captions.txt")), True)
    assert isinstance(source, CaptionSource)
    settings = SamplingSettings(steps=2, guidance=3.0)
    found = cached(source, Encoder(pipeline, settings, makes_images=True), "refuse")
    from asdm_compress.sampling.images import sample

    wanted = sample(pipeline, source.captions, settings).latents
    torch.testing.assert_close(found.latents(torch.tensor([0, 1])), wanted, rtol=5e-3, atol=5e-3)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(pipeline, tmp_path):
    with pytest.raises(AsdmError, match="not enough disk"):
        cached(SceneSource(10**12), Encoder(pipeline), "refuse")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_scenes_are_the_same_in_any_order_and_none_is_held_out():
    source = SceneSource(600)
    late = list(source.read(500, 502, 32))
    again = [i for n, i in enumerate(source.read(0, 600, 32)) if n in (500, 501)]
    assert [i.caption for i in late] == [i.caption for i in again]
    assert torch.equal(late[1].image, again[1].image)
    world = {word for item in source.read(0, 300, 16) for word in item.caption.split()}
    assert {"circle", "ring", "above"} < world


def test_what_a_training_reads_is_not_replaced_by_its_student(folder, tmp_path):
    settings = DistillSettings(teacher=str(tmp_path / "models"), overwrite=True)
    (tmp_path / "models").mkdir()
    for student, out in (("student", "models"), (str(tmp_path / "models"), "models"), ("student", "")):
        with pytest.raises(AsdmError, match="holds the model itself"):
            check_places(tmp_path / out, tmp_path / "run", student, settings)
    training = Distillation(data=Data(source=str(folder)))
    with pytest.raises(AsdmError, match="images, which is read"):
        check_training(folder, training, settings, 1)
    check_training(tmp_path / "models", training, settings, 1)
    probed = Distillation(probe_captions=str(tmp_path / "models.run" / "probe.txt"))
    (tmp_path / "models.run").mkdir()
    (tmp_path / "models.run" / "probe.txt").write_text("a ring\na cross\n")
    with pytest.raises(AsdmError, match=r"probe\.txt, which is read"):
        check_training(tmp_path / "models", probed, settings, 1)
    check_training(tmp_path / "models", probed, replace(settings, resume=True), 1)
    check_training(folder, training, replace(settings, dry_run=True), 1)
    pattern = Distillation(data=Data(source=str(folder / "*.parquet")))
    with pytest.raises(AsdmError, match="images, which is read"):
        check_training(folder, pattern, settings, 1)


def test_large_images_are_encoded_fewer_at_a_time(pipeline):
    sizes = {size: Encoder(pipeline, SamplingSettings(image_size=size)).at_once for size in (128, 512, 768, 4096)}
    assert sizes == {128: 16, 512: 16, 768: 7, 4096: 1}
