"""Write the sample corpus: short English and Turkish texts about two invented coastal towns.

    python data/make_sample_corpus.py
    python data/make_sample_corpus.py --output data/sample_corpus.txt --seed 7

All sentences and words are in data/sample_corpus_words/, one YAML file per language; data/README.md explains them.
Each kind of text (a letter, a recipe, ...) has a template with choices, `{this|that}`, and slots, `[name]`, and steps
that give the slots their values. A slot keeps its value within a paragraph, so that a person keeps the same name,
trade and pronouns from the first sentence to the last.
"""

import argparse
import random
import re
from pathlib import Path

import yaml

Slots = dict[str, str]

WORDS = Path(__file__).with_name("sample_corpus_words")
MIN_CHARS, MAX_CHARS = 300, 900

CHOICE = re.compile(r"\{([^{}]*)\}")
SLOT = re.compile(r"\[(\w+)\]")
SENTENCE_START = re.compile(r'(^"?|[.!?] "?|\." |[.!?]" ")([a-zçğıöşü])')


def fill_slots(text: str, slots: Slots) -> str:
    """Return the text with each `[slot]` replaced by its value."""
    return SLOT.sub(lambda match: slots[match[1]], text)


def make_slots(rng: random.Random, name: str, value: str | int | list | dict) -> Slots:
    """Return the slots of a value: a text fills `name`, a list gives one random element, a mapping fills its keys."""
    if isinstance(value, list):
        return make_slots(rng, name, rng.choice(value))
    if isinstance(value, dict):
        slots = {}
        for key, part in value.items():
            slots |= make_slots(rng, key, part)
        return slots
    return {name: str(value)}


def matches(row: Slots, condition: Slots, slots: Slots) -> bool:
    """Return whether, for every key of the condition, the row's value and the condition's have a word in common."""
    for key, words in condition.items():
        if not set(row.get(key, "").split()) & set(fill_slots(words, slots).split()):
            return False
    return True


def run_step(rng: random.Random, step: dict, lists: dict[str, list], slots: Slots) -> Slots:
    """Return the slots that a step of a kind sets: the fixed ones of `set`, or those of rows drawn from a list."""
    if not matches(slots, step.get("if", {}), slots):
        return {}
    if "set" in step:
        return make_slots(rng, "", step["set"])
    name, suffixes = step["draw"], step.get("as", [""])
    rows = [row for row in lists[name] if matches(row, step.get("only", {}), slots)]
    if "except" in step:
        rows = [row for row in rows if not matches(row, step["except"], slots)]
    # Where one row is left, nothing is drawn, so that looking a person up does not change the rest of the text.
    drawn = rows if len(rows) == 1 else rng.sample(rows, len(suffixes))
    made = {}
    for row, suffix in zip(drawn, suffixes, strict=True):
        made |= {f"{key}{suffix}": text for key, text in make_slots(rng, name, row).items()}
    return made


def expand(rng: random.Random, template: str, slots: Slots, language: str) -> str:
    """Return the template with its choices drawn and its slots filled, innermost choices first."""
    text = template
    while CHOICE.search(text) or SLOT.search(text):
        text = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
        text = fill_slots(text, slots)
    text = re.sub(r"\s+", " ", text).strip()
    return SENTENCE_START.sub(lambda match: match[1] + upper(match[2], language), text)


def upper(letter: str, language: str) -> str:
    """Return the capital of a letter; in Turkish, that of i is İ."""
    return "İ" if language == "tr" and letter == "i" else letter.upper()


def make_paragraph(rng: random.Random, kind: dict, words: dict) -> str:
    """Return one text of a kind: run its steps in order, then expand its template."""
    lists = words["lists"] | kind.get("lists", {})
    slots = dict(words["slots"])
    for step in kind["steps"]:
        slots |= run_step(rng, step, lists, slots)
    return expand(rng, kind["text"], slots, words["language"])


def make_paragraphs(rng: random.Random, words: dict) -> list[str]:
    """Return different paragraphs of MIN_CHARS to MAX_CHARS, `num_chars` in all, the kinds of text in turn."""
    kinds = list(words["kinds"].values())
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < words["num_chars"]:
        text = make_paragraph(rng, kinds[len(paragraphs) % len(kinds)], words)
        if text not in paragraphs and MIN_CHARS <= len(text) <= MAX_CHARS:
            paragraphs.append(text)
    return paragraphs


def make_corpus(seed: int) -> str:
    """Return the whole corpus: the paragraphs of both languages in random order, a blank line between them."""
    rng = random.Random(seed)
    paragraphs = []
    for language in ("english", "turkish"):
        words = yaml.safe_load((WORDS / f"{language}.yaml").read_text(encoding="utf-8"))
        paragraphs += make_paragraphs(rng, words)
    rng.shuffle(paragraphs)
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    """Write the corpus and print its size."""
    parser = argparse.ArgumentParser(description="Write the English and Turkish sample corpus.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("sample_corpus.txt"), help="text file")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other texts of the same kinds")
    args = parser.parse_args()
    corpus = make_corpus(args.seed)
    args.output.write_text(corpus, encoding="utf-8", newline="\n")
    num_paragraphs = corpus.count("\n\n") + 1
    print(f"{args.output}: {num_paragraphs} paragraphs, {len(corpus)} characters, {len(corpus.encode())} bytes")


if __name__ == "__main__":
    main()
