"""Write a tiny GPT-2 without weights: a tokenizer trained on the sample corpus, and a model configuration.

    python data/make_tiny_gpt2.py
    python data/make_tiny_gpt2.py --corpus data/sample_corpus.txt --output data/tiny_gpt2

Load the folder with `AutoTokenizer.from_pretrained` and `AutoConfig.from_pretrained`;
`AutoModelForCausalLM.from_config` makes a model with random weights from the configuration.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, GPT2Config, GPT2Tokenizer

VOCAB_SIZE = 2048
SEQUENCE_LENGTH = 512
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(corpus: Path) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on a UTF-8 text file; it decodes every text back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus.read_text(encoding="utf-8")], trainer)
    return tokenizer


def make_config(end_of_text_id: int) -> GPT2Config:
    """Return the configuration of a GPT-2 with 1.1 million parameters and no dropout."""
    return GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=VOCAB_SIZE,
        n_positions=SEQUENCE_LENGTH,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
    )


def main() -> None:
    """Train the tokenizer, then write it and the model configuration into the output folder."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Write the tokenizer and the configuration of a tiny GPT-2.")
    parser.add_argument("--corpus", type=Path, default=here / "sample_corpus.txt", help="UTF-8 text to train on")
    parser.add_argument("--output", type=Path, default=here / "tiny_gpt2", help="folder to write")
    args = parser.parse_args()

    trained = train_tokenizer(args.corpus)
    tokenizer = GPT2Tokenizer(
        tokenizer_object=trained,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=SEQUENCE_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(args.output)
    config = make_config(tokenizer.eos_token_id)
    config.save_pretrained(args.output)
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id).save_pretrained(
        args.output
    )
    print(f"{args.output}: {len(tokenizer)} tokens, {END_OF_TEXT} is {tokenizer.eos_token_id}")


if __name__ == "__main__":
    main()
