"""The bench for accelerators, tried on the CPU with a narrow UNet: that it runs whole, and what its rows hold."""

from __future__ import annotations

import json

import bench_gpu
import pytest
import torch
from diffusers import UNet2DConditionModel


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_bench_runs_and_predicts(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "DEEPCACHE_SETTINGS", ((2, 0),))
    small = {"device": "cpu", "dtype": "fp32", "width": 32, "size": 64, "steps": 4, "repeats": 2, "modes": "eager"}
    words = [str(word) for name, value in small.items() for word in (f"--{name}", value)]
    bench_gpu.main([*words, "--models", "sd15", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    plans = {row["name"]: row for row in rows if row["what"] == "plan"}
    assert sum(name.startswith("bk-sdm-") for name in plans) == 3
    assert sum(name.startswith("sd15-latency-") for name in plans) == 5
    assert {row["name"] for row in rows if row["what"] == "schedule"} == set(bench_gpu.RULES)
    for row in rows:
        assert "error" not in row
        assert row["share"]["value"] > 0
        assert row["what"] == "DeepCache" or 0 < row["predicted"] < 1.5


def test_the_other_family_has_its_plans_too():
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**bench_gpu.family_of("sd21-base", 32).unet_config)
    names = [name for name, _ in bench_gpu.plans_of("sd21-base", teacher)]
    ours = [f"sd21-latency-{share}x" for share in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert names == ["bk-sdm-base-v2", "bk-sdm-small-v2", "bk-sdm-tiny-v2", *ours]
