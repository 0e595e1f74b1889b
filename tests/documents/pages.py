# SPDX-License-Identifier: Apache-2.0
"""Read the pages of the repository: code blocks with their marks, links, and anchors.

A mark is an HTML comment before a block, which a reader of the rendered page does not see:

  <!-- run: FOLDER=tiny/mrpc OUT=outputs/merged
  code that runs before the block
  -->
  <!-- commit: ab915f5 -->

`run` marks a block that `python -m tests.documents` runs, after it replaced each left-hand word by its right-hand one.
`commit` marks a block that needs the code of that commit, and is not checked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md", "space/*.md")
MARK = re.compile(r"<!--\s*(run|commit):([^\n]*?)(?:\n(.*))?-->", re.DOTALL)
ANCHOR_TAG = re.compile(r"""<a\s+(?:id|name)=["']([^"']+)["']""")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page, line: where the block is.
        language: word behind the fence, such as "bash" or "python".
        text: the code.
        mark: "run", "commit" or "".
        replacements: words to replace before the block runs, each with its replacement.
        before: code that runs before the block.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    replacements: tuple[tuple[str, str], ...] = ()
    before: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page}:{self.line}"

    @property
    def program(self) -> str:
        """The code to run: `before`, then the block with its words replaced."""
        text = self.text
        for word, replacement in self.replacements:
            text = text.replace(word, replacement)
        return f"{self.before}\n{text}"


class Page:
    """A Markdown page."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def blocks(self) -> list[Block]:
        return [
            _marked(Block(self.path, token.map[0] + 1, token.info.strip(), token.content), before)
            for before, token in zip([None, *self.tokens], self.tokens, strict=False)
            if token.type == "fence" and token.map
        ]

    @cached_property
    def anchors(self) -> set[str]:
        """Anchors that GitHub gives the headings, and those of `<a id=...>`."""
        found: Counter[str] = Counter()
        anchors = set()
        for heading, content in zip(self.tokens, self.tokens[1:], strict=False):
            if heading.type == "heading_open":
                slug = _slug("".join(child.content for child in content.children or ()))
                anchors.add(f"{slug}-{found[slug]}" if found[slug] else slug)
                found[slug] += 1
        html = (token.content for token in _walk(self.tokens) if token.type in ("html_block", "html_inline"))
        return anchors | {name for text in html for name in ANCHOR_TAG.findall(text)}

    @cached_property
    def links(self) -> list[str]:
        """Targets of all links and images."""
        attributes = {"link_open": "href", "image": "src"}
        return [str(token.attrGet(attributes[token.type])) for token in _walk(self.tokens) if token.type in attributes]

    def broken_links(self) -> list[str]:
        """Return the links to files of the repository, or to anchors in its pages, that do not exist."""
        return [link for link in self.links if not self._exists(link)]

    def _exists(self, link: str) -> bool:
        if re.match(r"[a-z]+:", link):
            return True
        path, _, anchor = unquote(link).partition("#")
        target = (self.path.parent / path).resolve() if path else self.path
        if not anchor:
            return target.exists()
        return target.suffix == ".md" and target.exists() and anchor in Page(target).anchors


def all_pages() -> list[Page]:
    return [Page(path) for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})]


def _marked(block: Block, before: Token | None) -> Block:
    """Return the block with the mark in the token before it, if there is one."""
    match = MARK.search(before.content) if before is not None and before.type == "html_block" else None
    if match is None:
        return block
    kind, words, code = match.groups()
    pairs = tuple((word, replacement) for word, _, replacement in (pair.partition("=") for pair in words.split()))
    return Block(
        block.page, block.line, block.language, block.text, kind, pairs if kind == "run" else (), (code or "").strip()
    )


def _slug(heading: str) -> str:
    """Return GitHub's anchor of a heading: lower case, without punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _walk(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _walk(token.children or [])
