"""What limits a training step: the matrix products of the model's own layers, without anything else.

    python -m forge_lib.benchmark.limits MODEL_FOLDER BATCH_SIZE SEQUENCE_LENGTH

Prints the tokens/s of a loop over the three products of each linear layer (forward, gradient of the input, gradient of
the weights) and the six of each attention, in fp32 with this process's threads.
"""

import statistics
import sys
import time

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from forge_lib.distributed.allocator import keep_freed_memory

LOOPS = 3


def product_shapes(model: nn.Module, num_tokens: int) -> list[tuple[int, int, int]]:
    """Returns (rows, inner size, columns) of the product of each linear layer in a forward pass."""
    shapes = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shapes.append((num_tokens, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            shapes.append((num_tokens, *module.weight.shape))
    return shapes


def loop_seconds(model: nn.Module, batch_size: int, sequence_length: int) -> float:
    """Returns the seconds of all matrix products of a step."""
    config = model.config.get_text_config()
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    layers = []
    for rows, inner, columns in product_shapes(model, batch_size * sequence_length):
        layers.append((torch.rand(rows, inner), torch.rand(inner, columns), torch.rand(rows, columns)))
    query = torch.rand(batch_size * heads, sequence_length, width)
    key = query[:, : sequence_length // 2]  # half of the scores are masked, and not computed
    scores = torch.rand(batch_size * heads, sequence_length, key.shape[1])
    start = time.perf_counter()
    for left, right, output in layers:
        torch.mm(left, right, out=output)
        torch.mm(output, right.t())
        torch.mm(left.t(), output)
    for _ in range(config.num_hidden_layers):
        for _ in range(3):  # the scores, and the gradients of query and key
            torch.bmm(query, key.transpose(1, 2))
            torch.bmm(scores, key)
    return time.perf_counter() - start


def main(folder: str, batch_size: int, sequence_length: int) -> None:
    """Prints the tokens/s of the loop: the median of some."""
    keep_freed_memory()  # as train.py does
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    seconds = [loop_seconds(model, batch_size, sequence_length) for _ in range(LOOPS + 1)][1:]
    print(batch_size * sequence_length / statistics.median(seconds))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
