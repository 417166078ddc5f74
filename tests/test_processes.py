"""Several processes, as `accelerate launch` starts them on CPUs: the same result as one, and one message for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import shared_work
import torch
from command_lines import LAUNCH

from asdm_compress.core.errors import AsdmError, ExitCode
from asdm_compress.core.processes import Processes


def run(*command, cwd, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def stored(path):
    """The options of which a process has kept damages."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [name for line in lines for name in line["errors"]]


@pytest.fixture
def one_thread():
    """Sums come out the same to the last bit only if they are split up alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_find_what_one_finds(tmp_path, one_thread):
    result = run(*LAUNCH, shared_work.__file__, str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (tmp_path / "one").mkdir()
    triples, weights, damages, count = shared_work.work(tmp_path / "one")
    assert count == len(damages) == 10
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"found-{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(triples, theirs[0], strict=True))
        assert theirs[1] == weights
        assert list(theirs[2]) == list(damages)
        assert theirs[2] == damages  # to the last bit
    shares = [stored(tmp_path / name) for name in ("damages.jsonl", "damages.1.jsonl")]
    assert not set(shares[0]) & set(shares[1])
    assert sorted(shares[0] + shares[1]) == sorted(stored(tmp_path / "one" / "damages.jsonl"))
    assert min(map(len, shares)) >= 3
    # The main process's file is gone, as after a kill: what the other has kept is not measured again.
    (tmp_path / "damages.jsonl").unlink()
    assert shared_work.work(tmp_path)[2] == damages
    assert sorted(stored(tmp_path / "damages.jsonl")) == sorted(shares[0])


SMALL = [
    *(
        "assemble",
        "mini-sd",
        "--budget",
        "macs=0.9x",
        "--out",
        "out",
        "--device",
        "cpu",
        "--steps",
        "4",
        "--bands",
        "2",
    ),
    *("--calibration-prompts", "3", "--held-out-prompts", "2", "--probes", "1", "--repeats", "2"),
    *("--neighbours", "0"),
    *("--slot", "none", "--narrow", "none", "--refit", "none", "--finest", "unit"),
]


def test_the_command_runs_under_a_launcher_and_speaks_once(tmp_path):
    result = run(
        *LAUNCH, "-m", "asdm_compress", *SMALL, "--json", cwd=tmp_path, ASDM_COMPRESS_CACHE=str(tmp_path / "c")
    )
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)  # one object, of one process
    assert printed["recipe"]["evidence"]["measured"]["macs"] <= 0.9 * printed["recipe"]["evidence"]["teacher"]["macs"]
    cut = [edit["site"] for edit in printed["recipe"]["edits"] if edit["edit"] != "shared"]
    assert cut and not any(".transformer_blocks." in site for site in cut)
    assert "6 triples, 2 bands" in printed["recipe"]["provenance"]["calibration"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out"]
    kept = sorted(p.name for p in tmp_path.glob("c/measurements/*/damages*"))
    assert kept == ["damages_unfitted.1.jsonl", "damages_unfitted.jsonl"]


def test_an_error_of_one_process_ends_all_with_one_message(tmp_path):
    """The second process alone does not find the model."""
    (tmp_path / "program.py").write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[2] = 'nowhere.safetensors'\n"
        "from asdm_compress.cli.main import main\n"
        "main()\n"
    )
    result = run(*LAUNCH, "program.py", *SMALL, cwd=tmp_path, ASDM_COMPRESS_CACHE=str(tmp_path / "c"))
    assert result.returncode != 0
    # The launcher has more to say; of the program's own there is one line.
    assert [line for line in result.stderr.splitlines() if line.startswith("Error: ")] == [
        "Error: there is no file or folder nowhere.safetensors"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without accelerators is what it is about")
def test_processes_without_an_accelerator_of_their_own():
    assert Processes().device("auto") == "auto"
    assert Processes(1, 2, 1).device("auto") == Processes(1, 2, 1).device("cpu") == "cpu"
    with pytest.raises(AsdmError, match="more processes than the 0 accelerators") as caught:
        Processes(1, 2, 1).device("cuda")
    assert caught.value.exit_code == ExitCode.ENVIRONMENT


def test_items_are_dealt_out_and_no_share_is_like_another():
    shares = [Processes(rank, 3).share(range(10)) for rank in range(3)]
    assert shares == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize(("rank", "printed"), [("0", 1), ("1", 0)])
def test_other_commands_are_not_shared(tmp_path, rank, printed):
    result = run("-m", "asdm_compress", "recipes", "list", cwd=tmp_path, WORLD_SIZE="2", RANK=rank)
    assert result.returncode == (2 if printed else 0)
    assert result.stderr.count("only assemble, distill and evaluate can be shared") == printed
    assert result.stdout == ""
