"""The programs that `scripts/benchmark.py prepare` measures, each in a process of its own.

    python -m forge_lib.benchmark.prepare_programs KIND MODEL_NAME FILE

KIND is `own` (this program's token store), `limit` (tokenizers' encode_batch_fast on documents in memory) or `map`
(the usual pipeline: datasets.map tokenizes, and again groups the tokens into sequences). Prints the seconds, without
those of imports, and the number of tokens.
"""

import sys
import tempfile
import time
from pathlib import Path

import transformers

SEQUENCE_LENGTH = 512
BATCH_DOCUMENTS = 1000
BUILDERS = {".txt": "text", ".csv": "csv", ".parquet": "parquet"}  # of datasets; all others are JSON


def prepare(tokenizer: transformers.PreTrainedTokenizerBase, path: Path) -> tuple[float, int]:
    """Makes a token store; returns seconds and tokens."""
    from forge_lib.config import DataConfig
    from forge_lib.data.corpus import prepare_store

    with tempfile.TemporaryDirectory() as folder:
        config = DataConfig(dataset_path=str(path), sample_by="paragraph")
        start = time.perf_counter()
        store = prepare_store(config, tokenizer, f"{folder}/store")
        return time.perf_counter() - start, store.manifest["num_tokens"]


def encode(tokenizer: transformers.PreTrainedTokenizerBase, path: Path) -> tuple[float, int]:
    """Tokenizes the paragraphs of a text file that is in memory; returns seconds and tokens."""
    texts = path.read_text().split("\n\n")
    backend, num_tokens = tokenizer.backend_tokenizer, 0
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH_DOCUMENTS):
        encoded = backend.encode_batch_fast(texts[first : first + BATCH_DOCUMENTS], add_special_tokens=False)
        num_tokens += sum(len(each.ids) for each in encoded)
    return time.perf_counter() - start, num_tokens


def map_and_group(tokenizer: transformers.PreTrainedTokenizerBase, path: Path) -> tuple[float, int]:
    """Tokenizes and groups as transformers' example run_clm.py does; returns seconds and tokens."""
    from datasets import disable_progress_bars, load_dataset

    def group(batch: dict) -> dict:
        joined = {name: [each for row in rows for each in row] for name, rows in batch.items()}
        length = len(joined["input_ids"]) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
        result = {
            name: [values[start : start + SEQUENCE_LENGTH] for start in range(0, length, SEQUENCE_LENGTH)]
            for name, values in joined.items()
        }
        return result | {"labels": result["input_ids"].copy()}

    disable_progress_bars()
    builder = BUILDERS.get(path.suffix, "json")
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        data = load_dataset(builder, data_files=str(path), split="train", cache_dir=cache, **options)
        data = data.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=data.column_names)
        data = data.map(group, batched=True)
        return time.perf_counter() - start, len(data) * SEQUENCE_LENGTH


if __name__ == "__main__":
    kind, model_name, file = sys.argv[1:]
    program = {"own": prepare, "limit": encode, "map": map_and_group}[kind]
    print(*program(transformers.AutoTokenizer.from_pretrained(model_name), Path(file)))
