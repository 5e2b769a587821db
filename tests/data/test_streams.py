"""Compressed, cut and damaged files: read whole, or an error that names them."""

import gzip
import json
import random

import pandas as pd
import pytest
from backports import zstd
from documents import COMPRESS, as_csv, as_jsonl, error_of, read


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("how", ["half", "one byte", "second part", "header of the second part"])
def test_a_compressed_file_without_its_end_is_an_error(tmp_path, kind, suffix, how):
    """Text of random words, so that half of the compressed file decompresses to about half of the text."""
    words = random.Random(0)
    texts = [" ".join(str(words.random()) for _ in range(20)) for _ in range(200)]
    data = {
        "txt": lambda: "\n".join(texts).encode(),
        "jsonl": lambda: as_jsonl([{"text": text} for text in texts]),
        "json": lambda: json.dumps([{"text": text} for text in texts]).encode(),
        "csv": lambda: as_csv([["text"], *([text] for text in texts)]),
        "parquet": lambda: pd.DataFrame({"text": texts}).to_parquet(),
    }[kind]()
    compress = COMPRESS[suffix]
    parts = [compress(data[: len(data) // 2]), compress(data[len(data) // 2 :])]
    whole = b"".join(parts)
    path = tmp_path / f"corpus.{kind}{suffix}"
    path.write_bytes(whole)
    assert read(path, sample_by="line") == texts
    cut = {"half": len(whole) // 2, "one byte": len(whole) - 1, "header of the second part": len(parts[0]) + 2}
    path.write_bytes(whole[: cut.get(how, len(parts[0]) + len(parts[1]) // 2)])
    assert "the end of the compressed file is missing; copy or download it again" in error_of(path, sample_by="line")


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.zst", "x.csv.gz", "x.parquet.zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text")
    assert "not readable" in error_of(tmp_path / name)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_an_error(tmp_path, suffix):
    """Both have a checksum, as the command-line tools write it."""
    text = "".join(str(random.Random(n).random()) + "\n" for n in range(1000)).encode()
    checksum = {zstd.CompressionParameter.checksum_flag: 1}
    data = bytearray(gzip.compress(text) if suffix == ".gz" else zstd.compress(text, options=checksum))
    data[len(data) // 2] ^= 0x10
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(bytes(data))
    assert "not readable" in error_of(path, encoding_errors="replace")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.txt.gz"])
def test_a_pointer_of_git_lfs_is_an_error(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "is a Git LFS pointer, not the file itself; run `git lfs pull`" in error_of(tmp_path / name)


def test_what_zstd_writes_with_a_window_of_two_gigabytes_is_read(tmp_path):
    data = zstd.compress(b"one\n" * 10, options={zstd.CompressionParameter.window_log: 30})
    (tmp_path / "x.txt.zst").write_bytes(data)
    assert len(read(tmp_path / "x.txt.zst", sample_by="line")) == 10
