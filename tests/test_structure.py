"""Rules about the tree itself: sizes, names, docstrings, layers, quick commands and what a wheel must contain."""

import ast
import json
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, TOOLS = ROOT / "megagpt", ROOT / "tools"
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = sorted(TOOLS.glob("*.py"))
SLOW_LIBRARIES = ("torch", "deepspeed", "megatron", "transformers", "tokenizers", "pyarrow", "numpy")
DATA_COMMANDS = ("clean_data", "collect_docs", "inspect_data", "preprocess_data", "train_tokenizer")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_two_test_modules_have_one_name() -> None:
    """pytest imports them all by their names alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 40
    assert len(COMMANDS) > 5


@pytest.mark.parametrize("path", [*MODULES, *COMMANDS, *sorted((ROOT / "tests").rglob("*.py"))], ids=relative)
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_no_module_takes_the_name_of_a_standard_one() -> None:
    # `deepspeed megagpt/train.py` puts the package's folder first on the path: `import signal` must not find ours.
    names = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not names & sys.stdlib_module_names


def undocumented(path: Path) -> Iterator[str]:
    """Public functions, classes and methods of a file that have no docstring.

    Exempt is what says nothing new: members of a Protocol, single-statement properties and accessors of classes.
    """
    tree = ast.parse(path.read_text())
    if not ast.get_docstring(tree) and tree.body:
        yield "the module itself"
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.name
            if isinstance(node, ast.ClassDef) and not any(ast.unparse(base) == "Protocol" for base in node.bases):
                yield from (f"{node.name}.{method}" for method in undocumented_methods(node))


def undocumented_methods(class_node: ast.ClassDef) -> Iterator[str]:
    for node in class_node.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_") and not ast.get_docstring(node):
            is_trivial = len(node.body) == 1 and isinstance(node.body[0], ast.Return)
            if not is_trivial:
                yield node.name


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    assert list(undocumented(path)) == []


def test_the_docstring_check_finds_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "class Open:\n    def run(self):\n        x = 1\n        return x\n\n\ndef go(): ...\ndef _hidden(): ...\n"
    )
    assert list(undocumented(path)) == ["the module itself", "Open", "Open.run", "go"]


# Runs a command's main module with --help and tells, on its last line, which slow libraries that has loaded.
PROBE = """
import runpy, sys
path, slow = sys.argv[1], sys.argv[2].split(",")
sys.argv = [path, "--help"]
try:
    runpy.run_path(path, run_name="__main__")
finally:
    print("loaded:", *[name for name in slow if name in sys.modules])
"""


@pytest.mark.parametrize("path", [*COMMANDS, PACKAGE / "train.py"], ids=relative)
def test_help_comes_at_once(path: Path) -> None:
    command = [sys.executable, "-c", PROBE, str(path), ",".join(SLOW_LIBRARIES)]
    started = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    seconds = time.monotonic() - started
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")
    loaded = result.stdout.splitlines()[-1].split()
    assert loaded[0] == "loaded:"
    assert set(loaded[1:]) <= ({"numpy"} if path.stem in DATA_COMMANDS else set())
    assert seconds < 10  # on a busy machine; alone about half a second, with torch some five


def test_import_contracts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlinter.application.use_cases import lint_imports
    from importlinter.configuration import configure

    configure()
    monkeypatch.chdir(ROOT)
    # it prints what is broken, and pytest shows that
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None)


def test_every_module_has_a_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (contract for contract in settings["contracts"] if contract["type"] == "layers")
    assert layers["exhaustive"] is True
    placed = {name.strip() for layer in layers["layers"] for name in layer.split("|")}
    top = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert placed == top - {"__init__"}


def test_an_installed_package_finds_its_files() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["megagpt"]
    packaged = {path for pattern in data for path in PACKAGE.glob(pattern)}
    others = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
    assert packaged == others
    assert {"py.typed", "llama3-8b.yaml"} <= {path.name for path in packaged}


def test_shipped_deepspeed_configs_are_objects() -> None:
    configs = sorted((ROOT / "ds_configs").glob("*.json"))
    assert configs
    for path in configs:
        assert isinstance(json.loads(path.read_text()), dict), path
