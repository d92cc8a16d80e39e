"""Documentation becomes clean prose, in a reproducible order, without repetition or machine paths."""

import json

import pytest

from megagpt.data.docs_corpus import collect_docs, default_roots
from megagpt.data.prose import prose_paragraphs
from megagpt.errors import DataError

PROSE = (
    "This function opens the file that is given and reads it until the end, so that the caller can use what is in it"
    " without having to know where it came from or how it was written to the disk in the first place"
)


def test_prose_is_unwrapped_and_freed_of_markup():
    text = "Return the :class:`~a.Thing` that is the\nfirst one in the ``list`` of all **known** things."
    assert prose_paragraphs(text) == ["Return the a.Thing that is the first one in the `list` of all known things."]


def test_typographic_marks_become_ascii():
    text = "The dictionary\u2019s keys are \u201calmost\u201d all that there is \u2014 or so it seems to be\u2026"
    assert prose_paragraphs(text + ".") == [
        'The dictionary\'s keys are "almost" all that there is - or so it seems to be....'
    ]


@pytest.mark.parametrize(
    "text",
    [
        ">>> print('this is not the prose that we are looking for in a text.')",
        "+-----+\n| the | a table that is made of words and of lines, to be left out |\n+-----+",
        "x = the_value(of, it); y = a_function(with_a, call_to={'it': 1}, and_more=[2, 3]).",
        "Der Text ist nicht englisch und soll deshalb auch nicht in die Sammlung aufgenommen werden.",
        "Short words only here.",
        "=====\nTitle\n=====",
        "```\nthis is code that reads as if it were the prose of the text, but is not.\n```",
        "Raises:\n    ValueError: if the value is not one of those that are known to the function.",
        "\u4f60\u597d the text of this one is in the end not all in the English that we want.",
    ],
)
def test_what_is_not_prose_is_left_out(text):
    assert prose_paragraphs(text) == []


def test_announcement_of_code_goes_with_it():
    end = "And this is the end of what there is to say about it."
    text = f"{PROSE}.\n\nThis is how it is used by all of the others::\n\n    f(x)[1] = 2\n\n{end}"
    assert prose_paragraphs(text) == [f"{PROSE}.", end]


GOOGLE = """Args:
    path (str, optional): the path of the file that is
        to be read. Defaults to None.
    n (int): count.
    mode: One of the modes that are known to the function"""
NUMPY = """path : str, optional
    The path of the file that is
    to be read. Defaults to None.
n : int
    count.
mode : {'a', 'b'}
    One of the modes that are known to the function"""
SPHINX = """:param str path: the path of the file that is
    to be read. Defaults to None.
:param n: count.
:param mode: One of the modes that are known to the function
:returns: something that is not a parameter at all"""


@pytest.mark.parametrize("text", [GOOGLE, NUMPY, SPHINX])
def test_parameters_become_lists(text):
    assert prose_paragraphs(text) == [
        "- path: The path of the file that is to be read. Defaults to None.\n"
        "- mode: One of the modes that are known to the function."
    ]


def test_a_note_is_no_parameter():
    text = "Note: this is a sentence that has to be kept as it is."
    assert all(not paragraph.startswith("- ") for paragraph in prose_paragraphs(text))


@pytest.fixture
def root(tmp_path):
    """A folder with two packages."""
    folder = tmp_path / "installed"
    for name in ("alpha", "alpha/tests", "beta", "beta-1.0.dist-info"):
        (folder / name).mkdir(parents=True)
    (folder / "alpha" / "__init__.py").write_text(f'"""{PROSE} of the package."""\nraise RuntimeError("imported")\n')
    (folder / "alpha" / "io.py").write_text(
        f'class Reader:\n    """{PROSE} of the class."""\n    def read(self):\n        """{PROSE} of the method."""\n'
        f'async def fetch():\n    """{PROSE} of the coroutine."""\ndef short():\n    """Too short to be kept."""\n'
    )
    (folder / "alpha" / "again.py").write_text(f'"""{PROSE} of the class."""\n')
    (folder / "alpha" / "broken.py").write_text('"""' + PROSE)
    (folder / "alpha" / "tests" / "test_it.py").write_text(f'"""{PROSE} of a test."""')
    (folder / "beta" / "guide.md").write_text(f"# Guide\n\n{PROSE} of the guide.\n")
    (folder / "beta" / "LICENSE.txt").write_text(f"{PROSE} of the license.\n")
    (folder / "beta-1.0.dist-info" / "METADATA").write_text(f"Name: beta\n\n{PROSE} of the description.\n")
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sources_of_documents(root, tmp_path):
    summary = collect_docs(tmp_path / "c.jsonl", roots=[root], workers=1)
    records = read(tmp_path / "c.jsonl")
    # The class's text stands in alpha.again too, which comes first; the second one is left out.
    assert {record["source"]: record["text"].removeprefix(PROSE) for record in records} == {
        "alpha/alpha": " of the package.",
        "alpha/alpha.again": " of the class.",
        "alpha/alpha.io:Reader.read": " of the method.",
        "alpha/alpha.io:fetch": " of the coroutine.",
        "beta/guide.md": " of the guide.",
        "beta/METADATA": " of the description.",
    }
    assert summary.num_documents == 6
    assert summary.num_bytes == sum(len(record["text"]) for record in records)
    assert str(tmp_path) not in (tmp_path / "c.jsonl").read_text()


def test_order_follows_the_seed_and_nothing_else(root, tmp_path):
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        collect_docs(tmp_path / name, roots=[root], seed=seed, workers=workers)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert sorted(a.splitlines()) == sorted(c.splitlines())


def test_size_is_limited(root, tmp_path):
    collect_docs(tmp_path / "all", roots=[root], workers=1)
    summary = collect_docs(tmp_path / "some", roots=[root], workers=1, max_mb=0.0005)
    assert 0 < summary.num_bytes <= 500
    assert (tmp_path / "all").read_bytes().startswith((tmp_path / "some").read_bytes())


def test_nothing_found(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no documentation text was found in"):
        collect_docs(tmp_path / "c.jsonl", roots=[tmp_path / "empty"], workers=1)
    assert not (tmp_path / "c.jsonl").exists()


def test_the_language_reference_is_read(tmp_path):
    [folder] = [path for root in default_roots() for path in root.glob("pydoc_data")]
    (tmp_path / "copy" / "pydoc_data").mkdir(parents=True)
    (tmp_path / "copy" / "pydoc_data" / "topics.py").write_bytes((folder / "topics.py").read_bytes())
    collect_docs(tmp_path / "c.jsonl", roots=[tmp_path / "copy"], workers=1)
    sources = {record["source"] for record in read(tmp_path / "c.jsonl")}
    assert {"pydoc_data/topics:assignment", "pydoc_data/topics:exceptions"} <= sources
