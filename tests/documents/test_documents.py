# SPDX-License-Identifier: Apache-2.0
"""Tests of the pages, and of the checks that `make docs-check` makes."""

from __future__ import annotations

import re

import pytest

from tests.documents.commands import check_block, check_command, check_python, docstring_commands, spell_commands
from tests.documents.pages import ROOT, Block, Page, all_pages

PAGES = all_pages()
# Pages of the guide; results pages may be longer.
GUIDE = [page for page in PAGES if page.path.parent == ROOT / "docs"]
PAGE_LINES = 150
SCRIPTS = [
    path
    for pattern in ("*.py", "examples/**/*.py", "benchmarks/*.py", "space/*.py", "tests/**/__main__.py")
    for path in sorted(ROOT.glob(pattern))
    if docstring_commands(path)
]


def named(page: Page) -> str:
    return str(page.path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_commands_of_a_page_are_right(page):
    assert page.broken_links() == []
    assert [f"{block.place}: {mistake}" for block in page.blocks for mistake in check_block(block)] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_docstring_are_right(script):
    assert [mistake for command in docstring_commands(script) if (mistake := check_command(command))] == []


@pytest.mark.parametrize("page", GUIDE, ids=named)
def test_a_page_of_the_guide_is_short_and_in_the_index(page):
    if page.path.name == "reliability.md":  # its tables are written by `make reliability`
        return
    assert len(page.path.read_text().splitlines()) <= PAGE_LINES
    assert page.path.name in ("index.md", *re.findall(r"[\w.]+\.md", (ROOT / "docs/index.md").read_text()))


def test_bash_expands_loops_and_variables():
    loop = 'for seed in 1 2; do\nHF_HUB_OFFLINE=1 python a.py --seed $seed $more \\\n --text "b c"; done && make x'
    text = 'more="--r 1 2"\n' + loop
    assert spell_commands(text) == [
        ["python", "a.py", "--seed", "1", "--r", "1", "2", "--text", "b c"],
        ["python", "a.py", "--seed", "2", "--r", "1", "2", "--text", "b c"],
        ["make", "x"],
    ]
    with pytest.raises(ValueError, match="syntax error"):
        spell_commands("for a in b; do python a.py")


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("run_glue.py --flop_ratio 0.6 --output_dir x", "run_glue.py: --flop_ratio: unknown argument"),
        ("run_image.py --merge_method ward2 --output_dir x", "run_image.py: --merge_method"),
        ("calibrate.py", "calibrate.py: no such script"),
        ("examples/digits_dataset.py --output x", "examples/digits_dataset.py: "),
        ("-m tests.documents --page x", "tests/documents/__main__.py: "),
    ],
)
def test_a_wrong_command_is_found(command, mistake):
    found = check_command(["python", *command.split()])
    assert found is not None and found.startswith(mistake)
    assert check_command(["timeout", "9", "python", *command.split()]) == found


def test_a_wrong_target_config_or_import_is_found():
    assert check_command(["make", "demos"]) == "make has no target demos"
    launch = ["accelerate", "launch", "--config_file", "examples/none.yaml", "run_glue.py"]
    assert check_command(launch) == "examples/none.yaml: no such file"
    assert check_python("from merging_tome_perceiver import Match, Missing") == [
        "merging_tome_perceiver has no Missing"
    ]
    assert check_block(Block(ROOT / "a.md", 1, "python", "a b"))
    assert not check_block(Block(ROOT / "a.md", 1, "python", "a b", mark="commit"))


def test_marks_links_and_anchors_are_read(tmp_path):
    (tmp_path / "a.md").write_text(
        "# A `b`, c!\n\n## Same\n\n## Same\n\n[x](#a-b-c) [x](#same-1) [x](#none) [x](none.md) [x](https://a.b/c)\n\n"
        "<!-- run: F=tiny/x O=out\nmkdir y\n-->\n```bash\nls F O\n```\n\n<!-- commit: abc -->\n```bash\nls\n```\n"
    )
    page = Page(tmp_path / "a.md")
    assert page.broken_links() == ["#none", "none.md"]
    runnable, old = page.blocks
    assert (runnable.mark, runnable.program) == ("run", "mkdir y\nls tiny/x out\n")
    assert (old.mark, old.replacements) == ("commit", ())
