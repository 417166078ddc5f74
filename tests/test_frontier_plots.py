"""The frontier's plots say where a rival is as good as we are in no more time."""

from __future__ import annotations

import pytest
from frontier_plots import beaten, write_plots


def row(role: str, time: float, psnr: float, frechet: float) -> dict[str, object]:
    more = {"right": 3, "latent_error": 0.1, "criterion": "fidelity"}
    return {"role": role, "image_share": time, "psnr": psnr, "frechet": frechet, **more}


ROWS = [
    row("full model", 0.5, 30.0, 2.0),
    row("DeepCache", 0.4, 28.0, 1.5),
    row("inheritance", 0.5, 30.0, 1.9),
    row("inheritance", 0.39, 20.0, 1.6),
    row("all together", 0.6, 31.0, 1.6),
]


@pytest.mark.parametrize(("key", "lost"), [("psnr", [0.5]), ("frechet", [0.5, 0.6])])
def test_points_that_a_rival_reaches_in_no_more_time_are_found(key, lost):
    assert [found["image_share"] for found in beaten(ROWS, key)] == lost


def test_they_are_marked_in_the_plot(tmp_path):
    write_plots({"rows": ROWS, "reference": {"count": 8}}, tmp_path)
    assert "a rival is as good in no more time" in (tmp_path / "frontier_psnr.svg").read_text(encoding="utf-8")
    write_plots({"rows": ROWS[:1] + ROWS[4:], "reference": {"count": 8}}, tmp_path)
    assert "a rival is as good" not in (tmp_path / "frontier_psnr.svg").read_text(encoding="utf-8")
