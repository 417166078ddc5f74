"""Sampling: how a pipeline is run, step by step or to finished images, always from per-image seeds."""
