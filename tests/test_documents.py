"""README and guides: every figure comes from the results, every command and link is a real one."""

from __future__ import annotations

import re
import shlex

import pytest
import typer.main
import write_documents
from documents import figures as figures_module
from write_documents import DOCUMENTS, MARKED, OLDER, TOP, figures, written

from asdm_compress.cli.main import app

# A measured figure: a ratio with three digits, or a number with one of the units that the benches write. Intervals of
# 95 % are a method.
FIGURE = re.compile(
    r"\d\.\d{3,}x|\d\.\d+e-\d+|(?<!\d)(?!95 %)\d+(?:\.\d+)? ?%"
    r"|\d+(?:\.\d+)? ?(?:dB|[GM]i?B|[GM]MACs|ms|s|seconds|minutes|hours|times|points?|[GM]|million)\b"
)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
COMMAND = re.compile(r"(?:\.venv/bin/)?asdm-compress ([^`\n&|]+)")
# In prose a command may be named with an ellipsis, or with several choices of an option's value.
OPEN = re.compile(r"…|\||\[|FOLDER|\)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_shows_what_the_results_hold(path):
    assert written(path) == path.read_text(encoding="utf-8"), "run python tools/write_documents.py"
    said = CODE.sub("", MARKED.sub("", path.read_text(encoding="utf-8")))
    assert FIGURE.findall(said) == []


def test_a_changed_figure_is_noticed(tmp_path):
    for path in DOCUMENTS:
        for match in MARKED.finditer(path.read_text(encoding="utf-8")):
            assert match["name"] in figures()
    changed = tmp_path / "changed.md"
    changed.write_text("It took <!-- results: main_job_duration -->1 second<!-- /results -->.", encoding="utf-8")
    assert written(changed) != changed.read_text(encoding="utf-8")
    changed.write_text("<!-- results: nothing_like_it -->1<!-- /results -->", encoding="utf-8")
    with pytest.raises(KeyError):
        written(changed)


def test_figures_of_other_weights_of_the_bundled_model_say_so(tmp_path, monkeypatch):
    document = tmp_path / "document.md"
    document.write_text("It took <!-- results: main_job_duration -->1 second<!-- /results -->.", encoding="utf-8")
    kept = figures_module.results("assemble_mini_sd")
    monkeypatch.setattr(figures_module, "bundled_weights", lambda: kept["mini_sd"])
    assert OLDER not in written(document)
    monkeypatch.setattr(figures_module, "bundled_weights", lambda: "others")
    assert f" minutes ({OLDER})" in written(document)
    document.write_text("<!-- results: programs -->\n\n<!-- /results -->", encoding="utf-8")
    assert OLDER not in written(document)  # nothing of it is measured


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_is_one(path):
    """Names and options of every command are parsed by the command itself, which is not run."""
    program = typer.main.get_command(app)
    text = path.read_text(encoding="utf-8")
    found = [line for line in COMMAND.findall(text) if not OPEN.search(line)]
    for line in found:
        words = shlex.split(line.split(" #")[0])
        command, rest = program.commands[words[0]], words[1:]
        while hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(words[0], rest)
    assert found or path.name != "README.md"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_into_the_repository_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
    assert write_documents.TOP == TOP
