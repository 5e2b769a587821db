"""The folder of the final model."""

import pytest
from disks import tmpfs
from small_models import GPT2, build_model
from transformers import AutoTokenizer, GPT2Config

from forge_lib.errors import UserError
from forge_lib.models.final import save_final


@pytest.mark.netns  # it needs root, as those tests do
def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    model = build_model(GPT2Config(**GPT2.to_dict() | {"n_embd": 128}), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained("data/tiny_gpt2")
    with tmpfs(tmp_path / "disk", "64k") as disk:
        with pytest.raises(UserError, match=r"disk/final: .*No space left on device"):
            save_final(model, tokenizer, disk / "final")
        assert not (disk / "final").exists()
