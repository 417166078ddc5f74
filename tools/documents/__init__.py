"""README and guides: their tables and figures, written from `tools/results/`."""
