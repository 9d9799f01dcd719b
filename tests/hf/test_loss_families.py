"""One training step of each family equals the stock model's, whatever lies behind its head."""

import copy

import pytest
import torch
import transformers

from apical.hf import explain, use_kernels

IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(3))
LABELS = IDS.masked_fill(
    torch.rand(IDS.shape, generator=torch.Generator().manual_seed(4)) < 0.3, -100
)
# documents that start anywhere
PACKED = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 6], list(range(12))])

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
STILL = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
# families that the shared fixture does not build
MODELS = {
    "phi": ("PhiConfig", "PhiForCausalLM", SHAPE),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", SHAPE | STILL | {"embedding_size": 16}),
    "electra-causal": (
        "ElectraConfig",
        "ElectraForCausalLM",
        SHAPE | STILL | {"embedding_size": 16, "is_decoder": True},
    ),
    "modernbert-decoder": (
        "ModernBertDecoderConfig",
        "ModernBertDecoderForCausalLM",
        SHAPE | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "bert-causal": ("BertConfig", "BertLMHeadModel", SHAPE | STILL | {"is_decoder": True}),
    # a masked loss and a classifier's
    "bert-pretraining": ("BertConfig", "BertForPreTraining", SHAPE | STILL),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", SHAPE | STILL | {"embedding_size": 16}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", SHAPE | {"head_dim": 8}),
    "xlnet": (
        "XLNetConfig",
        "XLNetLMHeadModel",
        {"vocab_size": 61, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48, "dropout": 0.0},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    # adds a buffer to the logits
    "bart-pairs": (
        "BartConfig",
        "BartForConditionalGeneration",
        {"vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}
        | {"decoder_ffn_dim": 48, "max_position_embeddings": 32, "init_std": 0.3},
    ),
}


@pytest.fixture
def pair(build):
    """Return a function that builds a stock model and an equal one with the fused loss."""

    def build_pair(name: str, **options):
        if name in MODELS:
            config_class, model_class, defaults = MODELS[name]
            config = getattr(transformers, config_class)(**defaults | options)
            torch.manual_seed(1)
            stock = getattr(transformers, model_class)(config)
        else:
            stock = build(name, **options)
        # biases start at 0, where a forgotten one would not show
        for parameter in stock.train().parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.0)
        return stock, use_kernels(copy.deepcopy(stock), attention=False)

    return build_pair


def assert_same_step(stock, fused, **inputs):
    losses = []
    for model in (stock, fused):
        out = model(**inputs)
        out.loss.backward()
        losses.append(out.loss.detach())
        assert (out.get("logits", out.get("prediction_logits")) is None) == (model is fused)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-6, atol=0)
    theirs = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in fused.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max() for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-5 * largest, name


# what each adds to: a head without a bias whose logits go to loss_function as they are
CASES = {
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "gpt_oss": {},
    "stablelm": {},
    "bloom": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    # tied
    "llama-tied": {},
    # a loss of the router is added
    "mixtral": {"output_router_logits": True},
    # caps that bend logits by half, tied and not
    "gemma2": {"final_logit_softcapping": 3.0, "tie_word_embeddings": False},
    "gemma3": {"final_logit_softcapping": 3.0},
    # scales that are no powers of two
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "sliding_window": 4},
    # a bias
    "phi": {},
    "modernbert-decoder": {"decoder_bias": True, "global_attn_every_n_layers": 1},
    "electra-causal": {},
    "bert-causal": {},
    # masked, through loss_function
    "modernbert": {"decoder_bias": True},
    # hidden states without labels are dropped before the head
    "modernbert-window": {"sparse_prediction": True},
    # masked, through nn.CrossEntropyLoss
    "bert": {},
    "bert-pretraining": {},
    "roberta": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    "distilbert": {},
    "electra": {},
    "albert": {},
    # causal, through nn.CrossEntropyLoss
    "bart": {},
    "xlnet": {},
    # hidden states are scaled before the head
    "t5": {},
    "bart-pairs": {},
}


@pytest.mark.parametrize("name", CASES)
def test_step_equals_stock(pair, name):
    stock, fused = pair(name, **CASES[name])
    extra = {"next_sentence_label": torch.tensor([0, 1])} if name == "bert-pretraining" else {}
    assert_same_step(stock, fused, input_ids=IDS, labels=LABELS, **extra)
    theirs, ours = (model.eval()(IDS, labels=LABELS)[1] for model in (stock, fused))
    assert torch.equal(ours, theirs)


CAUSAL = ["gpt2", "gemma2", "granite", "cohere", "phi"]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "inputs",
    [
        {"labels": LABELS, "num_items_in_batch": torch.tensor(23)},
        {"labels": LABELS, "shift_labels": LABELS.roll(-1, 1)},
        {"labels": LABELS[:, -5:], "logits_to_keep": 5},
        {"labels": LABELS, "position_ids": PACKED},
    ],
    ids=["count", "shifted", "kept", "packed"],
)
def test_arguments_of_the_step(pair, name, inputs):
    assert_same_step(*pair(name, **CASES[name]), input_ids=IDS, **inputs)


@pytest.mark.skipif(
    not hasattr(transformers.modeling_utils, "slice_logits_to_keep"),
    reason="this transformers takes no masks for logits_to_keep",
)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_mask_of_the_logits_to_keep(pair, name):
    # rows keep different numbers of tokens
    kept = LABELS != -100
    labels = LABELS[kept]
    inputs = {"input_ids": IDS, "labels": labels, "shift_labels": labels, "logits_to_keep": kept}
    assert_same_step(*pair(name, **CASES[name]), **inputs)


def test_a_bias_of_the_logits_is_added(pair):
    stock, fused = pair("bart-pairs")
    for model in (stock, fused):
        model.final_logits_bias.copy_(torch.linspace(-2, 2, 61))
    assert_same_step(stock, fused, input_ids=IDS, labels=LABELS)


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_frozen_head(pair, name):
    models = pair(name, **CASES[name] | {"tie_word_embeddings": False})
    for model in models:
        model.get_output_embeddings().requires_grad_(False)
    assert_same_step(*models, input_ids=IDS, labels=LABELS)


def test_bfloat16_autocast_rounds_as_the_stock_head(pair):
    stock, fused = pair("phi")
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (model(IDS, labels=LABELS).loss for model in (stock, fused))
    exact = stock(IDS, labels=LABELS).loss
    # the stock logits are rounded once more
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= 2 * (theirs - exact).abs() + 2**-9 * exact
    ours.backward()
    assert fused.lm_head.weight.grad.dtype == torch.float32


def test_float64_stays_so(pair):
    stock, fused = (model.double() for model in pair("gemma2", **CASES["gemma2"]))
    ours = fused(IDS, labels=IDS).loss
    logits = stock(IDS).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_explain_names_the_fused_loss(pair):
    _, fused = pair("gemma2")
    assert "linear_cross_entropy" in explain(fused).splitlines()[2]


# multiplies by the head's weight without calling the head
def test_a_head_that_is_not_called_is_refused_before_anything_is_trained(build):
    model = use_kernels(build("mobilebert"), attention=False).train()
    with pytest.raises(NotImplementedError, match="MobileBertForMaskedLM did not call its head"):
        model(IDS, labels=LABELS)
    use_kernels(model, attention=False, loss=False)
    assert model(IDS, labels=LABELS).logits.shape == (2, 12, 61)


# dynamo itself makes an instance of every autograd function and looks at .grad of every tensor
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# dynamo traces an nn.CrossEntropyLoss that a forward makes only with plain tensors
@pytest.mark.parametrize(("name", "fullgraph"), [("gemma2", True), ("phi", True), ("bert", False)])
def test_compiled_step_equals_stock(pair, name, fullgraph):
    torch.compiler.reset()
    stock, fused = pair(name, **CASES[name])
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=fullgraph)
    compiled(input_ids=IDS, labels=LABELS).loss.backward()
    stock(input_ids=IDS, labels=LABELS).loss.backward()
    for (key, p), q in zip(stock.named_parameters(), fused.parameters(), strict=True):
        if p.grad is not None:
            assert (q.grad - p.grad).abs().max() <= 1e-5 * max(1, p.grad.abs().max()), key
