"""The recipe: which steps a document goes through, with their settings. Steps have a fixed order, that of `Recipe`.

A step is a section of its own, or `true` (with its defaults) or `false` (left out), as is one that is not written.
"""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Strict, ValidationError, field_validator, model_validator

from megagpt.errors import ConfigError
from megagpt.plan.load import apply_override, parse_yaml, read_yaml_mapping
from megagpt.plan.section import NonNegative, Positive, Section, inner_section
from megagpt.plan.wording import rule_of, suggestion

Share = Annotated[float, Field(ge=0, le=1)]
Texts = Annotated[tuple[str, ...], Strict(False)]
Grams = Annotated[tuple[Annotated[tuple[Positive, Share], Strict(False)], ...], Strict(False)]


LANGUAGES = re.findall(
    r"\w+",
    """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da
de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id
ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn
mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue
sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo
wa war wuu xal xmf yi yo yue zh
""",
)
"""What fastText's lid.176 knows."""


class Html(Section):
    """Turn HTML into text."""

    which: Literal["detect", "all"] = "detect"
    """`detect`: documents that are HTML by their looks; `all`: every document."""
    content: Literal["main", "all"] = "main"
    """`main`: the article, without menus and the like; `all`: whatever is visible."""


class Unicode(Section):
    """Mend characters."""

    fix_encoding: bool = True
    """Mend text that was decoded wrongly (`donâ€™t`), and HTML escapes outside of HTML."""
    form: Literal["NFC", "NFKC", "as_is"] = "NFC"
    """Unicode normal form of the text."""


class Whitespace(Section):
    """One kind of line end and space, none at line ends, no more than one empty line; nothing invisible."""

    collapse: bool = True
    """Make one space of several inside of a line (indentation stays)."""


class Length(Section):
    """Drop documents that are too short or too long."""

    min_characters: NonNegative = 1
    """Shorter documents are dropped."""
    max_characters: Positive | None = None
    """Longer documents are dropped; null: none."""


class Language(Section):
    """Drop documents in other languages (fastText's lid.176)."""

    keep: Texts = ("en",)
    """ISO 639 codes of the languages to keep."""
    min_score: Share = 0.65
    """Drop documents whose language is less certain than this."""

    @field_validator("keep")
    @classmethod
    def known(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse codes that no document can have."""
        if unknown := [code for code in keep if code not in LANGUAGES]:
            raise ValueError(f"{unknown[0]!r} is no code of a known language; use such as en, de or zh")
        return keep


class Quality(Section):
    """Drop what does not look like prose (Rae et al. 2021, arXiv 2112.11446, section A.1.1)."""

    min_words: NonNegative = 50
    """Fewest words."""
    max_words: Positive = 100_000
    """Most words."""
    min_mean_word_length: NonNegative = 3
    """Fewest characters per word in the mean."""
    max_mean_word_length: Positive = 10
    """Most characters per word in the mean."""
    max_symbols_per_word: Share = 0.1
    """Hash signs, or ellipses, per word."""
    max_bullet_lines: Share = 0.9
    """Share of lines that start with a bullet or dash."""
    max_ellipsis_lines: Share = 0.3
    """Share of lines that end with an ellipsis."""
    min_alphabetic_words: Share = 0.8
    """Share of words with a letter."""
    min_stop_words: NonNegative = 2
    """How many different ones of `stop_words` must occur; 0: none, for other languages than English."""
    stop_words: Texts = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Words that prose has."""


class Repetition(Section):
    """Drop documents that repeat themselves (Rae et al. 2021, arXiv 2112.11446, table A1). Shares are of the whole."""

    max_duplicate_lines: Share = 0.3
    """Share of lines that are copies of one before."""
    max_duplicate_paragraphs: Share = 0.3
    """Share of paragraphs that are copies of one before."""
    max_duplicate_line_characters: Share = 0.2
    """Share of characters in such lines."""
    max_duplicate_paragraph_characters: Share = 0.2
    """Share of characters in such paragraphs."""
    max_top_n_grams: Grams = ((2, 0.2), (3, 0.18), (4, 0.16))
    """Share of characters in the most frequent n-gram of words, as pairs [n, share]."""
    max_duplicate_n_grams: Grams = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    """Share of characters in n-grams of words that have occurred before, as pairs [n, share]."""


class C4(Section):
    """Rules of C4 (Raffel et al. 2020, section 2.2): bad lines go, some documents are dropped."""

    require_terminal_punctuation: bool = True
    """Remove lines that do not end with a full stop, question or exclamation mark, or quote."""
    min_words_per_line: NonNegative = 3
    """Remove lines with fewer words."""
    max_word_length: Positive = 1000
    """Remove lines with a longer word."""
    min_sentences: NonNegative = 5
    """Drop documents with fewer sentences in the lines that stay."""
    remove_citations: bool = True
    """Remove `[1]`, `[edit]` and `[citation needed]`."""
    remove_javascript_lines: bool = True
    """Remove lines that speak of JavaScript."""
    remove_policy_lines: bool = True
    """Remove lines with notices of cookies, privacy and terms of use."""
    drop_lorem_ipsum: bool = True
    """Drop documents with placeholder text."""
    drop_curly_brackets: bool = True
    """Drop documents with a curly bracket (code)."""


class Pattern(Section):
    """What else is to be masked."""

    regex: str
    """Regular expression of Python."""
    replacement: str
    """What to write instead."""

    @model_validator(mode="after")
    def compiles(self) -> "Pattern":
        """Try the expression, and the groups that the replacement names."""
        try:
            re.compile(self.regex)
            re.sub(f"{self.regex}|", self.replacement, "")
        except (re.error, IndexError) as error:
            raise ValueError(
                f"{self.regex!r} with replacement {self.replacement!r} is no regular expression of Python ({error})"
            ) from None
        return self


class PersonalData(Section):
    """Mask personal data."""

    emails: bool = True
    """Mask e-mail addresses."""
    ips: bool = True
    """Mask public IPv4 addresses."""
    email_replacement: str = "email@example.com"
    """What to write instead of an e-mail address."""
    ip_replacement: str = "192.0.2.1"
    """What to write instead of an address (this one is reserved for documentation, RFC 5737)."""
    patterns: Annotated[tuple[Pattern, ...], Strict(False)] = ()
    """More patterns, each with `regex` and `replacement`."""


class Evaluation(Section):
    """Drop documents that share a run of words with a text that models are evaluated on."""

    texts: Texts
    """Files, folders and globs of the same kinds as the inputs."""
    keys: Texts = ("text",)
    """Keys of the texts in them; each text counts by itself."""
    n_grams: Annotated[int, Field(ge=2)] = 13
    """Words in a run (letter case, punctuation, accents and digits set aside); shorter texts cannot be found."""


class ExactDuplicates(Section):
    """Keep the first of documents that are equal but for white space."""


class NearDuplicates(Section):
    """Keep the first of documents that are much alike (MinHash). Two with the share s of their n-grams in common are
    found with probability 1 - (1 - s^hashes_per_bucket)^buckets."""

    n_grams: Positive = 5
    """Words in an n-gram (letter case, punctuation, accents and digits set aside)."""
    buckets: Positive = 14
    """Number of buckets."""
    hashes_per_bucket: Positive = 8
    """Hashes that must agree in one bucket."""
    seed: NonNegative = 1
    """Of the hash functions."""


class Samples(Section):
    """Dropped documents that are kept to look at."""

    per_reason: NonNegative = 20
    """How many for each step and reason."""
    max_characters: Positive = 2000
    """Longer ones are cut."""


class Recipe(Section):
    """What is done with each document, in this order; null: not done."""

    html: Html | None = None
    unicode: Unicode | None = None
    whitespace: Whitespace | None = None
    length: Length | None = None
    language: Language | None = None
    quality: Quality | None = None
    repetition: Repetition | None = None
    c4: C4 | None = None
    personal_data: PersonalData | None = None
    evaluation: Evaluation | None = None
    exact_duplicates: ExactDuplicates | None = None
    near_duplicates: NearDuplicates | None = None
    samples: Samples = Samples()


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    files = resources.files("megagpt").joinpath("cleaning", "recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: of a shipped recipe, or path of a YAML file (recognised by a slash or the suffix .yaml/.yml).
        overrides: `step.key=value` texts that win over the file; values are read as YAML.

    Raises:
        ConfigError: there is no such recipe, or a key or value is wrong; all problems are reported at once.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        tree = read_yaml_mapping(Path(name))
    elif name in (shipped := recipe_names()):
        text = resources.files("megagpt").joinpath("cleaning", "recipes", f"{name}.yaml").read_text(encoding="utf-8")
        tree = parse_yaml(text, name)
    else:
        raise ConfigError(
            f"--recipe={name} is not a shipped recipe; use one of {', '.join(shipped)}, or a path of a YAML file"
            " (ending in .yaml)"
        )
    problems: list[str] = []
    for override in overrides:
        try:
            _switch_on(tree, override)
            apply_override(tree, override)
        except ConfigError as error:
            problems += error.problems
    source = f"{name} with the command line's overrides" if overrides else name
    recipe, found = _build(tree)
    problems += found
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    assert recipe is not None, "every finding of pydantic is worded"
    return recipe


def describe_keys() -> str:
    """All steps and settings, with defaults and meaning."""
    lines = []
    for step, field in Recipe.model_fields.items():
        section = inner_section(field)
        assert section is not None, "all steps are sections"
        lines.append(f"{step}: {' '.join((section.__doc__ or '').split())}")
        for key, inner in section.model_fields.items():
            default = "required" if inner.is_required() else f"default: {inner.default}"
            lines.append(f"  {step}.{key} ({default}): {' '.join((inner.description or '').split())}")
    return "\n".join(lines)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """All settings as plain values under `step.key`, and whether each step is done under `step`."""
    flat: dict[str, Any] = {}
    for step, section in recipe.model_dump(mode="json").items():
        flat[step] = section is not None
        flat |= {f"{step}.{key}": value for key, value in (section or {}).items()}
    return flat


def unflatten(flat: dict[str, Any]) -> Recipe:
    """The recipe that `flatten` made this of; other keys are passed over."""
    tree: dict[str, Any] = {step: {} for step in Recipe.model_fields if flat[step]}
    for key, value in flat.items():
        step, dot, name = key.partition(".")
        if dot and step in tree:
            tree[step][name] = value
    return Recipe.model_validate(tree)


def _switch_on(tree: dict[str, Any], override: str) -> None:
    """`near_duplicates.buckets=20` also changes a step that is written as `true` or `false`."""
    step, dot, _ = override.partition("=")[0].strip().partition(".")
    if dot and isinstance(tree.get(step), bool):
        tree[step] = {}


def _build(tree: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    sections: dict[str, Any] = {}
    problems = []
    for name, section in tree.items():
        if name not in Recipe.model_fields:
            problems.append(f"{name}: unknown step; {suggestion(str(name), list(Recipe.model_fields))}")
        elif section is None:
            problems.append(f"{name} is empty; write `true` (with its defaults), `false` (left out) or keys below it")
        elif isinstance(section, dict):
            sections[name] = section
        elif not isinstance(section, bool) or name == "samples":
            problems.append(f"{name}={section!r} must be true, false or a section with keys of its own")
        elif section:
            sections[name] = {}
    try:
        return Recipe.model_validate(sections), problems
    except ValidationError as error:
        return None, [*problems, *dict.fromkeys(_describe(finding, sections) for finding in error.errors())]


def _describe(finding: Any, sections: dict[str, Any]) -> str:
    step, *rest = map(str, finding["loc"])
    key = ".".join([step, *rest])
    if finding["type"] == "value_error":
        whole = sections[step][rest[0]] if rest else sections[step]
        return f"{'.'.join([step, *rest[:1]])}={whole!r}: {finding['ctx']['error']}"
    section = inner_section(Recipe.model_fields[step])
    assert section is not None, "all steps are sections"
    if finding["type"] == "missing":
        return f"{key} is missing; write it"
    if finding["type"] == "extra_forbidden" and len(rest) == 1:
        return f"{key}: unknown key; {suggestion(rest[0], list(section.model_fields))}"
    if finding["type"] == "extra_forbidden":
        return f"{key}: unknown key; {suggestion(rest[-1], list(Pattern.model_fields))}"
    if len(rest) > 1 and rest[0] in section.model_fields:
        field = section.model_fields[rest[0]]
        if field.annotation is Grams or get_args(field.annotation):
            return f"{step}.{rest[0]}={sections[step][rest[0]]!r}: {'.'.join(rest[1:])} must be {rule_of(finding)}"
    return f"{key}={finding['input']!r} must be {rule_of(finding)}"
