"""A folder with something of every stage, of real files, made of the bundled model in seconds."""

from __future__ import annotations

import json

from asdm_compress.assembly.calibration import Effort, record
from asdm_compress.assembly.damage import measure_damages, measure_plan
from asdm_compress.assembly.frontier import FILE_NAME as FRONTIER
from asdm_compress.assembly.frontier import Question, frontier_of
from asdm_compress.assembly.options import find_options, teacher_costs
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.record import (
    FILE_NAME,
    PAIRS_FOLDER,
    Assembly,
    Pair,
    bands_of,
    measured_options,
    pair_terms,
)
from asdm_compress.assembly.surgery import assemble
from asdm_compress.core.recipe import Base, Costs, EditEntry, Evidence, Recipe, dump_recipe
from asdm_compress.evaluation.fidelity import compare_pairs
from asdm_compress.evaluation.record import (
    Estimate,
    Evaluation,
    ImagePair,
    Machine,
    Measure,
    ModelFacts,
    Protocol,
)
from asdm_compress.inheritance.actions import FULL, conditional_only, cut
from asdm_compress.inheritance.forecast import parse_forecast
from asdm_compress.inheritance.schedule import Schedule
from asdm_compress.inheritance.schedule_file import save_schedule
from asdm_compress.models.families import architecture
from asdm_compress.models.saving import save_pipeline
from asdm_compress.profiling.profile import ProfileSettings
from asdm_compress.sampling.images import sample
from asdm_compress.sampling.settings import SamplingSettings
from asdm_compress.scenes.captions import sample_captions
from asdm_compress.workflows.assemble import with_unet
from asdm_compress.workflows.assembly_files import menu_of, student_sites

PLAN = {
    "down_blocks.3.resnets.1": "drop",
    "mid_block": "drop",
    "down_blocks.2.layers.1": "conv1x1*4@timestep",
    "up_blocks.1.attentions.1.transformer_blocks.0.ff": "narrow0.5",
    "up_blocks.0.upsamplers.0": "subpixel",
}
BANDS = 2


def make_folder(folder, pipeline, profile):
    """A student of `PLAN` with everything beside it that assemble, calibrate, distill and evaluate leave."""
    unet, plan = pipeline.unet, Plan(PLAN)
    student = assemble(unet, plan)
    save_pipeline(with_unet(pipeline, student), folder)
    profile.save(folder / "profile.json")
    teacher, saved = teacher_costs(profile), 0.75
    (folder / "recipe.yaml").write_text(dump_recipe(_recipe(unet, student, teacher, saved)), encoding="utf-8")
    captions = [c.text for c in sample_captions(3, 7)]
    settings = SamplingSettings(steps=4, guidance=4.0)
    calibration = record(pipeline, captions, settings, BANDS, None, None, Effort(6, 1))
    options = [o for o in find_options(unet, profile) if ".resnets." in o.site or o.site == "mid_block"]
    damages = measure_damages(unet, options, calibration)
    held_out = measure_plan(unet, plan, calibration)
    images = {who: sample(with_unet(pipeline, model), captions[:2], settings) for who, model in
              (("teacher", unet), ("student", student))}  # fmt: skip
    psnr, ssim = compare_pairs(images["student"].images, images["teacher"].images)
    (folder / PAIRS_FOLDER).mkdir()
    for who, run in images.items():
        for i, image in enumerate(run.images):
            image.save(folder / PAIRS_FOLDER / f"{i:02d}-{who}.png")
    command = "asdm-compress assemble mini-sd --budget latency=0.8x --out student"
    Assembly(
        model="mini-sd", command=command, proof="Summed damage 0.1, proven optimal.", opens_in_plain_diffusers=False,
        sampler="DDIMScheduler, 4 steps, guidance 4",
        bands=bands_of(held_out, calibration.band_weights, calibration.boundaries, 1000),
        options=measured_options(options, damages), pair_terms=pair_terms(options, damages),
        student_sites=student_sites(
            unet, plan, {}, saved * profile.latency, ProfileSettings(text_tokens=40, repeats=2)
        ),
        quality={"pairs": 2, "psnr": sum(psnr) / 2, "ssim": sum(ssim) / 2, "latent_mse": 0.5},
        seconds_per_image={"teacher": images["teacher"].seconds, "student": images["student"].seconds},
        pairs=[
            Pair(
                prompt=captions[i], seed=i, teacher=f"{PAIRS_FOLDER}/{i:02d}-teacher.png",
                student=f"{PAIRS_FOLDER}/{i:02d}-student.png", psnr=psnr[i], ssim=ssim[i],
            )
            for i in range(2)
        ],
    ).save(folder / FILE_NAME)  # fmt: skip
    shares = (0.95, 0.9, 0.85, 0.8, 0.5, 0.05)
    menu, question = menu_of(options, damages, profile), Question("latency", shares)
    frontier_of(menu, question, "mini-sd", "asdm-compress frontier student").save(folder / FRONTIER)
    _add_schedule(folder)
    _add_training(folder)
    _evaluation(captions, psnr, ssim).save(folder / "eval.json")
    return folder


def _recipe(unet, student, teacher, share):
    measured = Costs(
        latency=share * teacher["latency"], macs=round(0.8 * teacher["macs"]),
        params=sum(p.numel() for p in student.parameters()),
    )  # fmt: skip
    evidence = Evidence(
        teacher=Costs(latency=teacher["latency"], macs=teacher["macs"], params=teacher["params"]), predicted=measured,
        measured=measured, measured_latency_ratio=share, solved_for=["latency=0.8x"], predicted_damage=0.02,
        summed_damage=0.019, measured_damage=0.021, held_out_damage=0.022, damage_bound=0.019, proven_optimal=True,
    )  # fmt: skip
    return Recipe(
        asdm_recipe=1, base=Base(model="mini-sd", architecture=architecture(unet)),
        edits=[EditEntry(site=site, edit=edit) for site, edit in PLAN.items()], budget=["latency=0.8x"],
        evidence=evidence, provenance={"measured_on": "a processor, float32, 1 threads", "versions": {"torch": "2"}},
    )  # fmt: skip


def _add_schedule(folder):
    held, linear = cut(1), cut(0, parse_forecast("linear"))
    actions = (FULL, held, linear, conditional_only(parse_forecast("linear")), FULL, linear)
    place = folder / "schedule"  # where `calibrate --out student/schedule` leaves it
    place.mkdir()
    save_schedule(Schedule(actions, {}, None), place / "inheritance.yaml")
    steps = [
        {"action": a.name, "predicted_error": None if i == 1 else 0.01 * i, "measured_error": 0.012 * i,
         "predicted_seconds": 0.01, "measured_seconds": 0.011} for i, a in enumerate(actions)
    ]  # fmt: skip
    score = {"pairs": 4, "psnr": 40.0, "psnr_interval": 0.5, "ssim": 0.99, "ssim_interval": 0.001}
    ours = {"role": "schedule", "way": "found", "share": 0.61, "validation": score, "test": score}
    content = {
        "model": "mini-sd", "time": {"full_seconds": 1.0, "predicted_share": 0.6, "measured_share": 0.61},
        "contestants": [ours], "verdict": "Nothing else fits into this time.", "steps": steps, "front": [],
        "measured_on": {"processor": "a processor"},
    }  # fmt: skip
    (place / "calibration.json").write_text(json.dumps(content), encoding="utf-8")


def _add_training(folder):
    lines = []
    for step in range(0, 60, 10):
        lines.append({"step": step, "latent_error": 0.5 / (step + 10), "damage": 0.1 / (step + 10), "expert_use": {}})
        losses = {"loss": 2.0 / (step + 10), "output": 1.0 / (step + 10), "gradient_norm": 1.0, "learning_rate": 1e-4}
        lines.append({"step": step + 5, "trains": "all", **losses, "images_per_second": 3.0})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 70, "lo'  # as a kill leaves it
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def _evaluation(captions, psnr, ssim):
    def exact(value):
        return Estimate(value=value, low=value, high=value, n=1, method="exact")

    mean = Estimate(value=sum(psnr) / 2, low=min(psnr), high=max(psnr), n=2, method="bootstrap-bca")
    machine = Machine(device="a processor", dtype="float32", threads=1, processes=1, versions={"torch": "2"})
    protocol = Protocol(
        name="own", prompts="held-out captions", prompt_count=2, prompts_sha256="0" * 64, steps=4, sampler="DDIM",
        unet_calls=4, guidance=4.0, seed=0, image_size=128, measured_size=None, resize_filter=None, extractors=[],
        reference=None, departures=[],
    )  # fmt: skip
    facts = {"weights": "abc", "unet_class": "UNet2DConditionModel", "is_recipe_student": True}
    return Evaluation(
        model=ModelFacts(name="student <b>&", **facts), teacher=ModelFacts(name="mini-sd", **facts), protocol=protocol,
        machine=machine, command="asdm-compress evaluate student --against mini-sd",
        measures=[
            Measure(name="psnr", group="pairs", unit="dB", title="PSNR", better="higher", model=mean),
            Measure(
                name="parameters", group="size", unit="1", title="parameters", better="lower", teacher=exact(8e6),
                model=exact(6e6), change=exact(0.75), change_kind="ratio",
            ),
        ],
        pairs=[
            ImagePair(
                index=i, prompt=f"{captions[i]} <script>alert(1)</script>", seed=i,
                teacher_image=f"pairs/{i:02d}-teacher.png", model_image=f"pairs/{i:02d}-student.png", latent_mse=0.5,
                psnr=psnr[i], ssim=ssim[i],
            )
            for i in range(2)
        ],
        timings={},
    )  # fmt: skip
