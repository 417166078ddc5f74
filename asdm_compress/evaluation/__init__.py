"""Evaluation: seed-matched images, fidelity to the teacher, and what the bundled model's pictures show."""
