"""Documents begin, end and are split as the model's tokenizer does it; a store belongs to one tokenizer."""

import json
import os
import shutil

import numpy as np
import pytest
from commands import ROOT
from documents import as_jsonl
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from forge_lib.config import DataConfig
from forge_lib.data import reading, tokenizing
from forge_lib.data.corpus import begins_documents, describe_store, prepare_store
from forge_lib.data.token_store import open_store
from forge_lib.data.tokenizing import (
    begin_ids,
    prompt_ids,
    splitting_fingerprint,
    tokenizer_fingerprint,
    vocabulary_size,
)
from forge_lib.errors import UserError

TINY = ROOT / "data" / "tiny_gpt2"


@pytest.fixture(scope="module")
def gpt2():
    return AutoTokenizer.from_pretrained(TINY)


def words_tokenizer(vocabulary: dict[str, int], **special) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def llama():
    """As Llama's: each text begins with <s> and a space, and a letter is a token."""
    letters = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz.", "\n"]
    backend = Tokenizer(BPE({letter: id for id, letter in enumerate(letters)}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make(tokenizer, path, folder=None, **options):
    return prepare_store(DataConfig(dataset_path=str(path), **options), tokenizer, folder)


def documents(store) -> list[list[int]]:
    spans = zip(store.documents[:-1].tolist(), store.documents[1:].tolist(), strict=True)
    return [store.tokens[start:stop].tolist() for start, stop in spans]


# Which tokenizer


def changed(how: str):
    """The bundled tokenizer with one thing changed that decides the ids of a document."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if how == "end token":
        tokenizer.eos_token = "e"
    elif how == "added token":
        tokenizer.add_tokens(["<new>"])
    elif how == "special token":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    elif how == "template":
        template = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = template
    elif how == "normalizer":
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize("how", ["end token", "added token", "special token", "template", "normalizer"])
def test_whatever_decides_the_ids_belongs_to_the_fingerprint_and_to_the_cache_key(tmp_path, gpt2, how):
    """A base and a chat model often share one tokenizer.json, and end a text with different tokens."""
    (tmp_path / "x.txt").write_text("one two <new> three")
    other = changed(how)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(gpt2) == tokenizer_fingerprint(changed("nothing"))
    first, second = make(gpt2, tmp_path / "x.txt"), make(other, tmp_path / "x.txt")
    assert first.folder != second.folder
    assert documents(second)[0][-1] == other.eos_token_id
    make(gpt2, tmp_path / "x.txt", tmp_path / "store")
    with pytest.raises(UserError, match="was made with the tokenizer of"):
        make(other, tmp_path / "store")


def test_what_does_not_decide_the_ids_does_not_belong_to_the_fingerprint(gpt2):
    other = AutoTokenizer.from_pretrained(TINY, padding_side="left", model_max_length=7)
    other.pad_token = other.eos_token
    other("a b", padding="max_length", truncation=True, max_length=5)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(gpt2)


def test_a_tokenizer_without_an_end_token_is_an_error_even_if_the_cache_has_the_text(tmp_path, gpt2):
    (tmp_path / "x.txt").write_text("one two three")
    make(gpt2, tmp_path / "x.txt")
    other = AutoTokenizer.from_pretrained(TINY)
    other.eos_token = None
    with pytest.raises(UserError, match="has no end-of-text token"):
        make(other, tmp_path / "x.txt")


def test_a_store_of_format_1_is_read_and_one_with_another_end_token_is_refused(tmp_path, gpt2):
    """tests/fixtures has a store of an older version; a run of it is continued by test_old_files.py."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "written_by_764f1e3" / "store", tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["tokenizer"]["fingerprint"] == splitting_fingerprint(gpt2)
    store = make(gpt2, tmp_path / "store")
    assert describe_store(store, gpt2, DataConfig(dataset_path=str(tmp_path / "store"))) == []
    with pytest.raises(UserError, match=r"end with token 0, but the tokenizer of --model-name ends them with \d+"):
        make(changed("end token"), tmp_path / "store")


# Ids


def test_ids_with_gaps_count_up_to_the_largest_one(tmp_path):
    """200 ids that start 10 higher, and one near 70,000."""
    vocabulary = {"<unk>": 10, "</s>": 11} | {f"w{n}": 12 + n for n in range(198)}
    tokenizer = words_tokenizer(vocabulary, eos_token="</s>")
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (200, 210)
    (tmp_path / "x.txt").write_text("w0 w197")
    assert documents(make(tokenizer, tmp_path / "x.txt")) == [[12, 209, 11]]
    large = words_tokenizer(vocabulary | {"far": 69_999}, eos_token="</s>")
    (tmp_path / "y.txt").write_text("far w1")
    store = make(large, tmp_path / "y.txt")
    assert (store.tokens.dtype, documents(store)) == (np.uint32, [[69_999, 13, 11]])
    assert store.manifest["tokenizer"]["vocab_size"] == vocabulary_size(large) == 70_000


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_the_store_uses_16_bits_up_to_the_id_65535(tmp_path, largest, dtype):
    tokenizer = words_tokenizer({"<unk>": 0, "</s>": 1, "last": largest}, eos_token="</s>")
    (tmp_path / "x.txt").write_text("last")
    store = make(tokenizer, tmp_path / "x.txt")
    assert (store.tokens.dtype, documents(store)) == (dtype, [[largest, 1]])


# How documents begin


def test_each_document_begins_as_the_tokenizer_begins_a_text(tmp_path, llama, gpt2):
    (tmp_path / "x.jsonl").write_bytes(as_jsonl([{"text": "ab"}, {"text": "c"}]))
    assert (begin_ids(llama), begin_ids(gpt2)) == ([1], [])
    store = make(llama, tmp_path / "x.jsonl")
    assert documents(store) == [[*llama("ab")["input_ids"], 2], [*llama("c")["input_ids"], 2]]
    assert documents(store)[1] == [1, 3, 6, 2]
    assert store.manifest["tokenizer"]["begin_ids"] == [1]
    without = make(llama, tmp_path / "x.jsonl", begin_tokens=False)
    assert documents(without) == [[3, 4, 5, 2], [3, 6, 2]]
    assert without.manifest["options"]["begin_tokens"] is False
    assert without.folder != store.folder


def test_a_prompt_begins_as_a_document_does(llama, gpt2):
    assert prompt_ids(llama, "ab", begin_tokens=True) == [1, 3, 4, 5]
    assert prompt_ids(llama, "ab", begin_tokens=False) == [3, 4, 5]
    assert prompt_ids(llama, "", begin_tokens=True)[0] == 1
    assert prompt_ids(gpt2, "", begin_tokens=True) == [gpt2.eos_token_id]
    assert prompt_ids(gpt2, "The", begin_tokens=True) == gpt2("The")["input_ids"]


def test_a_tokenizer_that_begins_and_ends_a_text_adds_only_its_begin(tmp_path):
    """As BERT's: [CLS] text [SEP]; the end-of-text token separates documents as always."""
    tokenizer = words_tokenizer({"<unk>": 0, "[CLS]": 1, "[SEP]": 2, "</s>": 3, "a": 4}, eos_token="</s>")
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=special
    )
    (tmp_path / "x.txt").write_text("a a")
    assert documents(make(tokenizer, tmp_path / "x.txt")) == [[1, 4, 4, 3]]


def test_a_tokenizer_that_does_not_know_latin_letters_begins_a_text_with_its_begin_alone(tmp_path):
    """Of DNA: the text "a" has no token, so [CLS] and [SEP] stand next to each other."""
    tokenizer = words_tokenizer({"<unk>": 0, "[CLS]": 1, "[SEP]": 2, "C": 3}, eos_token="[SEP]")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    template = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("a")["input_ids"] == [1, 2]
    assert begin_ids(tokenizer) == [1]


def test_an_old_store_without_begin_tokens_is_reported(tmp_path, llama):
    (tmp_path / "x.txt").write_text("ab")
    store = make(llama, tmp_path / "x.txt", tmp_path / "store", begin_tokens=False)
    manifest = store.manifest | {"format_version": 1}
    manifest["tokenizer"]["fingerprint"] = splitting_fingerprint(llama)
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    config = DataConfig(dataset_path=str(tmp_path / "store"))
    lines = describe_store(make(llama, tmp_path / "store"), llama, config)
    assert "was made by an older version: its documents lack <s>" in lines[-1]


@pytest.mark.parametrize("which", ["llama", "gpt2"])
@pytest.mark.parametrize("separator", [" ", "\n", ".", "\n\n "])
def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, request, monkeypatch, which, separator):
    """Llama's tokenizer puts a space before each text: pieces after the first must not get one more."""
    tokenizer = request.getfixturevalue(which)
    text = separator.join("abcde" if n % 3 else "gh" for n in range(400))
    (tmp_path / "x.txt").write_text(text)
    monkeypatch.setattr(reading, "READ_BYTES", 64)
    expected = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert documents(make(tokenizer, tmp_path / "x.txt")) == [expected]


def test_flags_without_effect_on_a_finished_store_are_named(tmp_path, llama):
    """A store keeps the options that it was made with; a sample begins as its documents do."""
    (tmp_path / "x.txt").write_text("ab c\n\nd")
    options = {"sample_by": "paragraph", "begin_tokens": False}
    store = make(llama, tmp_path / "x.txt", tmp_path / "store", **options)
    assert not begins_documents(store)
    for given, lines in ((options, 0), ({}, 0), ({"sample_by": "line", "document_separator": "x"}, 1)):
        config = DataConfig(dataset_path=str(tmp_path / "store"), **given)
        found = [line for line in describe_store(store, llama, config) if "no effect" in line]
        assert len(found) == lines
    assert found[0].startswith("--sample-by, --document-separator: no effect, since ")


# Special tokens in the text


TEXT = "one<|endoftext|>two <|endoftext|>"


def test_special_tokens_in_the_text_are_parsed_or_plain_and_counted(tmp_path, gpt2):
    (tmp_path / "x.txt").write_text(TEXT)
    end = gpt2.eos_token_id
    parsed = make(gpt2, tmp_path / "x.txt")
    assert documents(parsed) == [[*gpt2(TEXT)["input_ids"], end]]
    assert documents(parsed)[0].count(end) == 3
    plain = make(gpt2, tmp_path / "x.txt", special_tokens_in_text="plain")
    (ids,) = documents(plain)
    assert ids.count(end) == 1 and ids[-1] == end
    assert gpt2.decode(ids[:-1]) == TEXT
    for store, how in ((parsed, "parse"), (plain, "plain")):
        assert store.manifest["special_tokens_in_text"] == {"<|endoftext|>": 2}
        assert describe_store(store, gpt2, DataConfig(dataset_path="x.txt"))[-1].endswith(
            f"x.txt: <|endoftext|> 2 times (read as: {how})"
        )
    assert gpt2(TEXT)["input_ids"].count(end) == 2, "the tokenizer itself is not changed"


def test_a_separator_splits_documents_before_special_tokens_are_parsed(tmp_path, gpt2):
    (tmp_path / "x.txt").write_text(TEXT)
    store = make(gpt2, tmp_path / "x.txt", document_separator="<|endoftext|>")
    end = gpt2.eos_token_id
    assert documents(store) == [[*gpt2("one")["input_ids"], end], [*gpt2("two ")["input_ids"], end]]
    assert store.manifest["special_tokens_in_text"] == {}


def test_an_unknown_word_is_no_special_token_in_the_text(tmp_path):
    tokenizer = words_tokenizer({"<unk>": 0, "</s>": 1, "a": 2}, eos_token="</s>")
    (tmp_path / "x.txt").write_text("a b c </s>")
    assert make(tokenizer, tmp_path / "x.txt").manifest["special_tokens_in_text"] == {"</s>": 1}


def test_a_tokenizer_that_cannot_read_special_tokens_as_text_is_an_error(tmp_path):
    """Its end token is also an ordinary word."""
    tokenizer = words_tokenizer({"<unk>": 0, "</s>": 1, "a": 2}, eos_token="</s>")
    (tmp_path / "x.txt").write_text("a </s>")
    with pytest.raises(UserError, match="--special-tokens-in-text plain: this tokenizer makes </s> of plain text"):
        make(tokenizer, tmp_path / "x.txt", special_tokens_in_text="plain")


# The manifest


def test_the_manifest_counts_documents_and_their_lengths(tmp_path, gpt2):
    rows = [{"text": "one two three"}, {"text": ""}, {"text": None}, {"text": "x"}, {"text": " \n"}]
    (tmp_path / "x.jsonl").write_bytes(as_jsonl(rows))
    (tmp_path / "y.jsonl").write_text("\n")
    facts = make(gpt2, tmp_path, tmp_path / "store").manifest
    lengths = [len(gpt2(text)["input_ids"]) + 1 for text in ("one two three", "x")]
    assert (facts["num_documents"], facts["num_empty_documents"], facts["num_tokens"]) == (2, 3, sum(lengths))
    assert (facts["longest_document"], facts["shortest_document"]) == (max(lengths), min(lengths))
    assert facts["source"]["num_empty_files"] == 1
    assert open_store(tmp_path / "store").manifest == facts


def test_lengths_of_documents_are_right_across_batches(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr("forge_lib.data.document_writer.BATCH_CHARACTERS", 50)
    monkeypatch.setattr(reading, "READ_BYTES", 30)
    texts = ["a b c d e f g h " * count for count in (1, 9, 2, 30, 3)]
    (tmp_path / "x.jsonl").write_bytes(as_jsonl([{"text": text} for text in texts]))
    store = make(gpt2, tmp_path / "x.jsonl")
    expected = [len(gpt2(text)["input_ids"]) + 1 for text in texts]
    assert np.diff(store.documents).tolist() == expected
    facts = store.manifest
    assert (facts["longest_document"], facts["shortest_document"]) == (max(expected), min(expected))


def test_a_slow_tokenizer_gives_the_same_documents(tmp_path, gpt2, monkeypatch):
    """Some tokenizers have no fast version: encoding goes through transformers."""
    (tmp_path / "x.txt").write_text("one two three")
    expected = documents(make(gpt2, tmp_path / "x.txt", tmp_path / "fast"))
    monkeypatch.setattr(type(gpt2), "is_fast", property(lambda self: False))
    assert documents(make(gpt2, tmp_path / "x.txt", tmp_path / "slow")) == expected
    assert os.path.exists(tmp_path / "slow" / "manifest.json")
    assert tokenizing.vocabulary_size(gpt2) == 2048
