"""The speed of a process, measured on a model whose speed is known."""

import time

import pytest
import torch

from forge_lib.check.training_speed import measure_speed


class Sleepy(torch.nn.Module):
    """A model whose forward pass takes 10 ms, and 5 ms for each sequence."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 10)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, loss_labels, use_cache):
        time.sleep(0.01 + 0.005 * len(input_ids))
        return self.embedding(input_ids).sum()


@pytest.fixture
def one_thread():
    """Several threads would wait for each other, for longer than the model sleeps on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.alone
@pytest.mark.usefixtures("one_thread")
def test_the_fixed_time_and_the_time_per_sequence_are_measured_apart():
    model = Sleepy()
    optimizer = torch.optim.SGD(model.parameters())
    speed = measure_speed(model, [optimizer], 8, 6, "cpu", "no")
    assert speed.per_sequence == pytest.approx(0.005, rel=0.3)
    assert speed.gradient_seconds(6, 6)[0] == pytest.approx(0.04, rel=0.3)
    assert speed.backward < 0.3, "nearly all of the time is the forward pass"


def test_a_size_that_does_not_fit_into_the_memory_is_made_smaller():
    class Small(Sleepy):
        """A model on a GPU that holds three sequences."""

        def forward(self, input_ids, loss_labels, use_cache):
            sizes.append(len(input_ids))
            if len(input_ids) > 3:
                raise RuntimeError("CUDA out of memory.")
            return self.embedding(input_ids).sum()

    model, sizes = Small(), []
    speed = measure_speed(model, [torch.optim.SGD(model.parameters())], 8, 6, "cpu", "no")
    assert speed.per_sequence > 0 and sizes[-1] == 3 and max(sizes) == 6
