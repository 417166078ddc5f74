"""What an evaluation is made of: the two models, their prompts, the reference and the measuring networks' weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from asdm_compress.assembly.store import weights_hash
from asdm_compress.core.errors import AsdmError
from asdm_compress.core.recipe import load_recipe
from asdm_compress.evaluation import inception, lpips
from asdm_compress.evaluation.caption_files import read_captions
from asdm_compress.evaluation.costs import ROLES, Role, check_pair
from asdm_compress.evaluation.distances import Moments
from asdm_compress.evaluation.instruments import Weights
from asdm_compress.evaluation.prompts import evaluation_prompts
from asdm_compress.evaluation.protocols import OWN, Rules
from asdm_compress.evaluation.record import GENERAL_PROMPTS, WORLD_PROMPTS, ModelFacts, OwnSampling, Reference
from asdm_compress.evaluation.reference import ImageFolder, read_moments
from asdm_compress.evaluation.weights import find_weights
from asdm_compress.models.families import latent_size_of
from asdm_compress.models.loading import open_pipeline, open_unet, with_parts
from asdm_compress.models.resolve import resolve
from asdm_compress.models.source import LoadOptions, Source
from asdm_compress.sampling.own_steps import made_for, own_steps
from asdm_compress.sampling.schedulers import evaluations, make_scheduler, sample_alike, scheduler_like
from asdm_compress.sampling.settings import SamplingSettings, check_text_to_image
from asdm_compress.scenes.captions import Caption
from asdm_compress.workflows.card import PYTHON
from asdm_compress.workflows.generate import is_schedule
from asdm_compress.workflows.progress import Progress
from asdm_compress.workflows.student import RECIPE


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """What a user asks for. `changes` are settings of the protocol by the names of `Rules`, None for those unchanged.

    `prompts` is a file of captions, `reference` a folder of images or an .npz of statistics. `repeats` 0 leaves the
    timing out. The first `keep_images` pairs are kept as PNG files. `model_steps` and `model_sampler` are the model's
    where it is to sample otherwise than its teacher.
    """

    against: str | None = None
    inherit: str | None = None
    protocol: str = OWN.name
    changes: Mapping[str, Any] = field(default_factory=dict)
    prompts: Path | None = None
    reference: Path | None = None
    weights: Weights = field(default_factory=Weights)
    repeats: int = 7
    batch: int = 8
    keep_images: int = 16
    command: str = PYTHON
    model_steps: int | None = None
    model_sampler: str | None = None

    def read(self) -> list[Path]:
        """The files and folders that are read, the models aside."""
        weights = (Path(value) for value in astuple(self.weights) if isinstance(value, (str, Path)))
        named = [Path(self.inherit)] if self.inherit is not None else []
        return [*named, *weights, *(path for path in (self.prompts, self.reference) if path is not None)]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What is sampled: prompts, their claims where they are of the bundled world, and where they are from."""

    prompts: tuple[str, ...]
    captions: tuple[Caption, ...]
    origin: str

    @property
    def sha256(self) -> str:
        """Of all prompts in their order."""
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Opened:
    """Both pipelines, as files and opened, and the rules by which they sample, the model in steps of its own."""

    sources: dict[Role, Source]
    pipelines: dict[Role, StableDiffusionPipeline]
    rules: Rules
    departures: list[str]
    model_steps: int

    @property
    def sampling(self) -> dict[Role, SamplingSettings]:
        """How each is sampled."""
        theirs = SamplingSettings(self.rules.steps, self.rules.guidance, self.rules.seed, self.rules.image_size)
        return {"teacher": theirs, "model": replace(theirs, steps=self.model_steps)}

    @property
    def calls(self) -> dict[Role, int]:
        """How often each calls its UNet for an image."""
        return {role: evaluations(self.pipelines[role].scheduler, self.sampling[role].steps) for role in ROLES}

    @property
    def own_sampling(self) -> OwnSampling | None:
        """How the model samples, where that is not as the teacher does."""
        teacher, model = (self.pipelines[role].scheduler for role in ROLES)
        if self.model_steps == self.rules.steps and sample_alike(scheduler_like(teacher, model), model):
            return None
        return OwnSampling(sampler=type(model).__name__, steps=self.model_steps, unet_calls=self.calls["model"])

    @property
    def side(self) -> int:
        """Pixels per side of the images."""
        pipeline = self.pipelines["teacher"]
        return self.rules.image_size or latent_size_of(pipeline.unet) * int(pipeline.vae_scale_factor)


@dataclass(frozen=True, slots=True)
class ReferenceSet:
    """The reference: its images, or their moments, and what `eval.json` says of it; all None where there is none."""

    folder: ImageFolder | None = None
    moments: Moments | None = None
    record: Reference | None = None


def find_all_weights(rules: Rules, settings: EvaluateSettings) -> Weights:
    """The weights that were named, and those that the protocol cannot go without; raises AsdmError for missing ones."""
    asked = settings.weights
    for what, given in (("prompts", settings.prompts), ("reference", settings.reference)):
        if what in rules.needs and given is None:
            hint = {
                "prompts": "Give COCO's captions with --prompts: BK-SDM's metadata.csv, or captions_val2014.json.",
                "reference": "Give the folder of COCO's 2014 validation images, or their statistics, with --reference.",
            }[what]
            raise AsdmError(f"the protocol {rules.name} needs {what}", hint)
    found: dict[str, Path | None] = {}
    for option, name, what in (
        ("inception", inception.FILE_NAME, "the Inception network of FID"),
        ("clip", "clip (the folder of a CLIP model as transformers saves it)", "the CLIP model"),
        ("cmmd", "the folder of CLIP ViT-L/14 at 336 pixels", "the CLIP model of CMMD"),
        ("lpips", lpips.FILE_NAME, "the backbone of LPIPS"),
    ):
        named: Path | None = getattr(asked, option)
        if named is None and option not in rules.needs:
            found[option] = None
        else:
            place = name.split(" (")[0]
            found[option] = find_weights(named, place, what, f"--{option}")
    if found["cmmd"] and settings.reference is None:
        raise AsdmError("CMMD is a distance to a set of images", "Give one with --reference.")
    if settings.changes.get("view_size") is not None and not (found["inception"] or found["clip"] or found["cmmd"]):
        raise AsdmError(
            "--resize is the size at which Inception and CLIP measure, and neither does",
            "Name a network's weights, or leave it out.",
        )
    return Weights(**found)


def open_reference(settings: EvaluateSettings, weights: Weights) -> ReferenceSet:
    """The reference's images or moments; raises AsdmError for one that is not there or that nothing measures."""
    path = settings.reference
    if path is None:
        return ReferenceSet()
    if not path.exists():
        raise AsdmError(f"the reference {path} is not there", "Give a folder of images, or an .npz of statistics.")
    if not (weights.inception or weights.cmmd):
        raise AsdmError("nothing measures the reference", "Name a network's weights with --inception or --cmmd.")
    if path.is_dir():
        images = ImageFolder.of(path)
        return ReferenceSet(images, None, images.record())
    if weights.cmmd:
        raise AsdmError("CMMD needs the reference's images, not their statistics", "Give their folder.")
    moments, record = read_moments(path)
    return ReferenceSet(None, moments, record)


def open_models(
    model: str,
    options: LoadOptions,
    settings: EvaluateSettings,
    rules: Rules,
    departures: list[str],
    progress: Progress,
) -> Opened:
    """Teacher and model, sampling by the same rules; a UNet alone is put into the teacher's pipeline.

    The model samples otherwise where that is asked for, and where its folder says that it was made for other steps and
    nothing else is asked for. Raises AsdmError for models that cannot be opened, or that make no images of one size.
    """
    with progress.stage("Opening teacher and model"):
        ours = resolve(model, options, beside=True)
        theirs = _resolve_teacher(model, ours, settings, options)
        teacher = open_pipeline(theirs, options)
        if ours.kind == "unet folder":
            # A UNet alone is measured inside the teacher's pipeline.
            student = with_parts(teacher, unet=open_unet(ours, options))
        else:
            student = open_pipeline(ours, options)
    for note in dict.fromkeys([*theirs.notes, *ours.notes]):
        progress.note(note)
    made_with = student.scheduler
    for pipeline in (teacher, student):
        check_text_to_image(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        if rules.sampler:
            pipeline.scheduler = make_scheduler(rules.sampler, pipeline)
    asked = settings.model_steps is not None or settings.model_sampler is not None
    asked |= rules.name != OWN.name or any(settings.changes.get(key) is not None for key in ("steps", "sampler"))
    own = own_steps(ours.path, made_with)
    if own is not None and asked:
        progress.note(f"{ours.name} was made for {own} steps of its own sampler, and is sampled as asked for")
        own = None
    if own is not None and ours.path == theirs.path:  # the same model, which inherits features on one side
        rules = replace(rules, steps=own)
    rules = _as_made_for(ours, rules, settings.changes, progress)
    steps = settings.model_steps or own or rules.steps
    if settings.model_sampler:
        student.scheduler = make_scheduler(settings.model_sampler, student)
    elif own is None:  # one that is named, too, takes what it is not told from each folder's own
        _give_both_one_sampler(teacher, student, settings.inherit, progress)
    pipelines: dict[Role, StableDiffusionPipeline] = {"teacher": teacher, "model": student}
    opened = Opened({"teacher": theirs, "model": ours}, pipelines, rules, departures, steps)
    own_sampling = opened.own_sampling
    if own_sampling is not None:
        said = (
            f"the model samples {own_sampling.steps} steps of {own_sampling.sampler}, the teacher {rules.steps} of "
            f"{type(teacher.scheduler).__name__}"
        )
        progress.note(said)
        if rules.name != OWN.name:
            departures.append(said)
    check_pair(teacher, student, opened.sampling["teacher"])
    return opened


def _as_made_for(model: Source, rules: Rules, asked: Mapping[str, Any], progress: Progress) -> Rules:
    """The rules with the guidance and the image size that a model was made for, where nothing else is asked for."""
    made = made_for(model.path)
    if made is None or rules.name != OWN.name:
        return rules
    own: dict[str, Any] = {"guidance": made.guidance, "image_size": made.image_size}
    own = {key: value for key, value in own.items() if value is not None and asked.get(key) is None}
    own = {key: value for key, value in own.items() if value != getattr(rules, key)}
    if own:
        said = " and ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in own.items())
        progress.note(f"{model.name} was made for {said}, by which both are sampled")
    return replace(rules, **own)


def _give_both_one_sampler(
    teacher: StableDiffusionPipeline, student: StableDiffusionPipeline, inherit: str | None, progress: Progress
) -> None:
    """The teacher's; the student's where it follows a schedule, which is for that one alone."""
    like_teacher = scheduler_like(teacher.scheduler, student.scheduler)
    if sample_alike(like_teacher, student.scheduler):
        return
    whose = "model's" if is_schedule(inherit) else "teacher's"
    progress.note(f"the model's own sampler differs from the teacher's; both sample with the {whose}")
    if is_schedule(inherit):
        teacher.scheduler = scheduler_like(student.scheduler, teacher.scheduler)
    else:
        student.scheduler = like_teacher


def _resolve_teacher(model: str, ours: Source, settings: EvaluateSettings, options: LoadOptions) -> Source:
    if settings.against:
        return resolve(settings.against, options)
    try:
        return resolve(_named_teacher(model, ours), options)
    except AsdmError as error:
        raise AsdmError(error.message, "Name the student's teacher with --against.", error.exit_code) from error


def _named_teacher(model: str, source: Source) -> str:
    if source.path is None or not (source.path / RECIPE).is_file():
        raise AsdmError(f"{model} does not say what it was made of", "Name its teacher with --against.")
    return load_recipe(source.path / RECIPE).base.model


def choose_prompt_set(opened: Opened, settings: EvaluateSettings) -> PromptSet:
    """A user's own captions, the bundled world's, or general ones; raises AsdmError for too few for a protocol."""
    count = opened.rules.images
    if settings.prompts is None:
        prompts, captions = evaluation_prompts(opened.pipelines["teacher"], count)
        if len(prompts) < count:
            raise AsdmError(
                f"there are {len(prompts)} general prompts, and {count} images are asked for", "Give --prompts."
            )
        return PromptSet(prompts, captions, WORLD_PROMPTS if captions else GENERAL_PROMPTS)
    found = tuple(read_captions(settings.prompts)[:count])
    if len(found) < count and settings.protocol != OWN.name:
        raise AsdmError(
            f"{settings.prompts} has {len(found)} captions, and {count} images of the protocol {settings.protocol} are "
            "asked for",
            f"Give all of them, or say with --images {len(found)} that fewer are meant.",
        )
    return PromptSet(found, (), settings.prompts.name)


def model_facts(opened: Opened, settings: EvaluateSettings) -> dict[Role, ModelFacts]:
    """What `eval.json` says of the two."""
    found: dict[Role, ModelFacts] = {}
    for role in ROLES:
        source, unet = opened.sources[role], opened.pipelines[role].unet
        found[role] = ModelFacts(
            name=source.name,
            weights=weights_hash(unet),
            unet_class=type(unet).__name__,
            is_recipe_student=source.path is not None and (source.path / RECIPE).is_file(),
            inherit=settings.inherit if role == "model" else None,
            sampling=opened.own_sampling if role == "model" else None,
        )
    return found
