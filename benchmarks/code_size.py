# SPDX-License-Identifier: Apache-2.0
"""Print the size of the code: lines by folder, modules that one run imports, and the widest and longest functions.

python benchmarks/code_size.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT_MODULES = ("configuration", "merging", "layers", "modeling")
FOLDERS = ("experiments", "benchmarks", "tests", "space", "examples")


def count_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def count_arguments(function: ast.FunctionDef) -> int:
    """Count the arguments of a function, without self and cls."""
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len([argument for argument in named if argument.arg not in ("self", "cls")])


def count_code_lines(function: ast.FunctionDef) -> int:
    """Count the lines of a function, without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    return lines if docstring is None else lines - ((docstring.end_lineno or 0) - docstring.lineno + 1)


def imported_files(script: Path) -> set[Path]:
    """Return the repository's modules that a script imports, directly or indirectly, also inside functions."""
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
                if file.is_file() and file not in found:
                    found.add(file)
                    waiting.append(file)
    return found


def main() -> None:
    model_files = sorted(ROOT.glob("*_tome_perceiver.py"))
    checkpoint_files = [ROOT / f"{name}_tome_perceiver.py" for name in CHECKPOINT_MODULES]
    print(f"{len(model_files)} model files: {count_lines(model_files)} lines")
    print(f"files that run a checkpoint: {count_lines(checkpoint_files)} lines")
    own = [*ROOT.glob("*.py")]
    for folder in FOLDERS:
        files = sorted((ROOT / folder).rglob("*.py"))
        own += files if folder != "tests" else []
        print(f"{folder}: {count_lines(files)} lines")
    print(f"modules that run_glue.py imports: {len(imported_files(ROOT / 'run_glue.py'))}")
    nodes = [(path, node) for path in own for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    functions = [(path, node) for path, node in nodes if isinstance(node, ast.FunctionDef)]
    widest = max(functions, key=lambda each: count_arguments(each[1]))
    longest = max(functions, key=lambda each: count_code_lines(each[1]))
    for what, (path, node), count in (
        ("widest", widest, f"{count_arguments(widest[1])} arguments"),
        ("longest", longest, f"{count_code_lines(longest[1])} lines"),
    ):
        print(f"{what} function: {node.name} of {path.relative_to(ROOT)}, {count}")
    methods = {
        f"{node.name} of {path.relative_to(ROOT)}": sum(isinstance(each, ast.FunctionDef) for each in node.body)
        for path, node in nodes
        if isinstance(node, ast.ClassDef)
    }
    largest = {name: count for name, count in methods.items() if count > 15}
    print(f"classes of over 15 methods: {len(largest)}" + "".join(f"\n  {name}: {n}" for name, n in largest.items()))


if __name__ == "__main__":
    main()
