"""Padded batches run as one packed row through the whole model."""

import copy
import threading

import pytest
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, BertModel

from apical.hf import explain, use_kernels

LEFT_OUT = "padding is left out of all layers"


def tokens_in_layers(model, inputs, **options) -> set[int]:
    """Return the numbers of tokens that the feed-forward parts of the layers are called with."""
    seen = set()
    names = ("mlp", "ffn", "intermediate", "fc1")
    parts = [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]
    handles = [
        part.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[:-1].numel()))
        for part in parts
    ]
    model(**inputs, **options)
    for handle in handles:
        handle.remove()
    return seen


# positions by column, by token, by id; a family without keyword arguments
@pytest.mark.parametrize("name", ["llama", "opt", "roberta", "distilbert", "stablelm"])
@pytest.mark.parametrize("kind", ["left", "right", "hole"])
def test_no_layer_sees_padding(pair, batch, name, kind):
    stock, patched = pair(name, torch.float64)
    inputs, _ = batch(kind)
    mask = inputs["attention_mask"]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, 1 if name == "roberta" else 0)
    assert tokens_in_layers(patched, inputs, use_cache=False) == {int(mask.sum())}
    theirs = stock(**inputs, output_hidden_states=True)
    ours = patched(**inputs, output_hidden_states=True, use_cache=False)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
    for mine, their in [*pairs, (ours.logits, theirs.logits)]:
        assert (mine - their)[mask.bool()].abs().max() <= 1e-9
    assert all((states[mask == 0] == 0).all() for states in ours.hidden_states)


def test_embeddings_positions_and_token_types_are_packed_too(pair, batch):
    stock, patched = pair("bert", torch.float64)
    inputs, _ = batch("hole")
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = stock.get_input_embeddings()(ids).detach().requires_grad_()
    inputs["token_type_ids"] = ids % 2
    # one row for the whole batch
    inputs["position_ids"] = torch.arange(12)[None] + 3
    real = inputs["attention_mask"].bool()
    theirs, ours = (model(**inputs).logits[real] for model in (stock, patched))
    assert (ours - theirs).abs().max() <= 1e-10
    their_grad, grad = (
        torch.autograd.grad(x.square().sum(), inputs["inputs_embeds"])[0] for x in (theirs, ours)
    )
    assert (grad - their_grad).abs().max() <= 1e-8 * their_grad.abs().max()


def test_packed_rows_with_padding_keep_their_documents(build):
    model = build("llama", torch.float64)
    ids = torch.randint(3, 61, (2, 12))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 0, 0], [*range(10), 0, 0]])
    mask = torch.ones_like(ids)
    mask[0, 8:] = mask[1, 10:] = 0
    alone = [model(ids[:1, :3]), model(ids[:1, 3:8]), model(ids[1:, :10])]
    expected = torch.cat([out.logits[0] for out in alone])
    out = use_kernels(model)(ids, position_ids=positions, attention_mask=mask, use_cache=False)
    assert (out.logits[mask.bool()] - expected).abs().max() <= 1e-10


def bert(cls, **options):
    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        # fewer than the tokens of the packed row
        max_position_embeddings=12,
        initializer_range=0.3,
        **options,
    )
    torch.manual_seed(1)
    return cls(config).double().eval()


# asked for by the call, by the configuration
@pytest.mark.parametrize("asked", [{"return_dict": True}, {"return_dict": False}, {}])
def test_poolers_see_the_first_token_of_each_row(batch, asked):
    stock = bert(BertModel, return_dict=bool(asked))
    patched = use_kernels(copy.deepcopy(stock), loss=False)
    inputs, _ = batch("right")
    theirs, ours = (model(**inputs, **asked)[1] for model in (stock, patched))
    assert theirs.shape == (2, 32)
    assert (ours - theirs).abs().max() <= 1e-10


def test_classifiers_equal_stock(batch):
    stock = bert(BertForSequenceClassification)
    patched = use_kernels(copy.deepcopy(stock), loss=False)
    inputs, _ = batch("right")
    inputs["labels"] = torch.tensor([0, 1])
    losses = [model(**inputs).loss for model in (stock, patched)]
    assert abs(losses[1] - losses[0]) <= 1e-10
    for loss in losses:
        loss.backward()
    for mine, their in zip(patched.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, their.grad, rtol=0, atol=1e-9)


def test_router_losses_equal_stock(pair, batch):
    stock, patched = pair("mixtral")
    inputs, labels = batch("right")
    options = {"labels": labels, "output_router_logits": True, "use_cache": False}
    theirs, ours = (model.train()(**inputs, **options) for model in (stock, patched))
    assert theirs.aux_loss > 0
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert [x.shape for x in ours.router_logits] == [x.shape for x in theirs.router_logits]


def test_rows_without_any_token_are_zero(build):
    model = use_kernels(build("llama"))
    ids, mask = torch.randint(3, 61, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0] = 0
    out = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    alone = model.model(input_ids=ids[1:], use_cache=False).last_hidden_state
    assert torch.equal(out[0], torch.zeros(12, 32))
    torch.testing.assert_close(out[1:], alone)
    # nothing at all to compute
    empty = model.model(input_ids=ids, attention_mask=0 * mask, use_cache=False)
    assert empty.last_hidden_state.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_equals_none(build, batch, reentrant, checkpointed):
    model = use_kernels(build("llama", torch.float64)).train()
    inputs, labels = batch("left")

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    checkpointed(model, reentrant=reentrant)
    model.enable_input_require_grads()
    for mine, other in zip(gradients(), plain, strict=True):
        assert (mine - other).abs().max() <= 1e-12


def test_autocast_equals_autocast_without_padding(build, batch):
    model = use_kernels(build("llama")).eval()
    inputs, _ = batch("right")
    with torch.autocast("cpu", torch.bfloat16):
        padded = model(**inputs, use_cache=False).logits
        alone = model(inputs["input_ids"][:1, :8], use_cache=False).logits
    torch.testing.assert_close(padded[:1, :8], alone, rtol=0.05, atol=0.05)
    assert padded.dtype == torch.bfloat16


def test_replicas_in_threads_do_not_meet(build, batch):
    model = use_kernels(build("stablelm")).eval()
    # what nn.DataParallel does: modules of their own that share the hooks
    shared = vars(model)["_apical_attention"]
    replicas = [copy.deepcopy(model, {id(shared): shared}) for _ in range(2)]
    kinds = ("left", "right")
    expected = [model(**batch(kind)[0], use_cache=False).logits for kind in kinds]
    found: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        for _ in range(20):
            found[number] = replicas[number](**batch(kinds[number])[0], use_cache=False).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert torch.equal(found[number], expected[number])


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        # takes no positions
        ("bart", {}, "positions of bart under padding are not known"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic rotary"),
    ],
    ids=["unknown", "rotary"],
)
@pytest.mark.parametrize("kind", ["left", "right", "hole"])
def test_other_families_leave_padding_out_of_attention(pair, batch, name, options, reason, kind):
    if options:
        options = {"rope_parameters": options["rope_parameters"] | {"rope_theta": 1e4}}
    stock, patched = pair(name, torch.float64, **options)
    assert f"padding is left out of attention alone: {reason}" in explain(patched)
    inputs, _ = batch(kind)
    assert tokens_in_layers(patched, inputs, use_cache=False) == {24}
    real = inputs["attention_mask"].bool()
    difference = patched(**inputs).logits - stock(**inputs).logits
    assert difference[real].abs().max() <= 1e-10


def test_own_models_are_not_taken_for_families_of_their_name(build):
    class Changed(transformers.LlamaModel):
        pass

    model = build("llama")
    model.model.__class__ = Changed
    assert LEFT_OUT in explain(use_kernels(build("llama")))
    assert LEFT_OUT not in explain(use_kernels(model))


def test_a_pooler_made_of_one_matrix_keeps_rows_padded():
    config = transformers.AlbertConfig(
        vocab_size=61, embedding_size=8, hidden_size=32, num_attention_heads=4
    )
    model = use_kernels(transformers.AlbertModel(config), loss=False)
    assert "the pooler reads" in explain(model)


def test_arguments_of_other_shapes_keep_rows_padded(build, batch):
    model = use_kernels(build("llama"))
    inputs, _ = batch("right")
    inputs["shift_labels"] = torch.zeros(5)
    assert tokens_in_layers(model.model, inputs, use_cache=False) == {24}
