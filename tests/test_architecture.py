"""The layers of the package: who may import whom, which library a layer may use, and how large the code may be."""

from __future__ import annotations

import ast
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hpsearch"
MAX_FILE_LINES = 400
MAX_CLASS_LINES = 250
MAX_CODE_LINES = 13_430
"""Of the whole package. The goal is 12,000; lower this number when code goes."""


@dataclass(frozen=True)
class Layer:
    """One row of the table: packages or modules, and the libraries that they may import."""

    names: tuple[str, ...]
    libraries: tuple[str, ...] = ()


LAYERS = (
    Layer(("errors", "paths", "user_files", "cores", "subprocesses", "typed_json", "views")),
    Layer(("config",), ("tomli_w",)),
    Layer(("models",), ("torch",)),
    Layer(
        ("data",),
        ("numpy", "torch", "torchvision", "PIL", "sklearn", "scipy", "psutil", "filelock", "requests", "urllib3"),
    ),
    Layer(("training",), ("numpy", "torch", "torch_xla", "safetensors")),
    Layer(("stats",), ("numpy", "scipy")),
    Layer(("store",), ("numpy", "filelock")),
    Layer(("inference",), ("numpy", "scipy", "torch", "PIL", "pandas", "onnxruntime")),
    Layer(("workers",), ("numpy", "torch", "psutil", "distributed")),
    Layer(("search",), ("numpy", "scipy", "optuna", "sqlalchemy")),
    Layer(("report",), ("numpy", "scipy", "matplotlib", "jinja2")),
    Layer(("tracking",), ("numpy", "mlflow", "sqlalchemy", "filelock", "torch")),
    Layer(("study",)),
    Layer(("final",), ("numpy",)),
    Layer(("cli", "__main__"), ("click", "rich")),
)
"""From the lowest to the highest. A module imports from its own layer and from lower ones."""
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
"""All modules but the package itself, which leads to the public functions and says the version."""


def _name(path: Path) -> str:
    """Return the dotted name of a module, without the package's own."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_name(path) for path in ROOT.rglob("*.py")}


def _imports(path: Path) -> Iterator[str]:
    """Yield the full name of each module that a file imports, in functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in submodules if name.removeprefix("hpsearch.") in MODULES]
            yield from found or [node.module]


def _layer(module: str) -> int:
    top = module.partition(".")[0]
    return next(index for index, layer in enumerate(LAYERS) if top in layer.names)


def _own_imports(path: Path) -> set[str]:
    """Return the modules of hpsearch that a file imports, without the package itself."""
    return {name.removeprefix("hpsearch.") for name in _imports(path) if name.startswith("hpsearch.")}


def upward_imports(path: Path) -> set[tuple[str, str]]:
    """Return (module, imported) for every import of a higher layer."""
    module = _name(path)
    return {(module, other) for other in _own_imports(path) if _layer(other) > _layer(module)}


def package_cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return the packages of one cycle in order, or an empty list."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return trail[trail.index(name) :]
        if name not in done:
            for other in edges.get(name, ()):
                if cycle := visit(other, [*trail, name]):
                    return cycle
            done.add(name)
        return []

    return next((cycle for name in edges if (cycle := visit(name, []))), [])


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_module_imports_no_higher_layer(path: Path) -> None:
    found = upward_imports(path)
    assert not found, f"{found}: move the shared part to a lower layer, or pass it in as an argument"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_layer_imports_only_its_libraries(path: Path) -> None:
    libraries = {name.partition(".")[0] for name in _imports(path)} - {"hpsearch"} - set(sys.stdlib_module_names)
    assert libraries <= set(LAYERS[_layer(_name(path))].libraries)


def test_the_graph_of_packages_has_no_cycle() -> None:
    edges: dict[str, set[str]] = {}
    for path in FILES:
        top = _name(path).partition(".")[0]
        edges.setdefault(top, set()).update(other.partition(".")[0] for other in _own_imports(path))
        edges[top].discard(top)
    assert package_cycle(edges) == []
    assert package_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_classes_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    long = [node.name for node in classes if (node.end_lineno or 0) - node.lineno + 1 > MAX_CLASS_LINES]
    assert not long


def _code_lines(path: Path) -> set[int]:
    """Return the numbers of the lines with code: not blank, no comment, no docstring."""
    texts = [node.value for node in ast.walk(_tree(path)) if isinstance(node, ast.Expr)]
    docstrings = [each for each in texts if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in NO_CODE]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return lines - {line for each in docstrings for line in range(each.lineno, (each.end_lineno or 0) + 1)}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


NO_CODE = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
)


def test_the_package_and_its_functions_stay_small() -> None:
    code = {path: _code_lines(path) for path in ROOT.rglob("*.py")}
    assert sum(map(len, code.values())) <= MAX_CODE_LINES
    sizes = sorted(
        len(lines & set(range(node.lineno, (node.end_lineno or 0) + 1)))
        for path, lines in code.items()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef)
    )
    assert sizes[len(sizes) // 2] <= 10
    assert sizes[len(sizes) * 9 // 10] <= 30


def test_the_tests_are_as_long_as_the_package() -> None:
    in_tests, in_package = (
        sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))
        for folder in (Path(__file__).parent, ROOT)
    )
    assert in_tests >= in_package


def test_lines_of_code_are_counted_without_docstrings_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('"""Doc."""\n\n# comment\nx = 1\n"""About x."""\ny = (\n    2,\n)\n')
    assert _code_lines(path) == {4, 6, 7, 8}
