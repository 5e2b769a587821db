"""What decides the tokens of a text: the tokenizer, how it begins a text, and special tokens written in the text."""

from __future__ import annotations  # names of transformers in signatures are not imported

import hashlib
import itertools
import json
import re
from collections import Counter

import numpy as np
import transformers

from forge_lib.errors import UserError


def vocabulary_size(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """Returns the largest id + 1: a tokenizer may leave out ids, so the number of its tokens is not enough."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def begin_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids with which the tokenizer begins each text: <s> for Llama, none for GPT-2."""
    texts = ("a", "A", "0", *(tokenizer.decode([id]) for id in range(min(100, vocabulary_size(tokenizer)))))
    for text in texts:  # the first one that is no empty text for this tokenizer
        encoded = tokenizer(text, return_special_tokens_mask=True)
        if 0 in encoded["special_tokens_mask"]:
            return list(encoded["input_ids"][: encoded["special_tokens_mask"].index(0)])
    return []


def prompt_ids(tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, begin_tokens: bool) -> list[int]:
    """Returns the ids of a prompt as a document with this text begins; an empty one begins after an end of text."""
    ids = [*(begin_ids(tokenizer) if begin_tokens else []), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    return ids or [end_id(tokenizer)]


def splitting_fingerprint(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Returns a sha256 of how the tokenizer splits text; format 1 of the token store and checkpoints contain it."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(padding=None, truncation=None)
    else:
        state = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Returns a sha256 of everything that decides the ids of a document: the splitting, its begin and its end."""
    special = sorted((id, token.content) for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    state = [splitting_fingerprint(tokenizer), tokenizer.eos_token_id, begin_ids(tokenizer), special]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def end_id(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """Returns the id of the end-of-text token; raises UserError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-text token to join documents with; set "
            "eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


class Encoder:
    """Encodes texts, without the tokens at their begin and end.

    Args:
        tokenizer: splits the texts.
        special_tokens: "parse": a special token that is written in a text becomes that token, as in transformers;
            "plain": it is text like any other.

    Attributes:
        num_special: by special token, how often it was written in the texts.

    Raises:
        UserError: "plain", and the tokenizer makes a special token of plain text nevertheless.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, special_tokens: str):
        self.num_special: Counter[str] = Counter()
        self._tokenizer, self._is_plain = tokenizer, special_tokens == "plain"
        specials = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        specials |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        if tokenizer.unk_token_id != tokenizer.eos_token_id:  # GPT-2 has one token for both
            specials.pop(tokenizer.unk_token, None)  # stands for unknown characters, which are no special tokens
        self._names = {id: token for token, id in specials.items()}
        self._is_special = np.zeros(vocabulary_size(tokenizer), bool)
        self._is_special[list(self._names)] = True
        self._written = re.compile("|".join(map(re.escape, self._names.values())) or "(?!)")
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()  # some models' tokenizers are saved with truncation or padding
            tokenizer.backend_tokenizer.no_padding()
        made = {id for ids in self._encode(list(self._names.values())) for id in ids} if self._is_plain else set()
        if made & self._names.keys():
            tokens = ", ".join(self._names[id] for id in sorted(made & self._names.keys())[:5])
            raise UserError(f"--special-tokens-in-text plain: this tokenizer makes {tokens} of plain text; use parse")
        whole, *parts = self._encode(["a b", "a", " b", "b"])
        self._adds_space = whole != parts[0] + parts[1] and whole == parts[0] + parts[2]

    def can_cut_before(self, text: str) -> bool:
        """Returns whether a document may be cut before this piece of it, and the pieces be encoded one by one."""
        return not self._adds_space or text.startswith(" ")

    def encode(self, texts: list[str], continued: list[bool]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of all texts, one text after the other, and the number of ids of each text; both are int64.

        Args:
            texts: whole documents, or pieces of them.
            continued: whether a text continues the document of the piece before it. Some tokenizers begin each text
                with a space of their own: it takes the place of the one at which the document was cut.
        """
        if self._adds_space:
            texts = [text.removeprefix(" ") if cut else text for text, cut in zip(texts, continued, strict=True)]
        encoded = self._encode(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, lengths.sum())
        if self._is_plain:
            self.num_special.update(token for text in texts for token in self._written.findall(text))
        else:
            self.num_special.update(self._names[id] for id in ids[self._is_special[ids]].tolist())
        return ids, lengths

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            options = {"add_special_tokens": False, "split_special_tokens": self._is_plain}
            return self._tokenizer(texts, **options)["input_ids"]
        backend = self._tokenizer.backend_tokenizer
        before = backend.encode_special_tokens
        backend.encode_special_tokens = self._is_plain
        try:
            return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]
        finally:
            backend.encode_special_tokens = before
