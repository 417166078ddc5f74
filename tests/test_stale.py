"""Published students beside configs that are not theirs: read as what their weights are, and said."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.surgery import assemble, build, specify
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import find_recipe, load_recipe
from asdm_compress.models.families import FAMILIES
from asdm_compress.models.ldm import unet_to_ldm
from asdm_compress.models.loading import load_unet
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions
from asdm_compress.models.stale import STUDENTS, student_name
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.workflows.export import run_export
from asdm_compress.workflows.profile import run_profile
from asdm_compress.workflows.progress import Silent

OPTIONS = LoadOptions(dtype=None)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def plan_of(name):
    return Plan(load_recipe(find_recipe(name)).as_edits())


class Told(Silent):
    """Keeps the notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    @contextmanager
    def stage(self, title):
        yield


@pytest.fixture(scope="module")
def teachers():
    """Stable Diffusion's UNets at a tenth of their widths, with their numbers of heads."""
    found = {}
    for family in ("sd15", "sd21-base"):
        config = {**FAMILIES[family].unet_config, "block_out_channels": (40, 80, 160, 160), "norm_num_groups": 8}
        torch.manual_seed(0)
        found[family] = UNet2DConditionModel(**{**config, "cross_attention_dim": 64}).eval()
    return found


def left_beside(teacher, student, folder):
    """The student's weights beside the teacher's config, as an in-place removal leaves them."""
    teacher.save_config(folder)
    save_file(student.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.filterwarnings("ignore:.*is not that of the weights")
@pytest.mark.parametrize(
    ("family", "recipe", "said"),
    [
        ("sd15", "segmind-small", "4 levels with 1-1-1-1 layers"),
        ("sd15", "segmind-tiny", "3 levels with 1-1-1 layers"),
        ("sd15", "bk-sdm-small-v1", "no mid block"),
        ("sd21-base", "bk-sdm-base-v2", "4 levels with 1-1-1-1 layers"),
        ("sd21-base", "bk-sdm-tiny-v2", "no mid block"),
    ],
)
def test_a_student_is_read_as_what_its_weights_are(teachers, tmp_path, family, recipe, said):
    teacher = teachers[family]
    student = assemble(teacher, plan_of(recipe))
    folder = left_beside(teacher, student, tmp_path / "unet")
    found = load_unet(str(folder), OPTIONS)
    theirs, ours = student.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # The outputs tell what the names cannot: the heads of every level. Where weights lie in memory changes roundings.
    inputs = (torch.randn(1, 4, 16, 16), 500, torch.randn(1, 5, 64))
    with torch.no_grad():
        assert torch.allclose(found(*inputs).sample, student(*inputs).sample, atol=1e-5)
    [note] = resolve(str(folder), OPTIONS).notes
    assert said in note
    assert "config.json is not that of the weights beside it" in note
    # A config that fits draws no remark, and a teacher's own neither.
    student.save_pretrained(tmp_path / "right")
    assert resolve(str(tmp_path / "right"), OPTIONS).notes == ()


def test_what_no_config_fits_is_refused_as_damaged(teachers, tmp_path):
    teacher = teachers["sd15"]
    folder = left_beside(teacher, assemble(teacher, plan_of("segmind-small")), tmp_path / "unet")
    weights = load_file(folder / WEIGHTS)
    del weights["up_blocks.3.attentions.0.proj_out.bias"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert resolve(str(folder), OPTIONS).notes == ()
    with pytest.raises(AsdmError, match=r"Cannot load .*because up_blocks\.1\.resnets\.1\.conv1\.weight"):
        load_unet(str(folder), OPTIONS)


def test_students_are_known_by_their_published_size():
    names = {}
    for recipe in ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"):
        for version, family in (("v1", "sd15"), ("v2", "sd21-base")):
            with torch.device("meta"):
                teacher = UNet2DConditionModel(**FAMILIES[family].unet_config)
            spec = specify(teacher, plan_of(f"{recipe}-{version}"))
            shapes = {key: tuple(t.shape) for key, t in build(spec.config, spec.edits).state_dict().items()}
            names[f"{recipe}-{version}"] = student_name(shapes)
            assert student_name({key: tuple(t.shape) for key, t in teacher.state_dict().items()}) is None
    assert set(names.values()) == set(STUDENTS.values())
    assert "Segmind small-sd" in names["bk-sdm-base-v1"]
    assert "Segmind tiny-sd" in names["bk-sdm-tiny-v1"]


def test_commands_go_by_the_weights_too(unet, tmp_path):
    """A pipeline folder of the bundled model's BK-SDM-Tiny, whose config says that nothing is missing."""
    shutil.copytree(MINI_SD_FOLDER, tmp_path / "model")
    (tmp_path / "model" / "unet" / WEIGHTS).unlink()
    student = assemble(unet, plan_of("bk-sdm-tiny-v1"))
    left_beside(unet, student, tmp_path / "model" / "unet")
    told = Told()
    settings = ProfileSettings(text_tokens=None, repeats=1, batch=1)
    found = run_profile(str(tmp_path / "model"), LoadOptions(), settings, told)
    assert found.parameters == sum(p.numel() for p in student.parameters())
    run_export(str(tmp_path / "model"), tmp_path / "out.safetensors", "ldm", OPTIONS, 25, None, told)
    assert len(told.notes) == 2
    assert all("3 levels" in note for note in told.notes)
    written, wanted = load_file(tmp_path / "out.safetensors"), unet_to_ldm(student)
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)
    assert json.loads((tmp_path / "model" / "unet" / "config.json").read_text())["layers_per_block"] == 2
