"""scripts/evaluate.py and scripts/generate.py: their ranges, and the texts that --metrics compares."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from forge_lib.config import ModelNameConfig
from forge_lib.data.blocks import TokenStream
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.models.generation import generate_ids
from forge_lib.models.loading import load_trained_model
from scripts.evaluate import EvaluateConfig, compute_metrics, continue_documents
from scripts.generate import GenerateConfig

TINY = ["--model-name", "data/tiny_gpt2"]


@pytest.mark.parametrize(
    ("config_class", "flags", "messages"),
    [
        (EvaluateConfig, ["--eval-fraction", "1"], ["--eval-fraction is 1.0, but must be below 1"]),
        (
            EvaluateConfig,
            ["--micro-batch-size", "-1", "--sequence-length", "1"],
            ["--micro-batch-size is -1, but must be at least 0", "--sequence-length is 1, but must be at least 2"],
        ),
        (GenerateConfig, ["--temperature", "-1"], ["--temperature is -1.0, but must be at least 0"]),
        (GenerateConfig, ["--max-new-tokens", "0"], ["--max-new-tokens is 0, but must be at least 1"]),
        (GenerateConfig, ["--top-p", "0"], ["--top-p is 0.0, but must be above 0"]),
        (GenerateConfig, ["--top-p", "1.5"], ["--top-p is 1.5, but must be at most 1"]),
    ],
)
def test_values_out_of_range_are_reported_together(config_class, flags, messages):
    data = ["--dataset-path", "x.txt"] if config_class is EvaluateConfig else []
    with pytest.raises(UserError) as raised:
        parse_config(config_class, [*TINY, *data, *flags])
    assert sorted(str(raised.value).splitlines()) == messages


def test_the_values_at_the_ends_of_the_ranges_are_accepted():
    parse_config(GenerateConfig, [*TINY, "--top-p", "1", "--temperature", "0", "--max-new-tokens", "1"])
    parse_config(EvaluateConfig, [*TINY, "--dataset-path", "x.txt", "--eval-fraction", "0", "--micro-batch-size", "1"])


def test_metrics_compare_the_second_half_of_documents_with_what_the_model_generates_after_the_first(trained):
    """Documents of fewer than eight tokens are not used, and a document ends with its end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    model = load_trained_model(ModelNameConfig(model_name=str(trained / "final")), 2048)
    texts = [
        "The harbour is quiet in the morning, and a boat comes in.",
        "Short",
        "A second boat comes in later today.",
    ]
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.uint64)
    stream = TokenStream(np.concatenate(documents).astype(np.uint16), offsets)
    config = EvaluateConfig(model_name="m", dataset_path="d", num_prompts=2)
    predictions, references = continue_documents(config, model, tokenizer, stream)
    assert len(predictions) == 2
    for text, document, prediction, reference in zip(
        (texts[0], texts[2]), (documents[0], documents[2]), predictions, references, strict=True
    ):
        half = len(document) // 2
        prompt = tokenizer.decode(document[:half])
        assert prompt + reference == text
        generated = generate_ids(model, document[:half], document[-1], 0, len(document) - half, temperature=0)
        assert prompt + prediction == tokenizer.decode(generated, skip_special_tokens=True)


def test_a_metric_that_cannot_compare_texts_and_documents_that_are_too_short_are_one_line(trained):
    class Accuracy:
        name = "accuracy"

        def compute(self, **texts):
            raise ValueError("could not convert string to float")

    with pytest.raises(UserError, match=r"--metrics accuracy: cannot compare texts \(could not convert string"):
        compute_metrics([Accuracy()], ["a"], ["b"])
    config = EvaluateConfig(model_name="m", dataset_path="d")
    stream = TokenStream(np.zeros(6, np.uint16), np.array([0, 3, 6], np.uint64))
    with pytest.raises(UserError, match="--metrics needs documents of at least 8 tokens"):
        continue_documents(config, None, None, stream)
