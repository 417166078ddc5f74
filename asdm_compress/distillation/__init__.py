"""Distillation: a student trained to do what its teacher does."""
