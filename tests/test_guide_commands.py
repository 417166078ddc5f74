"""Every command that README, the guides and --help show is run, in one folder, one after the other.

As it is written there, with options added that make it cheap: few prompts, few steps, a coarse search. Where a command
stands for any model, student or folder, it gets one. What cannot be run here is named with the reason, and is parsed by
`test_documents.py` all the same.
"""

from __future__ import annotations

import copy
import re
import shlex

import pytest
import torch
import typer.main
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from stand_ins import save_clip
from write_documents import DOCUMENTS

from asdm_compress.cli.examples import BEGIN, EXAMPLES
from asdm_compress.cli.main import app
from asdm_compress.core.recipe import find_recipe, load_recipe

COMMAND = re.compile(r"(?:\.venv/bin/)?asdm-compress ([a-z][^`\n&]*)")
STANDS_FOR = {
    "[MODEL]": "mini-sd", "MODEL": "mini-sd", "TEACHER": "mini-sd", "FOLDER": "mini-light",
    "LORA": "teacher-lora.safetensors",
    "STUDENT…": "mini-light", "STUDENT,…": "mini-light", "STUDENT": "mini-light",
    "recipe.yaml": "mini-light/recipe.yaml",
}  # fmt: skip
# Prose may name a command without its arguments.
NAMED_ONLY = {"distill …", "export", "optimize --members"}
NOT_RUN = {
    "apply bk-sdm-base-v1": "needs a checkpoint of the size of Stable Diffusion 1.x",
    "apply bk-sdm-base-v1 MODEL": "the same",
    "apply shared-v1 MODEL": "the same",
    "calibrate MODEL --budget latency=0.5x": "the guide to inheritance has the same with a sampler, which is run",
    "calibrate TEACHER --members STUDENT,… --budget latency=0.6x": "slow; test_calibrate_members.py runs it",
    "optimize MODEL --members STUDENT,… --budget latency=0.33x": "slow; test_calibrate_members.py runs it",
    "recipes list": "test_recipes.py runs it; it builds every student at full size, on the meta device",
}
SAMPLING = "--steps 4 --guidance 1"
PROMPTS = "--calibration-prompts 2 --validation-prompts 2 --test-prompts 2 --repeats 2"
SEARCH = (
    "--steps 2 --bands 2 --calibration-prompts 2 --calibration-triples 4 --probes 1 --finest unit --slot none "
    "--narrow none --refit none --repeats 2"
)
CHEAPER = {
    "assemble": f"{SEARCH} --held-out-prompts 2 --neighbours 0",
    "apply": "--slot-start zero",
    "calibrate": f"{SAMPLING} {PROMPTS} --no-corrections --curve 0",
    "generate": SAMPLING,
    "evaluate": "--steps 2 --images 2 --batch 2 --repeats 0 --keep-images 2",
    "frontier": f"{SEARCH} --patience 0.2 --images 0",
    "profile": "--repeats 1",
    "distill": "--steps 2 --batch 2 --data-size 4 --probe-every 0 --set data.guidance=1",
}
# What others need comes first.
ORDER = ("assemble", "apply", "calibrate", "switch", "optimize")


def shown() -> list[str]:
    """The commands of all documents and of --help, those first that leave what others need; of like ones the first."""
    found: dict[tuple[str, ...], str] = {}
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    for text in (*texts, *BEGIN, *EXAMPLES.values()):
        for match in COMMAND.findall(text):
            line = match.split(" #")[0].strip()
            if line not in NAMED_ONLY:
                without_place = re.sub(r" (--out|-o) \S+", "", line)
                found.setdefault(tuple(words_of(without_place)), line)
    return sorted(found.values(), key=lambda line: (*ORDER, line.split()[0]).index(line.split()[0]))


def words_of(line: str) -> list[str]:
    """A command's words, with something in the place of what stands for anything."""
    words = shlex.split(line)
    if words[:2] == ["generate", "MODEL"] and "--compare" in words:  # which are two
        words[1] = "mini-light"
    return [STANDS_FOR.get(word, word) for word in words]


def cheaper_for(words: list[str]) -> list[str]:
    """The options that make a command cheap, without those that would do nothing there and are refused."""
    options = CHEAPER.get(words[0], "")
    if words[0] == "assemble" and "--members" in words:
        options = options.replace(" --neighbours 0", "")
    if words[0] == "apply" and not load_recipe(find_recipe(words[1])).brings_weights:
        options = ""
    if words[:2] == ["frontier", "mini-light"]:  # of which everything is measured
        options = "--patience 0.2"
    return shlex.split(options)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """A folder with what users bring: captions, a CLIP model, a LoRA."""
    place = tmp_path_factory.mktemp("guides")
    (place / "captions.txt").write_text("a small red circle\na large blue square\na green cross\n", encoding="utf-8")
    save_clip(place / "clip")
    unet = copy.deepcopy(pipeline.unet)
    unet.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(place, layers, weight_name="teacher-lora.safetensors")
    return place


@pytest.mark.slow  # minutes together; what each command does has tests of its own
@pytest.mark.parametrize("line", [line for line in shown() if line not in NOT_RUN])
def test_a_command_of_a_document_runs(line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ASDM_COMPRESS_CACHE", str(folder / "cache"))
    words = words_of(line)
    command = typer.main.get_command(app).commands[words[0]]
    words += cheaper_for(words)
    if any("--overwrite" in parameter.opts for parameter in command.params):
        words.append("--overwrite")
    threads = torch.get_num_threads()
    try:
        app(words, standalone_mode=False)
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.strip(), "it says nothing of what it has done"


def test_what_is_not_run_is_shown_somewhere():
    assert set(NOT_RUN) <= set(shown())
