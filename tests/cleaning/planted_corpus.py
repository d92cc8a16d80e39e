"""A corpus with known faults: prose made up from word lists, and documents that some step must find."""

import json
import random
import re
from pathlib import Path

NOUNS = """river captain lantern garden engine window market letter winter bridge teacher island farmer castle forest
doctor station harbour village painter mountain sailor library kitchen soldier orchard shepherd theatre railway compass
merchant valley carpenter fountain bakery schooner meadow tower museum tailor""".split()
ADJECTIVES = """old quiet bright narrow heavy distant gentle broken golden hidden curious northern patient wooden silver
careful empty ancient friendly bitter crooked famous humble modern""".split()
VERBS = """watched remembered crossed repaired painted followed visited described forgot admired measured carried opened
guarded borrowed sketched praised avoided searched studied""".split()
SENTENCES = [
    "The {a} {n} {v} the {a} {n}.",
    "Nobody had {v} a {n} like that {a} {n} before.",
    "In the {n} that they have {v}, every {n} was {a} to see.",
    "With a {a} {n}, one of the {n}s {v} her {n}.",
    "It was the {n} of his {a} {n} and it had to be {v}.",
    "Some say that this {n} {v} my {a} {n} and your {n}.",
    "Why should {a} people have {v} any {n}?",
    "After the {n}, we {v} both the {n} and a {a} {n}.",
    "Another {a} {n}, {v} by its {n}, came to be {a}.",
]


def prose(seed: int, sentences: int = 18) -> str:
    """Paragraphs of an English kind, told apart by the seed."""
    rng = random.Random(seed)

    words = {"{n}": NOUNS, "{a}": ADJECTIVES, "{v}": VERBS}

    def sentence() -> str:
        return re.sub(r"\{.\}", lambda found: rng.choice(words[found[0]]), rng.choice(SENTENCES))

    made = [sentence() for _ in range(sentences)]
    half = sentences // 2
    return " ".join(made[:half]) + "\n\n" + " ".join(made[half:])


GERMAN = (
    "Der alte Kapitän ging am Morgen durch den Hafen und sah den Schiffen nach, die langsam in den Nebel fuhren. "
    "Niemand wusste, wohin die Reise gehen sollte, und doch hatte jeder eine Ahnung davon. Im Garten hinter dem Haus "
    "standen noch die Körbe vom Abend, und die Kinder spielten mit den Äpfeln. Später kam ein Brief aus der Stadt, den "
    "die Lehrerin laut vorlas, während draußen der Regen gegen die Fenster schlug. Am Ende blieb nur die Frage, ob man "
    "die Brücke noch vor dem Winter bauen könne. Der Bürgermeister versprach es, aber er versprach vieles."
)
QUESTION = "Which of the seven lighthouses on the southern coast was built first by the guild of the harbour masons?"


def planted() -> dict[str, dict]:
    """Records by what is the matter with them, in their order among 30 good ones."""
    page = (
        "<!DOCTYPE html><html><head><title>T</title><script>var spy = 1;</script><style>p {color: red}</style></head>"
        "<body><nav><ul><li><a href='/'>Home</a></li><li><a href='/shop'>Our shop</a></li></ul></nav><main><article>"
        + "".join(f"<p>{part}</p>" for part in prose(100).split("\n\n"))
        + "</article></main><footer><a href='/imprint'>Imprint</a></footer></body></html>"
    )
    lines = prose(111).replace("\n\n", " ").split(". ")
    near = prose(5).replace("The ", "A ", 1)
    texts = {
        "page": page,
        "mojibake": prose(101) + " The captain didn\u00e2\u20ac\u2122t say a word about the caf\u00c3\u00a9.",
        "spaces": prose(102).replace(" ", "\u00a0", 3).replace(". ", ".  \t", 2).replace("\n", "\r\n") + "   \n\n\n\n",
        "german": GERMAN,
        "short": "This is the note of a traveller who came to our village by the evening train, with nothing but an"
        " umbrella and a heavy suitcase. He asked for rooms, and slept well.",
        "repeated lines": "\n".join(["The same line stands here again and again, that is to be found."] * 20),
        "repeated words": ". ".join([*lines[:9], " ".join(lines[:9]).lower(), " ".join(lines[9:])]),
        "bullets": "\n".join(f"- {line}." for line in lines),
        "code": prose(103) + "\n\nint main(void) { return 0; }",
        "cookies": prose(104)
        + "\nThis site uses cookies to make your visit better.\nEnable JavaScript to see all of it.",
        "personal": prose(105)
        + " Write to jane.doe@mail.example.net or to 8.8.8.8, and not to 192.168.0.1 or v1.2.3.4.5.",
        "exact": prose(3).replace(" ", "  ", 5) + "\n",
        "near": near,
        "contaminated": prose(106) + " " + QUESTION.lower().replace("?", "!"),
        "empty": "  \n",
    }
    return {name: {"id": name, "text": text, "meta": {"n": 1, "ü": [1.5, None]}} for name, text in texts.items()}


def records() -> list[dict]:
    """The whole corpus, in order."""
    good = [{"id": f"good {seed}", "text": prose(seed), "big": 2**70 + seed} for seed in range(30)]
    return good + list(planted().values())


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
