"""The best plan for a budget, found in Python: searched, fitted, built and measured as `assemble` does it."""

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import asdm_compress
from asdm_compress import Plan
from asdm_compress.workflows.plan import PlanSettings


def student_for(
    teacher: StableDiffusionPipeline, budget: str, settings: PlanSettings | None = None
) -> tuple[Plan, UNet2DConditionModel]:
    """The plan and its student; measurements are kept on disk, so that a second budget takes a part of the time."""
    found = asdm_compress.plan(teacher, budget, settings).verified
    print(f"{found.latency_ratio:.3f}x of the time, damage {found.measured_damage:.3g} on prompts it was not fitted on")
    return found.solution.plan, found.student


def main(model: str = "mini-sd", settings: PlanSettings | None = None) -> Plan:
    """Cut a model to 0.7 of its latency, and say what was taken out."""
    teacher = asdm_compress.load_pipeline(model)
    plan, student = student_for(teacher, "latency=0.7x", settings)
    print(*(f"{site}: {edit}" for site, edit in plan.edits.items()), sep="\n")
    print(f"{sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters")
    return plan


if __name__ == "__main__":
    main()
