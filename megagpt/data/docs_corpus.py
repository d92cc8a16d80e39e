"""A corpus of real English text from what is installed anyway: documentation of Python and its packages.

Docstrings are read by parsing the sources, nothing is imported. Beside them: the language reference that ships as
`pydoc_data/topics.py`, the packages' long descriptions and their .rst, .md and .txt files. A paragraph that occurs
twice is kept once, so that a validation split does not repeat the training text.
"""

import ast
import gc
import hashlib
import inspect
import json
import multiprocessing
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megagpt.data.files import write_whole
from megagpt.data.order import keyed_permutation
from megagpt.data.progress import ByteProgress
from megagpt.data.prose import SHORTEST_DOCUMENT, prose_paragraphs
from megagpt.errors import DataError

_TEXT_SUFFIXES = (".rst", ".md", ".txt")
# Tests and vendored copies say little or say it twice; site-packages lies inside the standard library's folder.
_SKIPPED_FOLDERS = frozenset(
    [
        "test",
        "tests",
        "testing",
        "__pycache__",
        "_vendor",
        "vendor",
        "site-packages",
        "dist-packages",
        "node_modules",
        "licenses",
        "include",
        "lib2to3",
        "idlelib",
        "testdata",
    ]
)
_SKIPPED_STEMS = ("license", "licence", "copying", "notice", "authors", "top_level", "entry_points", "requirements")
_LARGEST_FILE = 2_000_000
_FILES_PER_TASK = 64

Document = tuple[str, list[str]]
"""Source and paragraphs."""


@dataclass(frozen=True)
class DocsSummary:
    """What was collected."""

    num_documents: int
    num_bytes: int
    num_files: int


def default_roots() -> list[Path]:
    """Folders of the standard library and of the installed packages of the running Python."""
    names = ("stdlib", "purelib", "platlib")
    return sorted({Path(sysconfig.get_path(name)).resolve() for name in names})


def collect_docs(
    output: str | Path,
    *,
    max_mb: float = 30.0,
    seed: int = 0,
    roots: Iterable[str | Path] | None = None,
    workers: int | None = None,
) -> DocsSummary:
    """Write documentation text as JSONL: {"text": ..., "source": "package/module:object"} a line.

    The same files and arguments give the same bytes, whatever `workers`.

    Args:
        output: the JSONL file.
        max_mb: stop at this many megabytes (10**6 bytes) of text.
        seed: order of the documents, and thereby which ones are kept.
        roots: folders to search; default: the standard library and the installed packages.
        workers: processes; default: as many as there are cores, at most 8.

    Raises:
        DataError: no text was found, or the output cannot be written.
    """
    folders = default_roots() if roots is None else [Path(root) for root in roots]
    files = [(str(root), name) for root in folders for name in _find_files(root)]
    documents = _without_repetition(sorted(_read_all(files, workers or min(8, os.cpu_count() or 1))))
    lines: list[bytes] = []
    num_bytes = 0
    for index in range(len(documents)):
        source, text = documents[keyed_permutation(index, len(documents), seed)]
        size = len(text.encode())
        if num_bytes + size > max_mb * 1e6:
            break
        num_bytes += size
        lines.append(json.dumps({"text": text, "source": source}).encode() + b"\n")
    if not lines:
        raise DataError(
            f"no documentation text was found in {', '.join(map(str, folders))} for max_mb={max_mb};"
            " run where Python's standard library has its sources, or raise max_mb"
        )
    write_whole(Path(output), b"".join(lines))
    return DocsSummary(len(lines), num_bytes, len(files))


def _find_files(root: Path) -> Iterator[str]:
    """Paths, relative to the root, of files that may hold documentation, sorted."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            stem, suffix = os.path.splitext(name.lower())
            wanted = suffix == ".py" or name == "METADATA" or suffix in _TEXT_SUFFIXES
            path = os.path.join(folder, name)
            if wanted and not stem.startswith(_SKIPPED_STEMS) and os.path.getsize(path) <= _LARGEST_FILE:
                yield os.path.relpath(path, root)


def _read_all(files: list[tuple[str, str]], workers: int) -> list[Document]:
    tasks = [files[at : at + _FILES_PER_TASK] for at in range(0, len(files), _FILES_PER_TASK)]
    documents: list[Document] = []
    with ByteProgress("reading", sum(os.path.getsize(os.path.join(*file)) for file in files)) as progress:
        if workers == 1:
            results: Iterable[tuple[list[Document], int]] = map(_read_files, tasks)
            for found, num_bytes in results:
                documents += found
                progress.advance(num_bytes)
        else:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for found, num_bytes in pool.imap_unordered(_read_files, tasks):
                    documents += found
                    progress.advance(num_bytes)
    return documents


def _read_files(files: list[tuple[str, str]]) -> tuple[list[Document], int]:
    """Documents of some files, and the bytes read."""
    documents: list[Document] = []
    num_bytes = 0
    collecting = gc.isenabled()
    # Syntax trees have no cycles; looking for them would take a third of the time.
    gc.disable()
    try:
        for root, name in files:
            content = Path(root, name).read_bytes()
            num_bytes += len(content)
            for source, text in _texts_of_file(Path(name), content):
                paragraphs = prose_paragraphs(text)
                if sum(map(len, paragraphs)) >= SHORTEST_DOCUMENT:
                    documents.append((source, paragraphs))
    finally:
        if collecting:
            gc.enable()
    return documents, num_bytes


def _texts_of_file(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Source and text of each piece of documentation in a file."""
    if path.suffix != ".py":
        text = content.decode("utf-8", errors="replace")
        if path.name == "METADATA":
            package = path.parent.name.split("-")[0]
            # The long description follows the headers.
            yield f"{package}/METADATA", text.partition("\n\n")[2]
        else:
            yield path.as_posix(), text
        return
    if b'"""' not in content and b"'''" not in content:
        return
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    package = module.partition(".")[0]
    try:
        with warnings.catch_warnings():
            # Invalid escapes in other people's strings.
            warnings.simplefilter("ignore")
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # Templates and files for other versions of Python.
        return
    if module == "pydoc_data.topics":
        yield from _topics(tree)
        return
    for name, text in _docstrings(tree, ""):
        yield f"{package}/{module}:{name}" if name else f"{package}/{module}", text


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str):
    """Qualified name and cleaned docstring of a node and of the classes and functions in it."""
    if (docstring := ast.get_docstring(node, clean=False)) and len(docstring) >= SHORTEST_DOCUMENT:
        yield name, inspect.cleandoc(docstring)
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}" if name else child.name)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Sections of the language reference: one dict from names to texts."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for key, value in ast.literal_eval(statement.value).items():
                yield f"pydoc_data/topics:{key}", value


def _without_repetition(documents: list[Document]) -> list[tuple[str, str]]:
    """Source and text of the documents, of whose paragraphs each is kept at its first place only."""
    seen: set[bytes] = set()
    kept: list[tuple[str, str]] = []
    for source, paragraphs in documents:
        new: list[str] = []
        for paragraph in paragraphs:
            digest = hashlib.sha256(paragraph.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                new.append(paragraph)
        if sum(map(len, new)) >= SHORTEST_DOCUMENT:
            kept.append((source, "\n\n".join(new)))
    return kept
