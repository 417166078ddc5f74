"""What the pictures are worth: fidelity to the teacher, and, for the bundled model's world, what they show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from asdm_compress.evaluation.fidelity import Fidelity, compare, to_tensor
from asdm_compress.sampling.images import Samples
from asdm_compress.scenes.captions import Caption
from asdm_compress.scenes.reader import load_reader


@dataclass(frozen=True, slots=True)
class Quality:
    """Fidelity of student to teacher; `right` counts pictures in which everything that the prompt says is right."""

    fidelity: Fidelity
    count: int
    teacher_right: int | None = None
    student_right: int | None = None

    def as_json(self) -> dict[str, float | int | None]:
        """For files and `--json`."""
        return {
            "pairs": self.count,
            **asdict(self.fidelity),
            "teacher_right": self.teacher_right,
            "student_right": self.student_right,
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, value and meaning, for reports."""
        rows = [
            ("PSNR", f"{self.fidelity.psnr:.2f} dB", f"student's images against the teacher's, {self.count} pairs"),
            ("SSIM", f"{self.fidelity.ssim:.4f}", "the same pairs"),
            ("latent MSE", f"{self.fidelity.latent_mse:.4g}", "the same pairs, before the VAE"),
        ]
        if self.teacher_right is not None:
            for who, right in (("teacher", self.teacher_right), ("student", self.student_right)):
                rows.append(
                    (f"{who}'s prompt accuracy", f"{right} of {self.count}", "all attributes of all objects right")
                )
        return rows


def assess(teacher: Samples, student: Samples, captions: Sequence[Caption] | None) -> Quality:
    """Compare two runs; with captions of the bundled model's world, also read what the pictures show."""
    fidelity, count = compare(student, teacher), len(teacher.images)
    if captions is None:
        return Quality(fidelity, count)
    reader = load_reader()
    right = [sum(reader.accuracy(to_tensor(s.images), captions)) for s in (teacher, student)]
    return Quality(fidelity, count, *right)


@torch.no_grad()
def scene_features(images: Tensor) -> np.ndarray:
    """The scene reader's pooled features (N, 128) of images (N, 3, 128, 128) in [0, 1]."""
    reader = load_reader()
    return torch.cat([reader.features(part)[1] for part in torch.split(images, 64)]).double().numpy()


def accuracy_by_count(flags: Sequence[bool], object_counts: Sequence[int]) -> dict[int, float]:
    """Prompt accuracy by the number of objects that the prompt names."""
    return {
        n: float(np.mean([f for f, c in zip(flags, object_counts, strict=True) if c == n]))
        for n in sorted(set(object_counts))
    }
