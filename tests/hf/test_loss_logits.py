"""What a loss function may do to logits that nobody computed: as torch does it, or not at all."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from apical.hf import use_kernels

WORDS = 61
IDS = torch.randint(3, WORDS, (2, 12), generator=torch.Generator().manual_seed(3))
MASK = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(4)) < 0.7


def rows(logits, labels, **options):
    return cross_entropy(logits.view(-1, WORDS), labels.reshape(-1), **options)


def shifted(logits, labels, **options):
    """As many models do that compute their own loss."""
    assert logits.shape == (*labels.shape, logits.size(-1))
    rows = logits[..., :-1, :].contiguous().to(labels.device).to(torch.float32)
    return torch.nn.CrossEntropyLoss(**options)(
        rows.view((-1, rows.size(-1))), labels[..., 1:].reshape(-1)
    )


CLASSES = torch.linspace(0.1, 2, WORDS)
TAKEN = {
    "shifted": shifted,
    "masked": lambda x, y: cross_entropy(x[:, :-1][MASK[:, 1:]], y[:, 1:][MASK[:, 1:]]),
    "rows by number": lambda x, y: rows(x[torch.tensor([1, 0])][:, torch.tensor([2, 5])], y[:, :2]),
    "one row": lambda x, y: cross_entropy(x[1], y[1]),
    "width left open": lambda x, y: cross_entropy(x.reshape(y.numel(), -1), y.flatten()),
    "scale then cap": lambda x, y: rows(2 * torch.tanh(x * 3 / 7), y),
    "cap then scale": lambda x, y: rows(((x / 3).tanh() * 3).mul(0.7).div(3), y),
    "negative scale": lambda x, y: rows(x * -0.5, y),
    "bias": lambda x, y: rows(x.float() + torch.linspace(-3, 3, WORDS)[None, None], y),
    "bias then scale": lambda x, y: rows((x + torch.linspace(-3, 3, WORDS)) / 3, y),
    "class weights": lambda x, y: rows(x, y, weight=CLASSES.to(x.device)),
    "smoothing": lambda x, y: rows(x, y, label_smoothing=0.2),
    "weights per token": lambda x, y: (rows(x, y, reduction="none") * torch.arange(24)).sum(),
    "sum": lambda x, y: shifted(x, y, reduction="sum", ignore_index=7) / 9,
    # parts of a batch, each with a loss of its own
    "two losses": lambda x, y: rows(x[:1], y[:1]) + 2 * rows(x[1:] / 2, y[1:]),
}


@pytest.fixture
def pair(build):
    """Return a function that builds a stock and a fused model with one loss function."""

    def build_pair(loss):
        stock = build("llama").train()
        stock.loss_function = lambda logits, labels, **options: loss(logits, labels)
        return stock, use_kernels(copy.deepcopy(stock), attention=False)

    return build_pair


@pytest.mark.parametrize("case", TAKEN)
def test_taken(pair, case):
    stock, fused = pair(TAKEN[case])
    theirs, ours = (model(IDS, labels=IDS) for model in (stock, fused))
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-6, atol=0)
    for out in (theirs, ours):
        out.loss.backward()
    largest = max(p.grad.abs().max() for p in stock.parameters())
    for (name, p), q in zip(stock.named_parameters(), fused.parameters(), strict=True):
        assert (q.grad - p.grad).abs().max() <= 1e-5 * largest, name


HALF = 40  # more than the hidden size, so that hidden states could be sliced by mistake
REFUSED = {
    "first words": (lambda x, y: rows(x[..., :HALF], y), "among the words"),
    "words by number": (lambda x, y: rows(x[:, :, torch.arange(WORDS)], y), "among the words"),
    "one word": (lambda x, y: x[0, 0, 5], "among the words"),
    "new axis": (lambda x, y: rows(x[None], y), "among the words"),
    "all-axes mask": (lambda x, y: x[torch.ones(2, 12, WORDS, dtype=torch.bool)], "among the"),
    "other width": (lambda x, y: cross_entropy(x.view(-1, 12), y), "rows of 12"),
    "other width left open": (lambda x, y: cross_entropy(x.view(WORDS, -1), y), "rows of 24"),
    "tensor as factor": (lambda x, y: rows(x * torch.ones(WORDS), y), "factor"),
    "factor first": (lambda x, y: rows(torch.ones(WORDS) * x, y), "mul"),
    "factor 0": (lambda x, y: rows(x * 0, y), "factor"),
    "tanh twice": (lambda x, y: rows(x.tanh().tanh(), y), "tanh of a tanh"),
    "bias after cap": (lambda x, y: rows(x.tanh() + torch.ones(WORDS), y), "adding"),
    "bias after scale": (lambda x, y: rows(x / 3 + torch.ones(WORDS), y), "adding"),
    "two biases": (lambda x, y: rows(x + torch.ones(WORDS) + torch.ones(WORDS), y), "adding"),
    "one number per token": (lambda x, y: rows(x + torch.ones(2, 12, 1), y), "adding"),
    "other device": (lambda x, y: rows(x.to("meta"), y), "moving logits from cpu to meta"),
    "transposed": (lambda x, y: cross_entropy(x.transpose(1, 2), y), "transpose"),
    "not rows": (lambda x, y: cross_entropy(x, y), "rows with one label"),
    "shares": (
        lambda x, y: cross_entropy(x[0], one_hot(y[0], WORDS).float()),
        "rows with one label",
    ),
    "old option": (lambda x, y: rows(x, y, size_average=False), "size_average"),
    "function": (lambda x, y: torch.softmax(x, -1), "softmax"),
    "largest": (lambda x, y: rows(x - x.amax(-1, keepdim=True), y), "amax"),
    "written": (lambda x, y: x.__setitem__((..., 0), 0), "writing"),
    "minus": (lambda x, y: x - 1, "difference"),
    "among others": (lambda x, y: torch.cat([x, x]), "cat"),
    "as an option": (lambda x, y: torch.add(torch.ones(1), other=x), "add"),
    "method": (lambda x, y: x.softmax(-1), "softmax"),
    "unused": (lambda x, y: torch.ones((), requires_grad=True), "other than torch's cross_entropy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(pair, case):
    loss, reason = REFUSED[case]
    _, fused = pair(loss)
    with pytest.raises(NotImplementedError, match=reason) as caught:
        fused(IDS, labels=IDS)
    assert "LlamaForCausalLM" in str(caught.value)
    assert "use_kernels(model, loss=False)" in str(caught.value)
    # the next step starts afresh
    fused.loss_function = lambda logits, labels, **options: rows(logits, labels)
    assert fused(IDS, labels=IDS).loss > 0
