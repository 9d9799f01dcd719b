import copy
import pickle
from typing import Any

import pytest
import torch
import transformers

from apical import use_kernels
from apical.hf.masked_rows import last_layer_rows

_COMMON = {"vocab_size": 61, "max_position_embeddings": 40, "initializer_range": 0.3}
_BERT = _COMMON | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_BERT |= {"num_attention_heads": 4, "pad_token_id": 0}
_BERT |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
_DISTIL = _COMMON | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
_DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0}
_MODERN = _COMMON | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_MODERN |= {"num_attention_heads": 4, "global_attn_every_n_layers": 1, "pad_token_id": 0}
_MODERN |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
_FAMILIES = {
    "Bert": _BERT,
    "Roberta": _BERT,
    "Camembert": _BERT,
    "XLMRoberta": _BERT,
    # embeddings of another width than the layers
    "Electra": _BERT | {"embedding_size": 16},
    # the residual is added outside of any module
    "DistilBert": _DISTIL,
    # norms come first; queries, keys and values are one product
    "ModernBert": _MODERN,
}


def _model(name: str = "Bert", **options) -> Any:
    config = getattr(transformers, f"{name}Config")(**_FAMILIES[name] | options)
    torch.manual_seed(1)
    return getattr(transformers, f"{name}ForMaskedLM")(config).double().train()


def _batch(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 61, (3, 12), generator=generator)
    labelled = torch.rand(3, 12, generator=generator) < 0.3
    batch = {"input_ids": ids}
    if kind == "padded":
        batch["attention_mask"] = mask = torch.ones_like(ids)
        mask[0, 9:] = mask[1, :4] = 0
        labelled &= mask.bool()
        # a row without any label
        labelled[2] = False
    batch["labels"] = torch.where(labelled, ids, -100)
    assert 2 <= labelled.sum() <= 12
    return batch


def _step(model, batch):
    """Return the loss, the gradients and the logits of one step."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), grads, out.logits


def _checkpoint(model) -> None:
    # under its name of today, or its former one
    current = hasattr(model, "activation_checkpointing_enable")
    getattr(model, f"{'activation' if current else 'gradient'}_checkpointing_enable")()


def _rows_of(module) -> list[int]:
    """Return a list that grows by the rows of each call of a module."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0].numel()))
    return seen


def _assert_equal(got, want):
    # ModernBERT's stock loss is computed in single precision whatever the model's
    single = torch.float32 in (got[0].dtype, want[0].dtype)
    loss, grads = (3e-7, 1e-6) if single else (1e-12, 1e-10)
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=loss, atol=0)
    assert got[1].keys() == want[1].keys()
    # gradients of key biases are zero but for rounding
    small = grads * max(float(grad.abs().max()) for grad in want[1].values())
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=grads, atol=small)


@pytest.mark.parametrize("kernels", [False, True], ids=["stock", "apical"])
@pytest.mark.parametrize("kind", ["full", "padded"])
@pytest.mark.parametrize("family", _FAMILIES)
def test_equals_the_whole_computation(family, kind, kernels):
    stock, batch = _model(family), _batch(kind)
    if family in ("Roberta", "Camembert", "XLMRoberta") and kind == "padded":
        # their positions follow from padding ids
        batch["input_ids"][batch["attention_mask"] == 0] = 0
    cut = copy.deepcopy(stock)
    if kernels:
        use_kernels(cut, loss=False)
    last_layer_rows(cut)
    want, got = _step(stock, batch), _step(cut, batch)
    _assert_equal(got, want)
    labelled = batch["labels"] != -100
    torch.testing.assert_close(got[2], want[2][labelled][None], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "padded"])
def test_packed_documents_and_all_kernels(kind):
    # the whole of use_kernels, the loss as well where it takes this head
    stock, batch = _model("ModernBert", decoder_bias=False), _batch(kind)
    cut = last_layer_rows(use_kernels(copy.deepcopy(stock)))
    # applied again: the order of the two calls does not matter
    use_kernels(cut)
    if kind == "full":
        positions = torch.cat([torch.arange(n) for n in (5, 7)]).expand(3, 12)
        batch["position_ids"] = positions
        stock = use_kernels(stock, loss=False)
    # a fused loss computes in double precision for double inputs
    _assert_equal(_step(cut, batch), _step(stock, batch))


def test_only_labelled_rows_are_computed():
    model, batch = _model(), _batch("padded")
    use_kernels(model, loss=False)
    rows = int((batch["labels"] != -100).sum())
    first, last = model.bert.encoder.layer
    assert isinstance(last_layer_rows(model), transformers.BertForMaskedLM)
    # registered after ours, these see what is left
    cut = [last.attention.self.query, last.attention.output, last.intermediate, last.output]
    counts = [_rows_of(module) for module in (*cut, model.cls.predictions.decoder)]
    whole = _rows_of(last.attention.self.key)
    before = _rows_of(first.intermediate)
    model(**batch)
    assert counts == [[rows]] * len(counts)
    # other layers and the keys need every token that is not padding
    assert whole == before
    assert whole[0] >= int(batch["attention_mask"].sum())


def test_only_labelled_queries_attend(monkeypatch):
    from apical.hf import attention

    seen = []
    stock = attention.varlen_attention
    monkeypatch.setattr(
        attention,
        "varlen_attention",
        lambda q, k, *args, **kw: seen.append((len(q), len(k))) or stock(q, k, *args, **kw),
    )
    model, batch = last_layer_rows(use_kernels(_model(), loss=False)), _batch("padded")
    model(**batch)
    tokens, rows = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    assert seen == [(tokens, tokens), (rows, tokens)]


def test_a_window_keeps_every_query():
    # the last layer sees two tokens to each side
    options = {"global_attn_every_n_layers": 2, "local_attention": 4}
    stock, batch = _model("ModernBert", **options), _batch("padded")
    cut = last_layer_rows(copy.deepcopy(stock))
    _assert_equal(_step(cut, batch), _step(stock, batch))


@pytest.mark.parametrize("kernels", [False, True], ids=["stock", "apical"])
def test_layers_that_are_computed_again(kernels):
    stock, batches = _model(), [_batch("full"), _batch("padded")]
    cut = copy.deepcopy(stock)
    if kernels:
        use_kernels(cut, loss=False)
    _checkpoint(last_layer_rows(cut))
    want = [_step(stock, batch) for batch in batches]
    # both forwards before the first backward: each layer must find its own rows again
    losses = [cut(**batch).loss for batch in batches]
    for loss, expected in zip(losses, want, strict=True):
        cut.zero_grad()
        loss.backward()
        grads = {name: p.grad for name, p in cut.named_parameters() if p.grad is not None}
        _assert_equal((loss.detach(), grads), expected)


def test_evaluation_and_missing_labels_change_nothing():
    stock, batch = _model(), _batch("padded")
    cut = last_layer_rows(copy.deepcopy(stock))
    # a step before, whose rows must be forgotten
    _step(cut, batch)
    none = batch | {"labels": torch.full_like(batch["labels"], -100)}
    for change in ({"labels": None}, {}, none):
        training = change is none or "labels" in change
        stock.train(training)
        cut.train(training)
        got, want = cut(**batch | change), stock(**batch | change)
        assert torch.equal(got.logits, want.logits)


def test_positional_arguments_and_output_of_the_body():
    stock, batch = _model(), _batch("padded")
    cut = last_layer_rows(copy.deepcopy(stock))
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    want = stock(ids, mask, labels=labels, output_hidden_states=True)
    got = cut(ids, mask, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    labelled = labels != -100
    for states, expected in zip(got.hidden_states, want.hidden_states, strict=True):
        assert states.shape == expected.shape
        torch.testing.assert_close(states[labelled], expected[labelled])


def test_taken_away_and_copied():
    stock, batch = _model(), _batch("padded")
    cut = last_layer_rows(last_layer_rows(copy.deepcopy(stock)))
    for copied in (copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
        last_layer_rows(cut, active=False)
        assert _step(copied, batch)[2].shape[0] == 1
    got, want = _step(cut, batch), _step(stock, batch)
    assert torch.equal(got[2], want[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in cut.modules())


def test_labels_of_padding_are_named():
    model, batch = last_layer_rows(_model()), _batch("padded")
    batch["labels"][0, 11] = 5
    with pytest.raises(ValueError, match="labels of tokens that attention_mask calls padding"):
        model(**batch)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        # its second head reads the first token of the last layer
        (lambda: transformers.BertForPreTraining(_model().config), "only for"),
        (lambda: _model("Bert", is_decoder=True), "is_decoder"),
        (lambda: _model("Bert", chunk_size_feed_forward=4), "chunk_size_feed_forward=4"),
        (lambda: _model("ModernBert", sparse_prediction=True), "sparse_prediction"),
    ],
    ids=["family", "decoder", "chunks", "sparse"],
)
def test_refusals(build, reason):
    model = build()
    with pytest.raises(NotImplementedError, match=reason):
        last_layer_rows(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
