"""Evaluation: prompts, fidelity to the teacher, and what the bundled model's pictures show."""
