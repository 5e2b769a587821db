r"""Tokenizes a corpus once, into a token store that scripts/train.py reads by memory map.

    python scripts/prepare_data.py --model-name data/tiny_gpt2 --dataset-path data/sample_corpus.txt \
        --output-dir runs/store --sample-by paragraph
    python scripts/train.py --model-name data/tiny_gpt2 --dataset-path runs/store --output-dir runs/a

Run again on unchanged input, it returns at once.
"""

import sys
from dataclasses import MISSING, dataclass

from forge_lib.config import DataConfig, ModelNameConfig, flag
from forge_lib.data import corpus
from forge_lib.data.token_store import is_store
from forge_lib.distributed.peers import report_errors
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.models import model as models


@dataclass(kw_only=True)
class StoreConfig:
    """Where the token store is written."""

    _argument_group_name = "output"

    output_dir: str = flag(MISSING, "folder of the token store", "FOLDER")


@dataclass(kw_only=True)
class PrepareConfig(StoreConfig, DataConfig, ModelNameConfig):
    """Everything that this script reads."""


def main(config: PrepareConfig) -> None:
    """Makes the token store, or finds that it is there already."""
    if is_store(config.dataset_path):
        raise UserError(f"--dataset-path {config.dataset_path} is a token store already; name the text it was made of")
    tokenizer = models.load_tokenizer(config)
    store = corpus.prepare_store(config, tokenizer, folder=config.output_dir, progress=lambda state: None)
    facts = store.manifest
    print(
        f"{store.folder}: {facts['num_tokens']:,} tokens of {facts['num_documents']:,} documents "
        f"({facts['num_text_bytes']:,} bytes of text) in {facts['source']['num_files']:,} files, "
        f"{facts['source']['num_empty_files']} empty files skipped"
    )


if __name__ == "__main__":
    with report_errors("prepare_data.py"):
        main(parse_config(PrepareConfig, sys.argv[1:], description=__doc__))
