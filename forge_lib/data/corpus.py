"""Text in any format -> documents -> a token store (forge_lib/token_store.py)."""

import codecs
import glob
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow
import zstandard
from filelock import FileLock
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from forge_lib import disk
from forge_lib.config import DataConfig
from forge_lib.data.token_store import (
    FORMAT_VERSION,
    STORE_FILES,
    Progress,
    TokenStore,
    is_store,
    open_store,
    stores_folder,
)
from forge_lib.errors import UserError

KINDS = {"txt": "text", "md": "text", "json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
COMPRESSIONS = ("gz", "zst")
READ_BYTES = 1 << 18
BATCH_CHARACTERS = 1 << 20  # a token under way takes about 100 bytes of memory
LINE_SECONDS = 10.0


def is_here(dataset_path: str) -> bool:
    """Tells whether anything of that name, or that matches it, is on this machine; nothing else of it is read."""
    path = str(Path(dataset_path).expanduser())
    return bool(dataset_path) and (
        Path(path).exists() or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))
    )


def content_fingerprint(dataset_path: str) -> str:
    """Returns what tells data apart by its content, wherever it lies: of a token store, or of the bytes of files.

    Nothing where nothing lies there, as for a data set of the Hub.

    Raises:
        UserError: no file of a known kind, or one that cannot be read.
    """
    if is_store(dataset_path):
        return open_store(dataset_path).fingerprint
    if not is_here(dataset_path):
        return ""
    digest = hashlib.sha256()
    for path, _ in _find_source(DataConfig(dataset_path=dataset_path)).files:
        digest.update(path.name.encode() + b"\0" + bytes.fromhex(disk.sha256(path)))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a sha256 over all that decides how the tokenizer cuts text."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(padding=None, truncation=None)
    else:
        state = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def prepare_store(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path | None = None,
    progress: Progress = print,
) -> TokenStore:
    """Opens the token store of `config.dataset_path`, making it first where it does not exist.

    Unchanged input is not read again. Processes of one machine that ask for the same store wait for the one that
    makes it. `progress` is told, now and then, how far the making is.

    Args:
        config: what to read, and how.
        tokenizer: cuts the documents; its end-of-text token joins them.
        folder: where the store shall lie; without it, in the cache of `datasets`, under a name that follows from the
            input, the tokenizer and the options.

    Raises:
        UserError: the input is missing, empty, not text, or lacks the column; or it is a store of another tokenizer.
    """
    if is_store(config.dataset_path):
        return _check_tokenizer(open_store(config.dataset_path), tokenizer)
    source = _find_source(config)
    wanted = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "source": source.fingerprint,
        "options": {name: getattr(config, name) for name in ("sample_by", "text_column", "encoding_errors")},
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    folder = Path(folder) if folder else stores_folder() / key[:16]
    folder = folder.resolve() if folder.is_symlink() else folder  # the link stays
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        disk.restore(folder)
        if is_store(folder) and (store := open_store(folder)).manifest.get("made_from") == key:
            return store
        held = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if held - STORE_FILES or (held and not is_store(folder)):
            raise UserError(f"--output-dir {folder} holds other files; name an empty or a new folder")
        partial = disk.partial_path(folder)
        disk.remove(partial)
        partial.mkdir()
        try:
            manifest = _write_store(partial, source, config, tokenizer, progress)
            source.check_unchanged()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        manifest["made_from"] = key
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        disk.flush_all(partial)
        disk.place(folder)
    return open_store(folder)


def _check_tokenizer(store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    made_with = store.manifest["tokenizer"]
    if made_with["fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"the token store {store.folder} was made with the tokenizer of {made_with['name']!r} "
            f"({made_with['vocab_size']} tokens), --model-name has that of {tokenizer.name_or_path!r} "
            f"({len(tokenizer)} tokens); make the store again with scripts/prepare_data.py --model-name "
            f"{tokenizer.name_or_path}"
        )
    return store


@dataclass(frozen=True)
class _Source:
    """Where the documents come from: files (with their kinds, in order), or a Hub data set.

    `seen` tells of each file, the empty ones too, what it was when it was found.
    """

    files: list[tuple[Path, str]]
    num_empty: int
    num_bytes: int
    fingerprint: str
    seen: dict[Path, tuple]

    def check_unchanged(self) -> None:
        """Raises UserError for a file that is no longer what it was."""
        for path, before in self.seen.items():
            if not path.is_file() or disk.stamp(path) != before:
                raise UserError(f"{path} was changed while it was tokenized; start again when it is complete")


def _find_source(config: DataConfig) -> _Source:
    given = config.dataset_path
    path = Path(given).expanduser()
    if path.is_file():
        paths = [path]
        if _kind(path) is None:
            raise UserError(f"--dataset-path {given}: unknown kind of file; expected {_known_kinds()}")
    elif path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
        if not paths:
            raise UserError(f"--dataset-path {given}: the folder holds no file of a known kind: {_known_kinds()}")
    elif glob.has_magic(given):
        paths = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file() and _kind(Path(p)))
        if not paths:
            raise UserError(f"--dataset-path {given}: no file of a known kind matches: {_known_kinds()}")
    else:
        return _find_hub_source(config)
    root = path if path.is_dir() else Path(".")
    seen = {p: disk.stamp(p) for p in paths}
    names = [str(p.relative_to(root) if path.is_dir() else p.name) for p in paths]
    identity = [(name, *seen[p][:2]) for name, p in zip(names, paths, strict=True)]
    files = [(p, _kind(p)) for p in paths if seen[p][0]]
    if not files:
        raise UserError(f"--dataset-path {given}: empty: {len(paths)} file(s) of 0 bytes; expected text")
    return _Source(
        files=files,
        num_empty=len(paths) - len(files),
        num_bytes=sum(size for size, *_ in seen.values()),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        seen=seen,
    )


def _find_hub_source(config: DataConfig) -> _Source:
    name = config.dataset_path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.split(".")[-1] in {*KINDS, *COMPRESSIONS}:
        raise UserError(f"--dataset-path {name}: no such file or folder")
    try:
        revision = HfApi().dataset_info(name, timeout=10).sha
    except (HfHubHTTPError, HFValidationError) as error:
        reason = f"the Hub says {type(error).__name__}"
    except Exception as error:  # the HTTP library below decides which one it is: unreachable, proxy, certificate
        reason = f"the Hub cannot be reached: {type(error).__name__}"
    else:
        identity = [name, revision, config.dataset_config, config.dataset_split]
        return _Source([], 0, 0, hashlib.sha256(json.dumps(identity).encode()).hexdigest(), {})
    raise UserError(f"--dataset-path {name}: no such file or folder here, nor a data set on the Hub ({reason})")


def _kind(path: Path) -> str | None:
    """The kind of a file by its suffix, .gz and .zst aside; None for a kind that is not known."""
    suffixes = path.name.lower().split(".")[1:]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _known_kinds() -> str:
    return ", ".join(KINDS) + ", each also ." + " or .".join(COMPRESSIONS)


def _write_store(
    folder: Path, source: _Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> dict:
    """Tokenizes the source into tokens.bin and documents.bin in `folder`; returns the manifest."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-text token to join documents with")
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    num_documents = num_tokens = num_text_bytes = 0
    said = time.monotonic()
    with _HashedFile(folder / "tokens.bin") as tokens, _HashedFile(folder / "documents.bin") as documents:
        documents.write(np.zeros(1, np.uint64))
        for texts, ends in _batches(_pieces(source, config, progress)):
            for ids, end in zip(_encode(tokenizer, texts), ends, strict=True):
                if end:
                    ids = [*ids, tokenizer.eos_token_id]
                num_tokens += len(ids)
                tokens.write(np.asarray(ids, dtype))
                if end:
                    num_documents += 1
                    documents.write(np.asarray([num_tokens], np.uint64))
            num_text_bytes += sum(len(text.encode()) for text in texts)
            if not sys.stderr.isatty() and time.monotonic() - said >= LINE_SECONDS:  # a terminal has a progress bar
                said = time.monotonic()
                state = f"{num_text_bytes / 1e6:.1f} MB of text, {num_tokens} tokens so far"
                print(f"tokenizing {config.dataset_path}: {state}", file=sys.stderr, flush=True)
    if not num_documents:
        raise UserError(f"--dataset-path {config.dataset_path}: empty: no text but white space in it")
    return {
        "format": "p2p-llm-forge token store",
        "format_version": FORMAT_VERSION,
        "dtype": np.dtype(dtype).name,
        "num_tokens": num_tokens,
        "num_documents": num_documents,
        "num_text_bytes": num_text_bytes,
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
        },
        "source": {
            "path": config.dataset_path,
            "fingerprint": source.fingerprint,
            "num_files": len(source.files),
            "num_empty_files": source.num_empty,
        },
        "files": {file.path.name: {"bytes": file.size, "sha256": file.sha256} for file in (tokens, documents)},
    }


class _HashedFile:
    """A file that is written once, from start to end, and hashed on the way."""

    def __init__(self, path: Path):
        self.path, self.size, self._hash = path, 0, hashlib.sha256()

    def __enter__(self):
        self._file = open(self.path, "wb")
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # some models' tokenizers are saved with one
        tokenizer.backend_tokenizer.no_padding()
        return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[tuple[list[str], list[bool]]]:
    """Gathers pieces into lists of about BATCH_CHARACTERS: enough for the tokenizer's threads, little in memory."""
    texts, ends, characters = [], [], 0
    for text, end in pieces:
        texts.append(text)
        ends.append(end)
        characters += len(text) + 1
        if characters >= BATCH_CHARACTERS:
            yield texts, ends
            texts, ends, characters = [], [], 0
    if texts:
        yield texts, ends


def _pieces(source: _Source, config: DataConfig, progress: Progress) -> Iterator[tuple[str, bool]]:
    """Yields (text, whether a document ends with it); a long document comes in pieces, cut at spaces if it has any."""
    if not source.files:
        yield from _records(None, "hub", config)
        return
    done = 0
    with tqdm(total=source.num_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            bar.update(num_bytes)
            progress(f"tokenizing {config.dataset_path}: {done / source.num_bytes:.0%}")

        for path, kind in source.files:
            if kind == "text":
                yield from _split(_read_text(path, config.encoding_errors, advance), config.sample_by)
            else:
                yield from _records(path, kind, config)
                advance(path.stat().st_size)


def _read_text(path: Path, errors: str, advance: Callable[[int], None]) -> Iterator[str]:
    """Yields a text file bit by bit, decoded as UTF-8 with or without BOM, with every line end as \\n.

    `datasets` would read a whole file as one string; this keeps memory flat for a document of any size.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(errors), translate=True)
    compressed = path.suffix.lower()[1:] in COMPRESSIONS
    offset = 0  # of the next block, in bytes of the text
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            while block := file.read(READ_BYTES):
                if errors == "strict" and b"\0" in block:
                    raise UserError(
                        f"{path}: not a text file: a zero byte at offset {offset + block.index(0)}; "
                        "expected UTF-8 (--encoding-errors replace reads it all the same)"
                    )
                offset += len(block)
                yield decoder.decode(block.removeprefix(codecs.BOM_UTF8) if offset == len(block) else block)
                advance(0 if compressed else len(block))
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = offset - len(error.object) + error.start
        raise UserError(
            f"{path}: byte 0x{error.object[error.start]:02x} at offset {at} is not UTF-8; convert the file, "
            "or give --encoding-errors replace"
        ) from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: not readable: {error}") from None
    advance(path.stat().st_size if compressed else 0)


def _split(blocks: Iterator[str], sample_by: str) -> Iterator[tuple[str, bool]]:
    """Cuts the text of one file into documents: the file, its paragraphs (between blank lines) or its lines."""
    rest, begun = "", False
    for block in blocks:
        rest += block
        if sample_by != "document":
            *whole, rest = re.split(r"\n\s*\n" if sample_by == "paragraph" else r"\n", rest)
            for text in whole:
                if begun or text.strip():
                    yield text.strip("\n"), True
                    begun = False
        if len(rest) >= READ_BYTES:
            half = len(rest) // 2
            cut = next((at for at in (rest.rfind(" ", half), rest.rfind("\n", half)) if at > 0), len(rest))
            yield rest[:cut], False
            rest, begun = rest[cut:], True
    if begun or rest.strip():
        yield rest if sample_by == "document" else rest.strip("\n"), True


def _records(path: Path | None, kind: str, config: DataConfig) -> Iterator[tuple[str, bool]]:
    """Yields the text column of a file with columns, or of a Hub data set, through `datasets`."""
    where = str(path or config.dataset_path)
    if kind == "parquet" and path.suffix.lower()[1:] in COMPRESSIONS:  # needs random access, which these have not
        with tempfile.NamedTemporaryFile(suffix=".parquet") as plain:
            with fsspec.open(where, "rb", compression="infer") as file:
                shutil.copyfileobj(file, plain)
            plain.flush()
            yield from _records(Path(plain.name), kind, config)
        return
    try:
        if path:
            options = {} if kind == "parquet" else {"encoding_errors": config.encoding_errors}
            records = datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True, **options)
        else:
            records = datasets.load_dataset(
                where, config.dataset_config or None, split=config.dataset_split, streaming=True
            )
        for number, record in enumerate(records):
            if config.text_column not in record:
                raise UserError(
                    f"{where}: no column {config.text_column!r}; it has {', '.join(map(repr, record))}: "
                    "name one with --text-column"
                )
            text = record[config.text_column]
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"{where}: column {config.text_column!r} holds {type(text).__name__}, expected text "
                    f"(record {number}); name another with --text-column"
                )
            if text and text.strip():
                yield text, True
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        if path and kind != "parquet" and config.encoding_errors == "strict":
            for _ in _read_text(path, "strict", lambda num_bytes: None):  # names the byte, if that is the reason
                pass
        raise UserError(f"{where}: not readable as {kind}: {error.__cause__ or error}") from None
