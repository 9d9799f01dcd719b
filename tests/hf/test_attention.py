import pytest
import torch
from torch.nn.functional import cross_entropy, pad
from transformers import DataCollatorWithFlattening

from apical import PackedLayout
from apical.hf import attention, use_kernels
from apical.hf.layout import Layout


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return pad(labels, (0, 1), value=-100)[..., 1:]


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # the stock loss rounds logits to float32
    return cross_entropy(logits.flatten(0, 1), shifted(labels).flatten())


def documents_alone(model, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of packed rows, from one call per document."""
    rows = []
    for ids, positions in zip(input_ids, position_ids, strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        pieces = ids[None].tensor_split(starts[1:], 1)
        rows.append(torch.cat([model(input_ids=piece).logits for piece in pieces], 1))
    return torch.cat(rows)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bound: float):
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max() for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= bound * largest, name


# the three layouts there are: rows are documents, padded rows, several documents per row
@pytest.mark.parametrize("kind", ["full", "left", "packed"])
def test_loss_logits_and_gradients_equal_the_stock_model_in_float64(pair, batch, causal, kind):
    check_equal_to_stock(*pair(causal, torch.float64), *batch(kind), kind=kind)


# positions that count the padding; positions that skip it
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["right", "hole"])
def test_padding_may_be_anywhere(pair, batch, name, kind):
    check_equal_to_stock(*pair(name, torch.float64), *batch(kind), kind=kind)


def test_given_positions_may_count_the_padding(build, batch):
    model = use_kernels(build("llama", torch.float64))
    inputs, _ = batch("hole")
    counted = torch.arange(12).expand(2, -1)
    assert torch.equal(model(**inputs, position_ids=counted).logits, model(**inputs).logits)


def check_equal_to_stock(stock, patched, inputs, labels, *, kind):
    # the stock model ignores in many cases that positions restart: one document at a time
    logits = documents_alone(stock, **inputs) if kind == "packed" else stock(**inputs).logits
    real = inputs.get("attention_mask", torch.ones_like(labels)).bool()
    assert (patched(**inputs).logits - logits)[real].abs().max() <= 1e-10
    loss = patched.train()(**inputs, labels=labels).loss
    reference = next_token_loss(logits, labels)
    assert abs(loss - reference) <= 1e-10
    assert_equal(gradients(patched, loss), gradients(stock, reference), 1e-10)


def test_loss_and_gradients_equal_the_stock_model_in_float32(pair, batch, causal):
    stock, patched = (model.train() for model in pair(causal))
    inputs, labels = batch("left")
    ours, theirs = (model(**inputs, labels=labels).loss for model in (patched, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert_equal(gradients(patched, ours), gradients(stock, theirs), 1e-5)


def test_packed_gradients_equal_the_sum_over_documents_trained_alone(build, causal):
    model = use_kernels(build(causal, torch.float64)).train()
    documents = [torch.randint(3, 61, (1, length)) for length in (5, 1, 9, 2)]
    ids = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    labels = ids.masked_fill(positions == 0, -100)
    packed = model(ids, position_ids=positions, labels=labels, num_items_in_batch=13).loss
    packed_gradients = gradients(model, packed)
    losses = [model(d, labels=d, num_items_in_batch=13).loss for d in documents]
    alone = torch.stack(losses).sum()
    assert abs(packed - alone) <= 1e-10
    assert_equal(packed_gradients, gradients(model, alone), 1e-10)


PACKED = (5, 7)
POSITIONS = torch.cat([torch.arange(n) for n in PACKED])[None]
ONES = torch.ones_like(POSITIONS)
INDEX = torch.arange(2).repeat_interleave(torch.tensor(PACKED))[None]
OF_ROWS = ("position_ids", "attention_mask", "seq_idx")


# causal; bidirectional; layers that are given no positions; windows
@pytest.mark.parametrize("name", ["llama", "bert", "distilbert", "modernbert-window"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "rows",
    [1, 2],  # two packed rows: where flash attention in transformers looks at the first alone
)
@pytest.mark.parametrize(
    "packing",
    [
        {"position_ids": POSITIONS},
        # a mask of ones hides the packing from the stock model
        {"position_ids": POSITIONS, "attention_mask": ONES},
        {"position_ids": POSITIONS, "use_cache": False},
        {"position_ids": POSITIONS, "seq_idx": INDEX},
        {"position_ids": POSITIONS, "cu_seq_lens_q": None},
    ],
    ids=["positions", "mask", "no-cache", "index", "bounds"],
)
def test_packed_documents_do_not_leak(build, name, training, rows, packing):
    model = build(name, torch.float64)
    ids = torch.randint(3, 61, (rows, 12))
    inputs = {n: x.expand(rows, -1) if n in OF_ROWS else x for n, x in packing.items()}
    if "cu_seq_lens_q" in inputs:
        # over all rows, as flash attention has it
        inputs["cu_seq_lens_q"] = torch.tensor([0, *PACKED * rows]).cumsum(0).int()
    alone = documents_alone(model, ids, inputs["position_ids"])
    use_kernels(model, loss=False).train(training)
    assert (model(input_ids=ids, **inputs).logits - alone).abs().max() <= 1e-10


def test_an_index_alone_bounds_documents(build):
    model = build("llama", torch.float64)
    ids = torch.randint(3, 61, (2, 12))
    index = (torch.arange(12) >= 5).int().expand(2, -1)
    # rotary embeddings, rounded to float32, see distances alone
    alone = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], 1)
    packed = use_kernels(model)(ids, seq_idx=index).logits
    assert (packed - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert", "distilbert"])
def test_collator_batches_do_not_leak(build, name):
    model = build(name, torch.float64)
    ids = torch.randint(3, 61, (1, 12))
    collator = DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt"
    )
    packed = collator([{"input_ids": piece[0].tolist()} for piece in ids.split(PACKED, 1)])
    packed.pop("labels")
    alone = documents_alone(model, ids, POSITIONS)
    use_kernels(model, loss=False)
    assert (model(**packed).logits - alone).abs().max() <= 1e-10


def test_other_documents_change_nothing_bitwise(build):
    model = use_kernels(build("llama"))
    ids = torch.randint(3, 61, (1, 12))
    other = ids.clone()
    other[:, :5] = torch.randint(3, 61, (1, 5))
    first, second = (model(x, position_ids=POSITIONS).logits for x in (ids, other))
    assert torch.equal(first[:, 5:], second[:, 5:])
    assert not torch.equal(first[:, :5], second[:, :5])


def test_bidirectional_models_equal_stock(pair, batch):
    stock, patched = pair("bert", torch.float64)
    for kind in ("full", "left", "right", "hole"):
        inputs, labels = batch(kind)
        theirs, ours = (model(**inputs).logits for model in (stock, patched))
        assert (ours - theirs)[labels != -100].abs().max() <= 1e-10
        losses = (
            cross_entropy(logits.flatten(0, 1), labels.flatten()) for logits in (ours, theirs)
        )
        assert_equal(gradients(patched, next(losses)), gradients(stock, next(losses)), 1e-10)


def test_causal_model_may_be_asked_to_look_both_ways(pair, batch):
    stock, patched = pair("llama", torch.float64)
    inputs, _ = batch("full")
    theirs, ours = (model(**inputs, is_causal=False).logits for model in (stock, patched))
    assert (ours - theirs).abs().max() <= 1e-10
    assert (patched(**inputs).logits - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_documents(build, batch, reentrant, checkpointed):
    model = use_kernels(build("llama", torch.float64)).train()
    inputs, labels = batch("packed")
    plain = gradients(model, model(**inputs, labels=labels).loss)
    checkpointed(model, reentrant=reentrant)
    model.enable_input_require_grads()
    assert_equal(gradients(model, model(**inputs, labels=labels).loss), plain, 1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # layers alike; layers with other windows
@pytest.mark.parametrize("cached", [False, True])
def test_documents_are_worked_out_once_per_forward(build, batch, monkeypatch, name, cached):
    calls, layouts = [], []
    stock, kernel = attention.layout_of, attention.varlen_attention
    monkeypatch.setattr(attention, "layout_of", lambda inputs: calls.append(1) or stock(inputs))
    monkeypatch.setattr(
        attention,
        "varlen_attention",
        lambda q, k, v, *documents, **options: (
            layouts.append(documents) or kernel(q, k, v, *documents, **options)
        ),
    )
    model = use_kernels(build(name))
    model(**batch("left")[0], use_cache=cached)
    (first,), (second,) = layouts
    assert isinstance(first, PackedLayout)
    assert first is second
    assert len(calls) == 1


def test_positional_arguments_are_seen(build, batch):
    model = use_kernels(build("llama"))
    inputs, _ = batch("left")
    body = model.model
    by_name = body(**inputs).last_hidden_state
    assert torch.equal(body(*inputs.values()).last_hidden_state, by_name)
    assert not torch.equal(body(inputs["input_ids"]).last_hidden_state, by_name)


def test_embeddings_instead_of_ids(pair, batch):
    stock, patched = pair("llama", torch.float64)
    inputs, labels = batch("right")
    inputs["inputs_embeds"] = stock.get_input_embeddings()(inputs.pop("input_ids"))
    real = labels != -100
    difference = patched(**inputs).logits - stock(**inputs).logits
    assert difference[real].abs().max() <= 1e-10


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # without and with biases
def test_autocast_computes_like_stock(pair, batch, name):
    stock, patched = (model.train() for model in pair(name))
    inputs, labels = batch("full")
    exact = stock(**inputs, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (model(**inputs, labels=labels).loss for model in (stock, patched))
    assert abs(ours - exact) <= 2 * abs(theirs - exact) + 1e-2
    patched.zero_grad()
    ours.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in patched.parameters())


def test_autocast_rounds_what_comes_in_and_nothing_else():
    module = torch.nn.Module()
    # new queries on cached keys: the path of the kernel that is made of plain matrix products
    layout = Layout(torch.tensor([0, 5, 10]), None, rows=(2, 5), past=7, device=torch.device("cpu"))
    query, key, value = torch.randn(3, 2, 4, 12, 8)
    query = query[:, :, 7:]
    half = torch.bfloat16
    rounded = query.to(half), key.to(half), value.to(half)
    expected, _ = attention.attend(module, *rounded, attention_mask=None, apical_layout=layout)
    with torch.autocast("cpu", half):
        # a norm in float32 leaves queries and keys so
        mixed = query, key, value.to(half)
        ours, _ = attention.attend(module, *mixed, attention_mask=None, apical_layout=layout)
    assert torch.equal(ours, expected)


# dynamo itself makes an instance of every autograd function and looks at .grad of every tensor
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# padding is looked at on the host, which breaks the graph
@pytest.mark.parametrize(("kind", "fullgraph"), [("left", False), ("packed", True)])
def test_compiled_model_equals_eager(build, batch, kind, fullgraph):
    model = use_kernels(build("llama", num_hidden_layers=1)).train()
    inputs, labels = batch(kind)
    expected = gradients(model, model(**inputs, labels=labels).loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    assert_equal(gradients(model, compiled(**inputs, labels=labels).loss), expected, 1e-5)
