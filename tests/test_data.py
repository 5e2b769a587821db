"""The bundled data is what its generators make."""

import subprocess
import sys

from commands import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def test_the_generator_writes_the_bundled_corpus_byte_for_byte(tmp_path):
    command = [sys.executable, "data/make_sample_corpus.py", "--output", tmp_path / "corpus.txt"]
    subprocess.run(command, cwd=ROOT, check=True, env={"PYTHONHASHSEED": "7"})
    made = (tmp_path / "corpus.txt").read_bytes()
    assert made == (ROOT / "data" / "sample_corpus.txt").read_bytes()
    assert 500_000 <= len(made) <= 1_000_000


def test_the_bundled_tokenizer_and_configuration_are_made_from_the_bundled_corpus(tmp_path):
    subprocess.run([sys.executable, "data/make_tiny_gpt2.py", "--output", tmp_path], cwd=ROOT, check=True)
    bundled = ROOT / "data" / "tiny_gpt2"
    vocabulary, expected = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (tmp_path, bundled))
    assert vocabulary == expected
    config, expected = (AutoConfig.from_pretrained(folder).to_diff_dict() for folder in (tmp_path, bundled))
    assert {**config, "transformers_version": None} == {**expected, "transformers_version": None}


def test_the_tiny_model_is_tiny_and_its_tokenizer_decodes_every_text_unchanged():
    folder = ROOT / "data" / "tiny_gpt2"
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in folder.iterdir()) < 500_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 2048 <= len(tokenizer) <= 4096
    text = "Ağır bir gün,\r\n\tİstanbul'da  🙂 漢字 and  two spaces."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
