"""A student trained by its teacher, measured beside it, and the report of everything that lies in its folder."""

from pathlib import Path

import asdm_compress
from asdm_compress.workflows.evaluation_input import EvaluateSettings
from asdm_compress.workflows.training_run import DistillSettings


def main(
    student: Path,
    out: Path,
    training: DistillSettings | None = None,
    evaluation: EvaluateSettings | None = None,
) -> Path:
    """Train a folder that `assemble` wrote, as its recipe says; the report is `report.html` in `out`."""
    trained = asdm_compress.distill(student, out, training)
    print(*trained.lines(), sep="\n")
    figures = asdm_compress.evaluate(out, out / "evaluation", evaluation)  # beside the teacher that the recipe names
    psnr = figures.find("psnr")
    if psnr is not None and psnr.model is not None:
        print(f"{psnr.model.value:.1f} dB from the teacher's images, {psnr.model.low:.1f} to {psnr.model.high:.1f}")
    return asdm_compress.write_report(out).out / "report.html"


if __name__ == "__main__":
    main(Path("mini-light"), Path("mini-trained"))
