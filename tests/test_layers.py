"""The layers of the design, read off the source: imports go down only, and files and functions stay small."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xfast"
BENCHMARKS = ROOT / "benchmarks"  # installed as xfast.benchmarks
CSRC = ROOT / "csrc"

# Lowest first. "Contracts" are the data that cross between a backend and the model layer above it: what an encoder is,
# what a packed batch is. A backend sees them and nothing else of a model.
LAYERS = ("kernels", "contracts", "backends", "model", "api", "applications")
LAYER_OF = {
    "_C": "kernels",
    "kernels": "kernels",
    "errors": "contracts",
    "threads": "contracts",
    "tensor_files": "contracts",
    "locks": "contracts",
    "architecture": "contracts",
    "packing": "contracts",
    "recipe": "contracts",
    "device_packing": "contracts",
    "backends": "backends",
    "options": "model",
    "heads": "model",
    "watch": "model",
    "calibration": "model",
    "truncation": "model",
    "outputs": "model",
    "quantization": "model",
    "quantization_reports": "model",
    "mixed_precision": "model",
    "trials": "model",
    "artifact": "model",
    "packed_model": "model",
    "tokenizer_files": "model",
    "attention_interface": "model",
    "training": "model",
    "plan": "model",
    "patch": "model",
    "compiled": "model",
    "head_patch": "model",
    "lm_head": "model",
    "explain": "model",
    "api": "api",
    "": "api",  # xfast/__init__.py
    "cli": "applications",
    "__main__": "applications",
    "demo": "applications",
    "encode": "applications",
    "engine": "applications",
    "export": "applications",
    "convert": "applications",
    "checkpoint": "applications",
    "machine": "applications",
    "files": "applications",
    "logs": "applications",
    "progress": "applications",
    "pages": "applications",
    "figures": "applications",
    "terminal": "applications",
    "benchmarks": "applications",
    "stilts": "applications",
    "study": "applications",
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def _modules() -> dict[str, Path]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in sorted(BENCHMARKS.glob("*.py")):
        modules["xfast.benchmarks" + ("" if path.stem == "__init__" else f".{path.stem}")] = path
    return modules


MODULES = _modules()


def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _known(name: str) -> bool:
    return name in MODULES or name in {"xfast._C", "xfast.kernels"}


def _imported(module: str) -> Iterator[str]:
    """Full names of the xfast modules that ``module`` imports, anywhere in it."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "xfast")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write the full name"
            if (node.module or "").split(".")[0] == "xfast":
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if _known(name) else str(node.module) for name in full)


def _layer(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    assert part in LAYER_OF, f"{module} belongs to no layer: add it to LAYER_OF"
    return LAYERS.index(LAYER_OF[part])


def test_the_source_is_found() -> None:
    assert {"xfast", "xfast.api", "xfast.patch", "xfast.backends.native", "xfast.benchmarks.peers"} <= MODULES.keys()
    assert "xfast.patch" in set(_imported("xfast.api")) and "xfast._C" in set(_imported("xfast.packing"))


@pytest.mark.parametrize("module", list(MODULES))
def test_imports_go_down_only(module: str) -> None:
    upward = [name for name in _imported(module) if _layer(name) > _layer(module)]
    assert not upward, f"{module} ({LAYERS[_layer(module)]}) imports from a layer above it"


def test_imports_have_no_cycles() -> None:
    graph = {module: set(_imported(module)) & MODULES.keys() for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_encoding_needs_no_other_application() -> None:
    """A worker of Ray's imports ``xfast.encode`` on every machine."""
    needed = {module for module in MODULES if module.startswith("xfast.encode")}
    while more := {name for module in needed for name in set(_imported(module)) & MODULES.keys()} - needed:
        needed |= more
    others = ("xfast.benchmarks", "xfast.demo", "xfast.stilts", "xfast.study")
    assert "xfast.api" in needed and not [name for name in needed if name.startswith(others)]


def _roots(module: str) -> set[str]:
    """Top-level names of everything that ``module`` imports."""
    roots = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    return roots


@pytest.mark.parametrize("module", [name for name in MODULES if _layer(name) < LAYERS.index("model")])
def test_backends_know_no_model_class(module: str) -> None:
    assert not _roots(module) & {"transformers", "sentence_transformers"}


def _reached(application: str) -> set[str]:
    """Modules of applications that this one imports, and those that they import."""
    todo, found = [name for name in MODULES if name.startswith(application)], set()
    while todo:
        name = todo.pop()
        if name not in found and name in MODULES and _layer(name) == LAYERS.index("applications"):
            found.add(name)
            todo += _imported(name)
    return found


# A package by the module that it holds; what transformers and torch import themselves; what is done without.
PACKAGES = {"faiss": "faiss-cpu"}
INDIRECT = {"protobuf", "safetensors", "sentencepiece", "tensorboard"}
DONE_WITHOUT = {"xfast.stilts": {"yaml"}, "xfast.study": {"datasets", "pynvml"}}  # transformers brings yaml


@pytest.mark.parametrize("application", list(DONE_WITHOUT))
def test_an_extra_has_what_its_application_imports(application: str) -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    always = {re.split("[><=]", name)[0] for name in project["dependencies"]} | sys.stdlib_module_names | {"xfast"}
    imported = set().union(*map(_roots, _reached(application))) - always - DONE_WITHOUT[application]
    extra = set(project["optional-dependencies"][application.split(".")[1]])
    assert {PACKAGES.get(name, name) for name in imported} == extra - INDIRECT


def _includes(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split(maxsplit=1)[1].strip('<>"') for line in lines if line.startswith("#include ")]


SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_kernels_know_neither_torch_nor_python(path: Path) -> None:
    includes = _includes(path)
    roots = {name.split("/")[0] for name in includes}
    assert not roots & {"torch", "ATen", "c10", "caffe2", "omp.h"}
    python = [name for name in includes if name.startswith("pybind11") or name == "Python.h"]
    at_the_boundary = path.parent == CSRC and (path.name.startswith("bindings") or path.name == "checks.h")
    assert not python or at_the_boundary, python


def test_the_boundary_is_found() -> None:
    assert any("pybind11/pybind11.h" in _includes(path) for path in SOURCES if path.name == "bindings.cpp")


@pytest.mark.parametrize(
    "path",
    [*MODULES.values(), *SOURCES, *sorted((ROOT / "tests").glob("*.py")), *sorted(BENCHMARKS.glob("*.c"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("module", list(MODULES))
def test_functions_stay_small(module: str) -> None:
    functions = [node for node in ast.walk(_tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert not {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}
