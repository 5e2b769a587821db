"""The chunked loss against torch's own, in value and gradient."""

import pytest
import torch
from torch.nn import functional as F

from forge_lib.models import chunked_loss


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of three predictions, and of the weights' gradient in pieces of four rows."""
    monkeypatch.setattr(chunked_loss, "slice_rows", lambda vocab_size, device, dtype: 3)
    monkeypatch.setattr(chunked_loss, "PIECE_ROWS", 4)


@pytest.mark.parametrize("has_bias", [False, True])
def test_loss_and_gradients_are_those_of_torch(small_slices, has_bias):
    torch.manual_seed(0)
    hidden, weight, bias = numbers(10, 8), numbers(21, 8), numbers(21) if has_bias else None
    labels = torch.randint(0, 21, (10,))
    labels[[2, 9]] = -100
    inputs = [each for each in (hidden, weight, bias) if each is not None]
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")
    wanted = torch.autograd.grad(expected / 7, inputs)
    loss = chunked_loss.chunked_loss_sum(hidden, weight, bias, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss / 7, inputs), wanted)


def test_a_frozen_head_gets_no_gradient(small_slices):
    hidden, weight = numbers(4, 8), numbers(21, 8).detach()
    loss = chunked_loss.chunked_loss_sum(hidden, weight, None, torch.randint(0, 21, (4,)))
    loss.backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


@pytest.fixture(params=[False, True], ids=["as on a CPU", "as on a GPU"])
def layout(monkeypatch, request):
    """The layout of the logits on a CPU, and that on a GPU, where the vocabulary is extended."""
    monkeypatch.setattr(chunked_loss, "_is_on_gpu", lambda tensor: request.param)
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.mark.parametrize("has_bias", [False, True])
def test_in_bf16_it_is_as_exact_as_the_full_matrix(small_slices, layout, has_bias):
    """Both compute the logits in bf16, and the loss from them in fp32. The last slice and the last piece are short."""
    torch.manual_seed(0)
    hidden, weight, bias = numbers(10, 64), numbers(501, 64), numbers(501) if has_bias else None
    labels = torch.randint(0, 501, (10,))
    labels[[2, 9]] = -100
    inputs = [each for each in (hidden, weight, bias) if each is not None]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum"), inputs)

    def error(loss: torch.Tensor) -> float:
        found = torch.autograd.grad(loss, inputs)
        return max((a - b).abs().max().item() for a, b in zip(found, exact, strict=True))

    with torch.autocast("cpu", torch.bfloat16):
        full = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")
        chunked = chunked_loss.chunked_loss_sum(hidden, weight, bias, labels)
    assert chunked.dtype == torch.float32 and chunked.item() == pytest.approx(full.item(), rel=1e-5)
    assert error(chunked) <= 1.5 * error(full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_counts_correct_predictions(small_slices, layout, dtype):
    torch.manual_seed(0)
    hidden, weight, labels = numbers(10, 8), numbers(21, 8), torch.randint(0, 21, (10,))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = F.linear(hidden, weight).float()
        labels[:4], labels[9] = logits[:4].argmax(1), -100
        loss, num_correct = chunked_loss.chunked_evaluation_sums(hidden, weight, None, labels)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-6)
    assert num_correct == (logits.argmax(1) == labels).sum() >= 4


def test_slices_are_larger_in_bf16_on_a_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chunked_loss.slice_rows(50_257, cpu, torch.float32) == 256
    assert chunked_loss.slice_rows(50_257, cpu, torch.bfloat16) == 512
    assert chunked_loss.slice_rows(50_257, gpu, torch.bfloat16) * 50_257 <= 1 << 26


def test_without_predictions_all_gradients_are_0():
    hidden, weight = numbers(0, 8), numbers(21, 8)
    chunked_loss.chunked_loss_sum(hidden, weight, None, torch.zeros(0, dtype=torch.int64)).backward()
    assert torch.equal(weight.grad, torch.zeros(21, 8))
