"""Reports: what they say of a folder, and that they say nothing of what is not there."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import zipfile
from html import unescape
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from report_folder import PLAN, make_folder
from safetensors.torch import load_file, save_file

from asdm_compress.assembly.frontier import Menu, Question, find_frontier, frontier_of, load_frontier
from asdm_compress.assembly.options import Option
from asdm_compress.assembly.plan import Plan
from asdm_compress.assembly.record import load_assembly
from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.units import Limit
from asdm_compress.models.saving import copy_rest
from asdm_compress.profiling.profile import ProfileSettings, load_profile
from asdm_compress.reporting.stages import Routes, read_stages
from asdm_compress.workflows.assembly_files import student_sites
from asdm_compress.workflows.frontier import ask
from asdm_compress.workflows.report import write_report

SECTIONS = [
    "costs", "plan", "time", "predictions", "damage", "frontier", "evaluation", "schedule", "experts", "training",
    "provenance",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipeline, mini_profile):
    place = make_folder(tmp_path_factory.mktemp("report") / "student", pipeline, mini_profile)
    write_report(place)
    return place


def test_a_full_folder_has_every_section_in_every_form(folder):
    figures = json.loads((folder / "report.json").read_text())
    assert list(figures["sections"]) == SECTIONS
    assert figures["missing"] == {}
    assert len(figures["verdict"]) == 3
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for key in SECTIONS:
        assert f'<section id="{key}"' in html
        assert f"## {figures['sections'][key]['title']}" in markdown
    # Every figure of the JSON is in the Markdown as text: here those of the frontier.
    points = figures["sections"]["frontier"]["tables"][0]["rows"]
    assert [f"| {row['budget']} | {row['latency']:.3f}x |" in markdown for row in points] == [True] * len(points)


def test_the_figures_are_those_of_the_files(folder):
    sections = json.loads((folder / "report.json").read_text())["sections"]
    assembly, frontier = load_assembly(folder / "assembly.json"), load_frontier(folder / "frontier.json")
    bands = sections["damage"]["tables"][0]["rows"]
    assert [row["damage"] for row in bands] == [band.held_out_damage for band in assembly.bands]
    assert sum(row["share of the total"] for row in bands) == pytest.approx(1)
    rows = sections["frontier"]["tables"][0]["rows"]
    assert [row["summed damage"] for row in rows] == [point.summed_damage for point in frontier.points]
    edits = sections["plan"]["tables"][0]["rows"]
    assert {row["site"]: row["edit"] for row in edits} == PLAN
    time = {row["block"]: row for row in sections["time"]["tables"][0]["rows"]}
    assert time["mid_block"]["student"] == 0  # it is gone
    assert time["up_blocks.3"]["student"] > 0
    profile = load_profile(folder / "profile.json")
    assert [row["teacher"] for row in time.values()] == [s.latency for s in profile.sites if s.level == "block"]
    slots = {row["kind"]: row for row in sections["time"]["tables"][1]["rows"]}["convolutions in slots"]
    assert (slots["teacher"], slots["student"] > 0) == (0, True)
    probes = sections["training"]["tables"][0]["rows"]
    assert [row["step"] for row in probes] == list(range(0, 60, 10))


def test_the_schedule_is_drawn_on_the_students_own_parts(folder):
    rows = {
        row["part"]: row["steps"]
        for row in json.loads((folder / "report.json").read_text())["sections"]["schedule"]["tables"][1]["rows"]
    }
    # Of six steps, two cuts at the outermost layer leave that one; a guidance step computes every part.
    assert rows["conv_in"] == rows["up_blocks.3.resnets.2"] == 1
    assert rows["down_blocks.2.resnets.0"] == pytest.approx(3 / 6)
    assert rows["unconditional branch"] == pytest.approx(5 / 6)
    assert not any(name.startswith("mid_block") for name in rows)


def test_another_student_does_not_inherit_what_was_measured_of_this_one(folder, pipeline, tmp_path):
    copy_rest(folder, tmp_path / "trained", pipeline.unet, None)
    names = {path.name for path in (tmp_path / "trained").iterdir()}
    assert {"model_index.json", "vae", "tokenizer", "scheduler", "profile.json"} <= names
    assert not names & {"assembly.json", "frontier.json", "eval.json", "report.json", "pairs", "schedule"}


def test_what_is_not_there_is_not_shown_and_its_command_is_named(folder, tmp_path):
    bare = tmp_path / "student"
    shutil.copytree(
        folder, bare, ignore=shutil.ignore_patterns("*.json", "*.jsonl", "schedule", "pairs", "report*", "vae")
    )
    shutil.copytree(folder / "unet", bare / "unet", dirs_exist_ok=True)  # with its config
    result = write_report(bare).report
    assert [section.key for section in result.sections] == ["costs", "plan", "predictions", "experts", "provenance"]
    commands = {missing.title: missing.command for missing in result.missing}
    assert commands["Evaluation"] == "asdm-compress evaluate student --against TEACHER --out student/evaluation"
    assert "Frontier" not in commands  # which takes what `assemble` leaves, and this folder has none of that
    html = (bare / "report.html").read_text()
    assert '<section id="evaluation"' not in html
    assert "asdm-compress calibrate student" in html
    (bare / "recipe.yaml").unlink()
    with pytest.raises(AsdmError, match="nothing to report"):
        write_report(bare)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("assembly.json", ('"schema_version": 1', '"schema_version": 9'), "schema version 9"),
        ("assembly.json", ('"pair_terms": "', '"pair_terms": "AAAA'), "one number for every two"),
        ("frontier.json", ('"proven"', '"prven"'), "frontier.json"),
        ("schedule/calibration.json", ('"measured_share": 0.61', '"measured_share": "fast"'), "calibration.json"),
        ("eval.json", ("{", "["), "eval.json"),
    ],
)
def test_a_damaged_file_is_named(folder, tmp_path, file, change, told):
    broken = tmp_path / "student"
    shutil.copytree(folder, broken)
    text = (broken / file).read_text()
    assert change[0] in text
    (broken / file).write_text(text.replace(*change, 1))
    with pytest.raises(AsdmError, match=told):
        write_report(broken)


def test_a_broken_image_is_named(folder, tmp_path):
    broken = tmp_path / "student"
    shutil.copytree(folder, broken)
    (broken / "pairs" / "01-student.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(AsdmError, match=r"01-student\.png"):
        write_report(broken)


def test_texts_of_files_are_no_markup(folder):
    html = (folder / "report.html").read_text()
    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert len(re.findall("<script", html)) == 1


def test_the_page_names_no_host(folder):
    html = unescape((folder / "report.html").read_text())
    assert not re.findall(r"(?:src|href|action)\s*=\s*[\"']?(?!data:|#|&)\w", html)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in html


def test_the_card_holds_the_figures_and_keeps_the_rest(folder, tmp_path):
    place = tmp_path / "student"
    shutil.copytree(folder, place)
    begin, end = "<!-- figures: written by `asdm-compress report` -->", "<!-- end of figures -->"
    (place / "README.md").write_text(f"# mine\n\n{begin}\nOUTDATED\n{end}\n\nThe rest.\n")
    write_report(place)
    card = (place / "README.md").read_text()
    assert card.startswith("# mine\n\n" + begin)
    assert card.endswith(end + "\n\nThe rest.\n")
    assert "OUTDATED" not in card
    assert "### Quality" in card
    once = card
    write_report(place)
    assert (place / "README.md").read_text() == once
    (place / "README.md").write_bytes(b"caf\xe9")  # a user's own, in which nothing of ours is
    write_report(place)
    assert (place / "README.md").read_bytes() == b"caf\xe9"


def test_the_same_folder_gives_the_same_report(folder, tmp_path):
    write_report(folder, out=tmp_path)
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_experts_are_drawn_as_the_layer_mixes_them(folder):
    import torch

    from asdm_compress.models.expert_conv import Moment, MultiExpertConv2d

    routes = read_stages(folder).routes
    assert [r.site for r in routes] == ["down_blocks.2.resnets.1"]
    layer = MultiExpertConv2d(2, 2, routes[0].spec)
    softer = Routes("x", routes[0].spec, (0.8, 0.5, 0.1), 13.0)
    with torch.no_grad():
        layer.time_router.boundaries.copy_(torch.tensor(softer.boundaries))
        layer.time_router.sharpness.fill_(softer.sharpness)
        times = torch.tensor([990.0, 800.0, 510.0, 120.0, 3.0])
        expected = layer.route(None, Moment.of(times, 5, torch.device("cpu")))
    np.testing.assert_allclose(softer.shares(times.numpy()), expected.numpy(), atol=1e-5)


def test_the_terms_of_pairs_come_back_as_they_were(folder):
    assembly = load_assembly(folder / "assembly.json")
    between = assembly.interaction()
    names = [o.name for o in assembly.options]
    terms = np.array([between(a, b) for a, b in combinations(names, 2)])
    stored = np.frombuffer(base64.b64decode(assembly.pair_terms), "<f4")
    assert np.any(stored != 0)
    assert terms.tolist() == stored.tolist()  # in the order of itertools.combinations


def test_sites_of_a_student_without_a_level_keep_the_teachers_names(unet, mini_profile):
    plan = Plan({"levels.3": "drop"})
    sites = student_sites(unet, plan, {}, mini_profile.latency, ProfileSettings(text_tokens=40, repeats=2))
    blocks = {site.path for site in sites if re.fullmatch(r"up_blocks\.\d", site.path)}
    assert blocks == {"up_blocks.1", "up_blocks.2", "up_blocks.3"}


def _brute_force(options, damages, limit, teacher):
    """The least summed damage within a limit, over every set of options that do not overlap."""
    best = np.inf
    for size in range(len(options) + 1):
        for chosen in combinations(options, size):
            atoms = [atom for o in chosen for atom in o.atoms]
            cost = teacher - sum(o.savings["macs"] for o in chosen)
            if len(atoms) == len(set(atoms)) and cost <= limit.absolute(teacher):
                best = min(best, sum(damages[o.name] for o in chosen))
    return best


def test_every_point_of_the_frontier_is_the_best_there_is():
    chance = np.random.default_rng(3)
    options = []
    for number in range(9):
        saved = int(chance.integers(20, 140))
        atoms = frozenset({f"a{number}", f"a{number // 2}"})
        options.append(Option(f"s{number}", "drop", atoms, {"latency": 0.0, "macs": saved, "params": 0.0}))
    damages = {o.name: float(chance.uniform(0.01, 1)) for o in options}
    teacher = {"latency": 1.0, "macs": 1000.0, "params": 10.0}
    menu = Menu(options, damages, teacher, lambda a, b: 0.0)
    found, smallest = find_frontier(menu, Question("macs", (0.95, 0.9, 0.8, 0.7, 0.6, 0.1)))
    assert found[-1][0].value == pytest.approx(smallest, rel=1e-4)
    assert found[-1][0].value > 0.1
    for limit, solution in found:
        assert solution.proven
        assert solution.damage == pytest.approx(_brute_force(options, damages, limit, 1000.0), rel=1e-6)
    costs = [s.costs["macs"] for _, s in found]
    harms = [s.damage for _, s in found]
    assert costs == sorted(costs, reverse=True)
    assert harms == sorted(harms)
    with pytest.raises(AsdmError, match="no plan meets"):
        find_frontier(menu, Question("macs", (0.9,), also=(Limit("params", 0.5, relative=True),)))
    with pytest.raises(AsdmError, match="the smallest that can be reached is macs=0") as caught:
        find_frontier(menu, Question("macs", (0.1, 0.05)))
    assert caught.value.exit_code == ExitCode.INFEASIBLE


def test_a_plan_that_a_smaller_one_is_predicted_to_beat_is_on_no_frontier():
    options = [
        Option(name, "drop", frozenset({name}), {"latency": 0.0, "macs": saved, "params": 0.0})
        for name, saved in (("a", 100), ("b", 100), ("c", 300))
    ]
    menu = Menu(
        options, {"a:drop": 0.1, "b:drop": 0.1, "c:drop": 0.3}, {"latency": 1.0, "macs": 1000.0, "params": 10.0},
        lambda one, other: 0.5 if {one, other} == {"a:drop", "b:drop"} else 0.0,
    )  # fmt: skip
    found = frontier_of(menu, Question("macs", (0.9, 0.8, 0.7)), "model", "command")
    assert [point.budget for point in found.points] == ["macs=0.9x", "macs=0.7x"]
    predicted = [point.predicted_damage for point in found.points]
    assert predicted == sorted(predicted)


def test_the_commands_find_the_frontier_of_a_folder_and_report_it(folder, cli, tmp_path):
    place = tmp_path / "student"
    shutil.copytree(folder, place)
    before = load_frontier(place / "frontier.json")
    result = cli("frontier", "student", "--budgets", "0.9x,0.8x", "--resource", "macs", "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["resource"], [p["budget"] for p in printed["points"]]) == ("macs", ["macs=0.9x", "macs=0.8x"])
    assert load_frontier(place / "frontier.json") != before
    assert "<svg" in (place / "frontier.svg").read_text()
    result = cli("report", "student", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["sections"]["frontier"]["tables"][0]["rows"]
    assert [row["budget"] for row in rows] == ["macs=0.9x", "macs=0.8x"]
    result = cli("frontier", "student", "--images", "2")
    assert (result.returncode, "plans are built from a teacher" in " ".join(result.stderr.split())) == (2, True)
    with pytest.raises(AsdmError, match="there is no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(AsdmError, match="unknown resource"):
        ask("time", None, (), False, 10.0)
    with pytest.raises(AsdmError, match="of which the budgets are"):
        ask("macs", None, (Limit("macs", 0.5, relative=True),), False, 10.0)


def test_the_wheel_holds_what_the_page_is_made_of(tmp_path):
    hatch = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert hatch.returncode == 0, hatch.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for name in ("report.html.j2", "report.css", "report.js", "card.md.j2"):
        assert f"asdm_compress/reporting/templates/{name}" in names


def test_experts_of_a_student_in_half_precision_are_drawn_too(folder, tmp_path):
    """Numpy, in which figures are drawn, has no bfloat16."""
    shutil.copytree(folder / "unet", tmp_path / "unet")
    shutil.copy(folder / "recipe.yaml", tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    exact, rounded = read_stages(folder).routes, read_stages(tmp_path).routes
    assert [r.site for r in rounded] == [r.site for r in exact]
    assert rounded[0].boundaries == pytest.approx(exact[0].boundaries, rel=1e-2)
