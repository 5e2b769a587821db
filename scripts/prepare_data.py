r"""Tokenizes a corpus once, into a token store that scripts/train.py reads through a memory map.

    python scripts/prepare_data.py --model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt \
        --output-dir runs/store --sample-by paragraph
    python scripts/train.py --model-name data/tiny_gpt2 --dataset-path runs/store --output-dir runs/a

If the input has not changed since the last time, it does nothing.
"""

import sys
from dataclasses import MISSING, dataclass

from forge_lib.config import DataConfig, ModelNameConfig, flag
from forge_lib.data.corpus import describe_store, prepare_store
from forge_lib.data.token_store import is_store
from forge_lib.distributed.reporting import report_errors
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.models.loading import load_tokenizer


@dataclass(kw_only=True)
class StoreConfig:
    """The token store."""

    _argument_group_name = "output"

    output_dir: str = flag(MISSING, "folder of the token store", "FOLDER")


@dataclass(kw_only=True)
class PrepareConfig(StoreConfig, DataConfig, ModelNameConfig):
    """Every flag of this script."""


def main(config: PrepareConfig) -> None:
    """Makes the token store, unless it exists and its input has not changed; prints what is in it."""
    if is_store(config.dataset_path):
        raise UserError(f"--dataset-path {config.dataset_path} is a token store already; name the text it was made of")
    tokenizer = load_tokenizer(config)
    store = prepare_store(config, tokenizer, folder=config.output_dir)
    facts = store.manifest
    print(f"{store.folder}: {facts['num_tokens']:,} tokens in {facts['num_documents']:,} documents")
    print(
        f"documents: the longest has {facts['longest_document']:,} tokens, the shortest "
        f"{facts['shortest_document']:,}; {facts['num_empty_documents']:,} empty ones were left out; "
        f"{facts['num_text_bytes']:,} bytes of text"
    )
    for line in describe_store(store, tokenizer, config):
        print(line)


if __name__ == "__main__":
    with report_errors("prepare_data.py"):
        main(parse_config(PrepareConfig, sys.argv[1:], description=__doc__))
