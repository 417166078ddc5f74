from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.files import check_apart, check_output, check_space, output_file, output_folder


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with output_folder(out) as aside:
        (aside / "a.txt").write_text("a")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a.txt"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(error), output_folder(out, overwrite=True) as aside:
        (aside / "new.txt").write_text("new")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "old.txt").read_text() == "old"


def test_what_was_there_comes_back_when_the_last_rename_fails(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError), output_folder(out, overwrite=True) as aside:
        shutil.rmtree(aside)
    assert (out / "old.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AsdmError, match="no folder that can be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AsdmError, match="holds the current folder"):
        check_output(tmp_path, overwrite=True)
    (tmp_path / "model").mkdir()
    with pytest.raises(AsdmError, match="holds the model itself"):
        check_output(tmp_path / "model", overwrite=True, source=tmp_path / "model")


def test_a_part_of_the_model_is_not_replaced(tmp_path):
    for name in ("unet", "fast"):
        (tmp_path / "model" / name).mkdir(parents=True)
    (tmp_path / "model/model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    with pytest.raises(AsdmError, match="is a part of the model itself"):
        check_output(tmp_path / "model/unet", overwrite=True, source=tmp_path / "model")
    check_output(tmp_path / "model/fast", overwrite=True, source=tmp_path / "model")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has it")
def test_a_place_that_knows_no_new_folders_is_named():
    with pytest.raises(AsdmError, match="/proc/student cannot be written"), output_folder(Path("/proc/student")):
        pass


def test_an_existing_folder_is_refused_or_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(AsdmError, match="exists already"), output_folder(out):
        pass
    with output_folder(out, overwrite=True) as aside:
        (aside / "new.txt").write_text("new")
    assert [p.name for p in out.iterdir()] == ["new.txt"]


def test_of_a_link_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk/real").mkdir(parents=True)
    (tmp_path / "disk/real/old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk/real")
    with output_folder(tmp_path / "link", overwrite=True) as aside:
        assert aside.parent == tmp_path / "disk"
        (aside / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk/real").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_what_is_made_does_not_replace_a_model_that_it_is_made_from(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(tmp_path / "models" / "mine"), "~/models/mine"):
        for out in ("models/mine", "models"):
            with pytest.raises(AsdmError, match="holds the model itself"):
                check_apart(tmp_path / out, True, ["mini-sd", name])
        check_apart(tmp_path / "other", True, ["mini-sd", name])


def test_what_is_read_is_not_replaced_either(tmp_path):
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast/prompts.txt").touch()
    with pytest.raises(AsdmError, match=r"prompts\.txt, which is read"):
        check_output(tmp_path / "fast", True, None, tmp_path / "fast/prompts.txt")
    check_output(tmp_path / "fast", True, None, None, tmp_path / "uniform:3")


@pytest.mark.skipif(not Path("/proc").is_mount(), reason="only some systems have this mount")
def test_a_mounted_folder_cannot_be_replaced():
    with pytest.raises(AsdmError, match="is mounted and cannot be replaced"):
        check_output(Path("/proc"), True)


def test_too_little_space_is_seen_before_any_work(tmp_path):
    out = tmp_path / "deep" / "out"
    free = shutil.disk_usage(tmp_path).free
    check_space(out, free // 2)
    with pytest.raises(AsdmError, match=r"not enough disk: .*out takes at least .* are free") as caught:
        check_space(out, 4 * free)
    assert caught.value.exit_code == ExitCode.USER


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only some systems have a device that is always full")
def test_a_full_disk_is_one_message(tmp_path):
    with (
        pytest.raises(AsdmError, match="disk is full") as caught,
        output_folder(tmp_path / "out"),
        Path("/dev/full").open("w") as file,
    ):
        file.write("x" * 100_000)
    assert caught.value.exit_code == ExitCode.USER
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="stop"), output_file(path) as aside:
        aside.write_text("half")
        raise ValueError("stop")
    assert path.read_text() == "old"
    with output_file(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
