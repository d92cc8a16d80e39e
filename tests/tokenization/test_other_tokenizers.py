"""tokenizer.json and tiktoken files: ids as their own libraries give them, declarations, exports and faults."""

import base64
import json

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megagpt.convert.family import TokenIds
from megagpt.convert.tokenizer import export_tokenizer
from megagpt.errors import ConversionError, DataError
from megagpt.tokenization.tokenizer import Tokenizer

END, START, PAD = "<|endoftext|>", "<|start|>", "<|pad|>"
TEXTS = [f"The quick brown fox number {i}'s jumps over\n\n    the lazy dog, {i * 7} times. Ünïcödé" for i in range(200)]
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s+(?!\S)|\s"
ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from([END, "</s>", "fox", " ", "  ", "\n", "\n \n", "it's", "12345", "漢", "🙂"])).map("".join),
)
SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_config(folder, **entries):
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))


def write_hf(folder, *, config, template=None):
    """A byte-level BPE of 400 tokens and three special ones."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, START, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(START, 1), (END, 0)])
    tokenizer.enable_truncation(5)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        write_config(folder, tokenizer_class="PreTrainedTokenizerFast", **config)
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_hf(
        tmp_path_factory.mktemp("hf"), config={"eos_token": {"__type": "AddedToken", "content": END}, "pad_token": PAD}
    )


def write_ranks(path):
    """Ranks of a BPE: the bytes, then merged pairs in the order of merging."""
    ranks = tiktoken._educational.bpe_train("\n".join(TEXTS[:40]), vocab_size=330, pat_str=PATTERN, visualise=None)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    import tiktoken._educational

    folder = tmp_path_factory.mktemp("ranks")
    found = write_ranks(folder / "own.tiktoken")
    # An id between the ranks and the special tokens stands for nothing, as in cl100k_base.
    special = {END: 331, START: 332}
    write_config(folder, pat_str=PATTERN, special_tokens=special, eos_token=END)
    reference = tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=found, special_tokens=special)
    return Tokenizer.load(folder / "own.tiktoken"), reference


def test_hf_attributes(hf):
    tokenizer = Tokenizer.load(hf)
    assert (tokenizer.kind, tokenizer.path) == ("huggingface", hf / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (400, 0, None, 2)
    assert tokenizer.special_tokens == {END: 0, START: 1, PAD: 2}
    assert Tokenizer.load(hf / "tokenizer.json").sha256 == tokenizer.sha256


@SLOW
@given(ANY_TEXT)
def test_hf_gives_the_ids_of_transformers(hf, text):
    tokenizer, reference = _loaded(hf)
    ids = tokenizer.encode(text)
    assert ids == reference(text)["input_ids"]
    assert tokenizer.encode_batch([text, "x"], threads=2)[0] == ids
    assert tokenizer.codec.encode_arrays([text], 1)[0].tolist() == ids
    assert tokenizer.decode(ids) == text.replace(END, "")


def _loaded(folder, cache={}):  # noqa: B006  # a cache
    if folder not in cache:
        cache[folder] = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    return cache[folder]


@pytest.mark.parametrize(
    ("config", "template", "expected"),
    [
        ({"split_special_tokens": True}, None, None),
        ({}, f"{START} $A {END}", (1, 0)),
        ({"bos_token": START, "add_bos_token": True}, f"$A {END}", (None, 0)),
    ],
)
def test_what_is_declared_is_followed(tmp_path, config, template, expected):
    folder = write_hf(tmp_path / "t", config={"eos_token": END, **config}, template=template)
    tokenizer, reference = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("", "the fox", f"a{END}b"):
        assert tokenizer.encode(text) == reference(text)["input_ids"]
    before, behind = expected or (None, None)
    assert (tokenizer.encode("fox")[0] == 1, tokenizer.encode("fox")[-1] == 0) == (before == 1, behind == 0)


def test_a_declaration_is_part_of_the_fingerprint(tmp_path):
    folder = write_hf(tmp_path / "t", config={"eos_token": END})
    first = Tokenizer.load(folder).sha256
    write_config(folder, eos_token=START)
    assert (Tokenizer.load(folder).eod_id, Tokenizer.load(folder).sha256 == first) == (1, False)
    write_config(folder, eos_token=END, model_max_length=5)
    assert Tokenizer.load(folder).sha256 == first


def test_without_declarations_a_known_end_is_taken(tmp_path):
    folder = write_hf(tmp_path / "t", config=None)
    assert Tokenizer.load(folder).eod_id == 0
    exported = tmp_path / "out"
    exported.mkdir()
    assert export_tokenizer(folder, exported, 400, 64).ids == TokenIds(None, 0, None)
    assert AutoTokenizer.from_pretrained(exported).eos_token == END


def test_hf_export_is_the_same_tokenizer(hf, tmp_path):
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    assert export_tokenizer(hf, tmp_path, 400, 64).ids == TokenIds(None, 0, 2)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert (exported.eos_token_id, exported.pad_token_id, exported.chat_template) == (0, 2, "{{ messages }}")
    for text in TEXTS[:20]:
        assert exported(text)["input_ids"] == Tokenizer.load(hf).encode(text)
    assert Tokenizer.load(tmp_path).sha256 == Tokenizer.load(hf).sha256
    with pytest.raises(ConversionError, match=r"has 400 tokens but model\.vocab_size=399"):
        export_tokenizer(hf, tmp_path, 399, 64)


def test_tiktoken_attributes(ranks):
    tokenizer, _ = ranks
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eod_id) == ("tiktoken", 333, 331)
    assert tokenizer.special_tokens == {END: 331, START: 332}
    assert tokenizer.decode([331, *tokenizer.encode("fox"), 330]) == "fox"


@SLOW
@given(ANY_TEXT)
def test_tiktoken_gives_its_ids(ranks, text):
    tokenizer, reference = ranks
    ids = tokenizer.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert tokenizer.encode_batch([text, "x"], threads=2)[0] == ids
    assert tokenizer.codec.encode_arrays([text], 1)[0].tolist() == ids
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def exported_ranks(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    assert export_tokenizer(ranks[0].path, folder, 333, 64).ids == TokenIds(331, 331, None)
    return AutoTokenizer.from_pretrained(folder)


@SLOW
@given(ANY_TEXT)
def test_tiktoken_exports_have_the_same_ids(ranks, exported_ranks, text):
    assert exported_ranks(text)["input_ids"] == ranks[0].encode(text)


def test_exported_tiktoken_special_tokens(exported_ranks):
    assert exported_ranks(END, split_special_tokens=False)["input_ids"] == [331]
    assert (exported_ranks.eos_token_id, exported_ranks.bos_token_id) == (331, 331)


def test_patterns_without_counterpart_are_refused(ranks, tmp_path):
    write_ranks(tmp_path / "t.tiktoken")
    write_config(tmp_path, pat_str=r"[\w--[a-z]]+|.|\n", special_tokens={END: 999}, eos_token=END)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match=r"cuts .* differently|cannot use its pat_str"):
        export_tokenizer(tmp_path, tmp_path / "out", 1000, 64)


def test_published_encodings_are_known_by_name(tmp_path):
    lines = [base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)]
    (tmp_path / "cl100k_base.tiktoken").write_bytes(b"".join(lines))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (100257, 100277)
    assert tokenizer.encode("ab") == [97, 98]


RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
OWN = {"pat_str": ".", "special_tokens": {END: 300}, "eos_token": END}


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        (RANKS, None, "says neither how to cut text nor which special tokens there are"),
        (RANKS, OWN | {"eos_token": "</s>"}, r"eos_token='</s>' is no token of this tokenizer"),
        (RANKS, {"pat_str": ".", "special_tokens": {START: 300}}, "no file says which token ends a document"),
        (RANKS, OWN | {"special_tokens": {END: 5}}, "special token id 5 is an ordinary token too"),
        (RANKS, OWN | {"pat_str": "("}, "pat_str cannot be used"),
        (RANKS.split(b"\n", 1)[1], OWN, "byte 0 is no token"),
        (RANKS + b"broken\n", OWN, r"own\.tiktoken:257: expected base64 bytes and a rank"),
        (RANKS + b"YWI= 7\n", OWN, "ranks are negative or occur twice"),
    ],
)
def test_tiktoken_faults(tmp_path, content, config, message):
    (tmp_path / "own.tiktoken").write_bytes(content)
    if config is not None:
        write_config(tmp_path, **config)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path / "own.tiktoken")


def test_hf_faults(tmp_path, hf):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"is not a Hugging Face tokenizer\.json"):
        Tokenizer.load(tmp_path)
    folder = write_hf(tmp_path / "t", config={"eos_token": "</s>"})
    with pytest.raises(DataError, match=r"tokenizer_config\.json: eos_token='</s>' is no token of this tokenizer"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="is not readable JSON"):
        Tokenizer.load(folder)
    with pytest.raises(DataError, match=r"character 1 is the lone surrogate U\+D800"):
        Tokenizer.load(hf).encode("a\ud800b")


def test_lone_surrogates_are_refused_by_tiktoken_too(ranks):
    with pytest.raises(DataError, match=r"character 1 is the lone surrogate U\+D800"):
        ranks[0].encode("a\ud800b")


def test_a_folder_with_several_files_is_ambiguous(tmp_path):
    for name in ("a.model", "b.tiktoken"):
        (tmp_path / name).write_bytes(RANKS)
    with pytest.raises(DataError, match=r"several: a\.model, b\.tiktoken"):
        Tokenizer.load(tmp_path)
