"""The command line as users meet it: real processes, their output, their files, their exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from command_lines import contents, run_all

from asdm_compress.cli.examples import EXAMPLES
from asdm_compress.models.names import MINI_SD_FOLDER
from asdm_compress.profiling.profile import load_profile

COMMANDS = (
    *("profile", "assemble", "apply", "distill", "calibrate", "generate"),
    *("switch", "optimize", "evaluate", "frontier", "report", "export", "lora", "recipes", "doctor"),
)


MISTAKES = [
    (["assemble", "--budget", "latency=fast"], 2, "does not parse"),
    (["assemble"], 2, "no budget"),
    (["assemble", "--budget", "latency=0.7x", "--out", "there"], 2, "exists already"),
    (["assemble", "mini-ds", "--budget", "latency=0.7x"], 2, "Did you mean mini-sd"),
    (["assemble", "--budget", "params=0.5x", "--prompts", "none.txt"], 2, "none.txt cannot be read"),
    (["assemble", "--budget", "macs=0.7x", "--slot", "5x5"], 2, "Slots: auto, all, 1x1"),
    (["assemble", "--budget", "macs=0.7x", "--routing", "magic"], 2, "Routings: none, timestep"),
    (["assemble", "--budget", "macs=0.7x", "--experts", "9"], 2, "cannot be fitted on 8 timestep bands"),
    (["assemble", "--budget", "macs=0.7x", "--calibration-prompts", "2"], 2, "too few to fit convolutions"),
    (["assemble", "--budget", "macs=0.7x", "--narrow", "1.5"], 2, "no share of a width"),
    (["apply", "good.yaml", "--slot-start", "guess"], 2, "Use fit, zero, random or copied"),
    (["profile", "sd15"], 4, "not on this machine"),
    (["profile", "--device", "cuda:77"], 4, "not available"),
    (["profile", "--device", "abacus"], 2, "unknown device"),
    (["assemble", "--budget", "macs=0.7x", "--scheduler", "heun"], 2, "--scheduler dpm++"),
    (["assemble", "--budget", "macs=0.7x", "--steps", "4"], 2, "cannot be split into 8"),
    (["assemble", "--budget", "macs=0.7x", "--out", "typo.yaml/x"], 2, "no folder that can be written"),
    (["assemble", "there", "--budget", "macs=0.7x"], 2, "neither model_index.json nor"),
    (["calibrate"], 2, "calibrate takes one goal"),
    (["calibrate", "--budget", "latency=0.5x", "--steps", "0"], 2, "Invalid value for '--steps'"),
    (["profile", "--dtype", "int3"], 2, "unknown dtype"),
    (["apply", "none.yaml"], 2, "there is no recipe"),
    (["apply", "typo.yaml"], 2, "typo.yaml:3: bugdet: unknown key"),
    (["generate", "mini-sd", "a red circle", "--scheduler", "magic"], 2, "unknown scheduler"),
    (["generate", "mini-sd", "a red circle", "--image-size", "100"], 2, "no multiple of 64"),
    (["generate", "mini-sd", "a red circle", "--compare", "mini-sd"], 2, "compared with itself"),
    (["optimize", "-b", "latency=0.5x", "--members", ","], 2, "--members names none"),
    (["optimize", "-b", "latency=0.5x", "--steps", "1001"], 2, "Invalid value for '--steps'"),
    (["switch", "mini-sd", "there", "-s", "good.yaml", "--steps", "9"], 2, "does nothing with a schedule's file"),
    (["export", "--scheduler", "euler"], 2, "does nothing with --format ldm"),
    (["assemble", "--budget", "latency=1x", "--members", "2"], 2, "within this time already"),
    (["assemble", "--budget", "macs=0.7x", "--inherit", "latency=0.6x", "--image-size", "72"], 2, "no multiple of 64"),
    (["assemble", "--budget", "macs=0.7x", "--experts", "1", "--routing", "magic"], 2, "Routings: none, timestep"),
    (["generate", "mini-sd", "a red circle", "--negative-prompt", "blue", "--guidance", "1"], 2, "without guidance"),
]


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """What became of every mistake, and of the folder that all were made in."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "there").mkdir()
    (folder / "typo.yaml").write_text("asdm_recipe: 1\nbase: {model: m, architecture: {}}\nbugdet: []\nedits: []\n")
    (folder / "good.yaml").write_text("asdm_recipe: 1\nbase: {model: m, architecture: {}}\nedits: []\n")
    before = contents(folder)
    found = run_all(folder, [(arguments, None) for arguments, _, _ in MISTAKES])
    return found, before, contents(folder)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda number: " ".join(MISTAKES[number][0]))
def test_mistakes_end_in_one_message_and_the_right_code(mistaken, number):
    (found, _, err), (_, code, words) = mistaken[0][number], MISTAKES[number]
    assert found == code, err
    assert words in " ".join(err.split())
    assert "Traceback" not in err


def test_nothing_is_left_of_any_mistake(mistaken):
    _, before, after = mistaken
    assert after == before


def test_help_is_complete_and_imports_no_torch():
    script = (
        "import sys\n"
        "from asdm_compress.cli.main import app\n"
        "for arguments in [['--help']] + [[c, '--help'] for c in sys.argv[1:]]:\n"
        "    app(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'ortools', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script, *COMMANDS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in COMMANDS)
    assert "--budget" in result.stdout
    assert "To begin:" in result.stdout
    # Every command but the group of recipes, which has commands of its own.
    assert result.stdout.count("Example: asdm-compress") == len(COMMANDS) - 1 == len(EXAMPLES)


def test_version_and_missing_command(cli_anew):
    assert cli_anew("--version").stdout.startswith("asdm-compress 0.")
    assert cli_anew("paint").returncode == 2


def test_errors_are_json_when_json_is_asked_for(cli):
    result = cli("assemble", "--budget", "latency=fast", "--json")
    assert result.returncode == 2
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == 2
    assert "does not parse" in error["message"]


def test_profile_writes_its_files_and_prints_json(cli_anew, tmp_path):
    result = cli_anew("profile", "--out", "p", "--repeats", "2", "--json", "--cross-check")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    printed = json.loads(result.stdout)
    found = load_profile(tmp_path / "p" / "profile.json")
    assert printed == found.model_dump(mode="json")
    assert found.fingerprint.model == "mini-sd"
    assert found.fingerprint.text_tokens == 40
    assert [c.counter for c in found.cross_check] == ["fvcore", "thop"]
    assert (tmp_path / "p" / "profile.svg").read_text().startswith("<svg")


def test_profile_prints_a_table_and_quiet_prints_nothing(cli):
    table = cli("profile", "--repeats", "1", "--depth", "sub-unit", "--batch", "1")
    assert table.returncode == 0, table.stderr
    for words in ("up_blocks.3", "cross-attention", "whole UNet", "efficiency"):
        assert words in table.stdout
    quiet = cli("profile", "--repeats", "1", "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_generating_twice_gives_the_same_bytes(cli, cli_anew, tmp_path):
    for out, run in (("a", cli), ("b", cli_anew)):
        assert run("generate", "mini-sd", "a green cross", "--steps", "3", "--out", out, "-q").returncode == 0
    name = "image-0000-a-green-cross.png"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_doctor_tells_versions_and_devices(cli):
    result = cli("doctor", "--json")
    findings = {f["subject"]: f for f in json.loads(result.stdout)["findings"]}
    assert result.returncode == 0
    assert findings["mini-sd"]["state"] == "ok"
    assert {"torch", "diffusers", "cpu", "memory", "cache"} <= set(findings)


def test_a_profile_does_not_replace_the_model_that_it_is_of(cli, tmp_path):
    shutil.copytree(MINI_SD_FOLDER / "unet", tmp_path / "model")
    before = contents(tmp_path / "model")
    result = cli("profile", "model", "--out", "model", "--overwrite")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert contents(tmp_path / "model") == before
