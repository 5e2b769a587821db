"""Which files a path means: a path is a path, each real file is read once, and nothing is skipped unseen."""

import os
import shutil

import datasets
import pytest
from documents import as_jsonl, read, read_all

from forge_lib.config import DataConfig
from forge_lib.data.files import data_exists, describe_files, find_source, kind_of
from forge_lib.errors import UserError


def write(folder, *names: str) -> None:
    """Writes files whose text is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_jsonl([{"text": name}]) if "json" in path.suffix.lower() else name.encode())


@pytest.mark.parametrize(
    "name",
    [
        "corpus [v1].jsonl",
        "a*.jsonl",
        "what?.txt",
        "x::y.txt",
        "memory://a.txt",
        "hf:a.jsonl",
        "100%.txt",
        "a b\tc.md",
        "[]/a.txt",
        "lab [2024]/set (1)/data.jsonl",
        "**/a.txt",
        "~/a.txt",
        "{a,b}.txt",
        "-n.txt",
        "ü\u0301.txt",
    ],
)
def test_a_path_is_a_path_whatever_characters_it_has(tmp_path, name):
    """Beside it are files that a pattern of that name would match. Its folder gives the same document."""
    write(tmp_path, name)
    for path in (tmp_path / name, tmp_path / name.split("/")[0], tmp_path):
        assert read(path) == [name]
    assert data_exists(str(tmp_path / name))


def test_files_with_brackets_are_read_once_beside_those_that_they_would_match(tmp_path):
    write(tmp_path, "data[1].jsonl", "data1.jsonl", "a*.jsonl", "ab.jsonl")
    assert read(tmp_path) == ["a*.jsonl", "ab.jsonl", "data1.jsonl", "data[1].jsonl"]
    assert read(tmp_path / "data[1].jsonl") == ["data[1].jsonl"]
    assert read(tmp_path / "a*.jsonl") == ["a*.jsonl"], "an existing path is no pattern"
    assert read(tmp_path / "d*.jsonl") == ["data1.jsonl", "data[1].jsonl"]


def test_a_pattern_may_stand_below_folders_with_brackets_and_match_folders(tmp_path):
    write(tmp_path, "lab [v1]/a.txt", "lab [v1]/b/c.txt", "lab [v1]/d.png", "lab v/e.txt")
    assert read(tmp_path / "lab [v1]" / "*.txt") == ["lab [v1]/a.txt"]
    documents, reader = read_all(tmp_path / "lab [v1]" / "*")
    assert documents == ["lab [v1]/a.txt", "lab [v1]/b/c.txt"]
    assert reader.describe()["skipped"] == {".png": [1, "d.png"]}
    assert read(tmp_path / "**" / "c.txt") == ["lab [v1]/b/c.txt"]
    with pytest.raises(UserError, match="no file of a known format matches"):
        read(tmp_path / "lab [w]" / "*.txt")


def test_links_are_followed_and_each_real_file_is_read_once(tmp_path):
    """A link to a folder, to a file, to both again, a hard link, loops, and a broken link."""
    write(tmp_path, "elsewhere/deep/a.txt", "elsewhere/b.txt", "corpus/c.txt", "corpus/folder/d.txt")
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "linked again").symlink_to(tmp_path / "elsewhere")
    (corpus / "z.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    (corpus / "folder" / "up").symlink_to(corpus)
    (corpus / "itself").symlink_to(corpus / "itself")
    (corpus / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
    os.link(corpus / "c.txt", corpus / "hard.txt")
    documents, reader = read_all(corpus)
    assert documents == ["corpus/c.txt", "corpus/folder/d.txt", "elsewhere/b.txt", "elsewhere/deep/a.txt"]
    skipped = reader.describe()["skipped"]
    assert skipped["broken link"] == [2, "broken.txt"]
    assert skipped["read already under another name"] == [4, "up"]
    (tmp_path / "way").symlink_to(corpus)
    assert len(read(tmp_path / "way")) == 4


def test_a_pattern_for_any_depth_ends_at_loops_of_links(tmp_path):
    """`glob` would follow the loop forty times at each of its steps."""
    write(tmp_path, "corpus/a.txt", "corpus/b/c.txt", "elsewhere/d.txt", "corpus/b/.git/e.txt")
    for name in ("one", "two"):
        (tmp_path / "corpus" / name).symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "out").symlink_to(tmp_path / "elsewhere")
    for pattern in ("corpus/**/*.txt", "corpus/**", "**/*.txt", "corp*/**/?.t*t"):
        assert read(tmp_path / pattern) == ["corpus/a.txt", "corpus/b/c.txt", "elsewhere/d.txt"], pattern
    assert read(tmp_path / "corpus" / "**" / "[!ac].txt") == ["elsewhere/d.txt"]
    (tmp_path / "plain").mkdir()
    write(tmp_path, "plain/x/a.txt")
    assert read_all(tmp_path / "plain" / "**" / "*")[1].describe()["skipped"] == {}


def test_hidden_files_and_folders_are_skipped_unless_they_are_named(tmp_path):
    write(tmp_path, "a.txt", "._a.txt", ".ipynb_checkpoints/a.txt", ".git/b.md", "c/.hidden.jsonl", "c/d.txt")
    documents, reader = read_all(tmp_path)
    assert documents == ["a.txt", "c/d.txt"]
    assert reader.describe()["skipped"]["hidden"][0] == 4
    assert read(tmp_path / ".git") == [".git/b.md"]
    assert read(tmp_path / "._a.txt") == ["._a.txt"]
    assert read(tmp_path / "*.txt") == ["a.txt"]


def test_one_line_reports_what_was_read_and_skipped(tmp_path):
    write(tmp_path, "a.jsonl", "b.ndjson", "c.JSONL", "README.md", "LICENSE", "d.png", "e.png", "f.tar.gz", ".g")
    (tmp_path / "empty.txt").write_text("")
    os.mkfifo(tmp_path / "pipe.txt")
    documents, reader = read_all(tmp_path)
    assert documents == ["README.md", "a.jsonl", "b.ndjson", "c.JSONL"]
    facts = reader.describe()
    assert (facts["num_files"], facts["num_empty_files"]) == (4, 1)
    assert describe_files("corpus", facts) == (
        "files of corpus: read 2 .jsonl, 1 .md (README.md), 1 .ndjson (b.ndjson); empty 1 .txt (empty.txt); "
        "skipped 2 .png, 1 .tar.gz (f.tar.gz), 1 hidden (.g), 1 not a regular file (pipe.txt), "
        "1 without a suffix (LICENSE)"
    )


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "closed/b.txt")
    iterdir = type(tmp_path).iterdir

    def refuse(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(UserError, match=r"closed: not readable: Permission denied"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.TXT.GZ", ".txt.gz"), ("v1.2.jsonl", ".jsonl"), ("a.gz", ".gz"), ("LICENSE", "without a suffix"), ("a.", ".")],
)
def test_the_kind_of_a_file_is_its_suffix(tmp_path, name, kind):
    assert kind_of(tmp_path / name) == kind


def test_a_dataset_of_save_to_disk_is_read_without_its_caches_and_descriptions(tmp_path):
    """The files are read in their order: 12 of them, so the second is not the one with the second name by digits."""
    texts = [f"text {n}" for n in range(36)]
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": texts}) for name in ("test", "train")})
    saved.save_to_disk(tmp_path / "saved", num_shards={"test": 1, "train": 12})
    folder = tmp_path / "saved" / "train"
    shutil.copy(folder / "data-00000-of-00012.arrow", folder / "cache-0123.arrow")
    assert read(folder) == texts
    with pytest.raises(
        UserError, match=r"saved is a saved dataset with the splits test, train; name the folder of one, as .*test"
    ):
        read_all(tmp_path / "saved")


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(UserError, match="--dataset-path is empty; expected a file"):
        find_source(DataConfig(dataset_path=""))
