"""One packed row: the keys that transformers knows, and what a model makes of them."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
)

from apical.hf import use_kernels
from apical.packing import PackedCollator

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    # large weights: what a token attends to must show in what it predicts
    "initializer_range": 0.3,
}
DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
FEATURES = [{"input_ids": ids} for ids in DOCUMENTS]
ALL = [5, 6, 7, 8, 9, 10, 11, 12, 13]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        (torch.equal(value, other[key]) and value.dtype == other[key].dtype)
        if isinstance(value, torch.Tensor)
        else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("start", [0, 2])  # 2: the RoBERTa family
@pytest.mark.parametrize(
    "kind",
    [list, torch.tensor, np.array],  # as lists come from datasets; with set_format; from loops
)
def test_the_row_is_that_of_transformers(start, kind):
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    features = [{"input_ids": kind(ids), "labels": kind([2 * n for n in ids])} for ids in DOCUMENTS]
    expected = dict(theirs(features, return_tensors="pt"))
    # its own option for the start is younger than the oldest transformers that is supported
    expected["position_ids"] = expected["position_ids"] + start
    assert same(PackedCollator(position_start=start)(features), expected)


def test_without_labels_the_tokens_are_the_labels():
    row = PackedCollator()(FEATURES)
    assert row["labels"].tolist() == [[-100, 6, 7, -100, -100, 10, 11, 12, 13]]
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert type(row["max_length_q"]) is type(row["max_length_k"]) is int


def test_the_features_stay_as_they_are():
    features = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([3, 4])}]
    PackedCollator()(features)
    PackedCollator(pad_to_multiple_of=4)(features)
    assert features[0]["labels"].tolist() == [3, 4]


def test_padding_is_dropped_wherever_it_is():
    padded = [
        {"input_ids": [0, 5, 6, 7], "labels": [-100, 5, 6, 7], "attention_mask": [0, 1, 1, 1]},
        {"input_ids": [8, 0], "labels": [8, -100], "attention_mask": [1, 0]},
        BatchEncoding({"input_ids": [9, 10, 0, 11, 12, 13], "attention_mask": [1, 1, 0, 1, 1, 1]}),
    ]
    padded[2]["labels"] = padded[2]["input_ids"]
    assert same(PackedCollator()(padded), PackedCollator()(FEATURES))


def test_documents_inside_a_row_are_documents():
    rows = [
        {"input_ids": DOCUMENTS[0] + DOCUMENTS[1], "seq_lengths": torch.tensor([3, 1])},
        {"input_ids": DOCUMENTS[2], "seq_lengths": [5]},
    ]
    assert same(PackedCollator()(rows), PackedCollator()(FEATURES))


def test_columns_that_are_none_are_not_there():
    features = [feature | {"labels": None, "seq_lengths": None} for feature in FEATURES]
    assert same(PackedCollator()(features), PackedCollator()(FEATURES))


def test_documents_without_tokens_are_left_out():
    empty = {"input_ids": []}
    features = [empty, FEATURES[0], empty, *FEATURES[1:], empty]
    assert same(PackedCollator()(features), PackedCollator()(FEATURES))
    inside = [{"input_ids": ALL, "seq_lengths": [0, 3, 0, 1, 5, 0]}]
    assert same(PackedCollator()(inside), PackedCollator()(FEATURES))


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_tokens_outside_of_a_loss_mask_have_no_label(name):
    features = [
        {"input_ids": [5, 6, 7], name: [0, 0, 1]},
        {"input_ids": [0, 8, 9], "attention_mask": [0, 1, 1], name: [1, 1, 1]},
    ]
    assert PackedCollator()(features)["labels"].tolist() == [[-100, -100, 7, -100, 9]]


def test_token_types_go_along():
    features = [f | {"token_type_ids": [1] * len(f["input_ids"])} for f in FEATURES]
    row = PackedCollator(pad_to_multiple_of=5)(features)
    assert row["token_type_ids"].tolist() == [[1] * 9 + [0]]


def test_neighbours_of_one_group_are_one_document():
    features = [f | {"group": g} for f, g in zip(FEATURES, ["a", "a", None], strict=True)]
    row = PackedCollator()(features)
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert row["cu_seq_lens_q"].tolist() == [0, 4, 9]
    assert row["max_length_k"] == 5
    # the 8 is predicted from what comes before it
    assert row["labels"].tolist() == [[-100, 6, 7, 8, -100, 10, 11, 12, 13]]
    row = PackedCollator(predict_across=False)(features)
    assert row["labels"].tolist() == [[-100, 6, 7, -100, -100, 10, 11, 12, 13]]
    assert row["cu_seq_lens_q"].tolist() == [0, 4, 9]


@pytest.mark.parametrize(
    ("groups", "bounds"),
    [
        ([1, 2, 1], [0, 3, 4, 9]),  # the same group, but not next to each other
        ([None, None, None], [0, 3, 4, 9]),  # None is no group
        ([0, 0, 0], [0, 9]),  # 0 is one
        ([torch.tensor(3), torch.tensor(3), torch.tensor(4)], [0, 4, 9]),
    ],
)
def test_groups_are_runs(groups, bounds):
    features = [f | {"group": g} for f, g in zip(FEATURES, groups, strict=True)]
    assert PackedCollator()(features)["cu_seq_lens_k"].tolist() == bounds


@pytest.mark.parametrize("groups", [[1, 1, 2], torch.tensor([1, 1, 2]), np.array([1, 1, 2])])
def test_a_row_has_a_group_for_each_document(groups):
    row = {"input_ids": ALL, "seq_lengths": [3, 1, 5], "group": groups}
    following = {"input_ids": [14], "group": 2}
    assert PackedCollator()([row, following])["cu_seq_lens_q"].tolist() == [0, 4, 10]


def test_an_empty_document_does_not_part_a_group():
    features = [FEATURES[0] | {"group": 1}, {"input_ids": []}, FEATURES[1] | {"group": 1}]
    assert PackedCollator()(features)["cu_seq_lens_q"].tolist() == [0, 4]


@pytest.mark.parametrize(
    ("multiple", "bounds"),
    [
        (9, [0, 3, 4, 9]),  # nothing is missing
        (8, [0, 3, 4, 9, 14, 16]),  # the longest document has 5 tokens: 5 and 2
        (7, [0, 3, 4, 9, 14]),  # exactly one
        (2, [0, 3, 4, 9, 10]),  # one token
    ],
)
def test_padding_is_documents_of_its_own(multiple, bounds):
    row = PackedCollator(pad_to_multiple_of=multiple, pad_token_id=3, position_start=2)(FEATURES)
    plain = PackedCollator(position_start=2)(FEATURES)
    assert row["cu_seq_lens_q"].tolist() == bounds
    assert row["max_length_q"] == 5
    for name in ("input_ids", "labels", "position_ids"):
        assert row[name].shape == (1, bounds[-1])
        assert torch.equal(row[name][:, :9], plain[name])
    assert (row["input_ids"][:, 9:] == 3).all()
    assert (row["labels"][:, 9:] == -100).all()
    lengths = np.diff(bounds)
    assert row["position_ids"][0].tolist() == [2 + i for n in lengths for i in range(n)]


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, **options)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("multiple", [None, 8])
def test_a_model_sees_each_document_alone(multiple):
    model = llama()
    alone = [model(torch.tensor([ids])).logits for ids in DOCUMENTS]
    losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in DOCUMENTS]
    row = PackedCollator(pad_to_multiple_of=multiple)(FEATURES)
    output = use_kernels(model, loss=False)(**row)
    assert (output.logits[:, :9] - torch.cat(alone, 1)).abs().max() <= 1e-10
    assert output.logits.isfinite().all()
    # two tokens and four are predicted, and none of the document of one token
    assert abs(output.loss - (2 * losses[0] + 4 * losses[2]) / 6) <= 1e-6


def test_a_model_sees_across_a_group():
    model = llama()
    together = torch.tensor([DOCUMENTS[0] + DOCUMENTS[1]])
    expected = model(together, labels=together)
    features = [feature | {"group": 0} for feature in FEATURES[:2]]
    output = use_kernels(model, loss=False)(**PackedCollator()(features))
    assert (output.logits - expected.logits).abs().max() <= 1e-10
    assert abs(output.loss - expected.loss) <= 1e-6


def test_masked_models_keep_the_label_of_a_first_token():
    torch.manual_seed(1)
    config = BertConfig(**SHAPE, pad_token_id=0, attention_probs_dropout_prob=0.0)
    model = BertForMaskedLM(config).double().eval()
    labels = [[5, -100, 7], [8], [-100] * 4 + [13]]
    features = [f | {"labels": row} for f, row in zip(FEATURES, labels, strict=True)]
    losses = [
        model(torch.tensor([ids]), labels=torch.tensor([row])).loss
        for ids, row in zip(DOCUMENTS, labels, strict=True)
    ]
    row = PackedCollator(causal=False, pad_to_multiple_of=4)(features)
    loss = use_kernels(model, loss=False)(**row).loss
    assert abs(loss - (2 * losses[0] + losses[1] + losses[2]) / 4) <= 1e-6


def test_masking_is_that_of_transformers():
    special = {5, 13}
    tokenizer = SimpleNamespace(
        mask_token="[MASK]",
        pad_token_id=0,
        convert_tokens_to_ids=lambda token: 4,
        get_special_tokens_mask=lambda ids, **_: [int(n in special) for n in ids],
    )
    masking = DataCollatorForLanguageModeling(
        tokenizer,  # pyright: ignore[reportArgumentType]
        mlm_probability=0.9,
        mask_replace_prob=1.0,
        random_replace_prob=0.0,
    )
    collator = PackedCollator(
        causal=False, mask_tokens=masking.torch_mask_tokens, pad_to_multiple_of=16
    )
    features = [{"input_ids": [5, *range(20, 40), 13]}, {"input_ids": [5, 50, 51, 13]}]
    row = collator(features)
    tokens = torch.tensor(features[0]["input_ids"] + features[1]["input_ids"])
    masked = row["input_ids"][0, :26] == 4
    assert masked.sum() >= 12
    assert not masked[[0, 21, 22, 25]].any()
    assert torch.equal(row["labels"][0, :26], torch.where(masked, tokens, -100))
    assert torch.equal(row["input_ids"][0, :26], torch.where(masked, 4, tokens))
    assert (row["labels"][0, 26:] == -100).all()
    assert (row["input_ids"][0, 26:] == 0).all()


def test_it_can_be_sent_to_workers():
    collator = PackedCollator(pad_to_multiple_of=4)
    assert same(pickle.loads(pickle.dumps(collator))(FEATURES), collator(FEATURES))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], r"features hold no token in 0 rows"),
        ([{"input_ids": []}], r"features hold no token in 1 rows"),
        ([{"text": "a"}], r"feature 0 has no input_ids, only \['text'\].*remove_unused_columns"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"feature 0: labels has shape \(1,\).*\(2,\)"),
        ([{"input_ids": [[1, 2]]}], r"feature 0: input_ids has shape \(1, 2\)"),
        ([{"input_ids": [1], "position_ids": [0]}], r"position_ids, which are made here"),
        ([{"input_ids": [1], "seq_lengths": [2]}], r"seq_lengths are \[2\].* sum to its 1 tokens"),
        ([{"input_ids": [1], "seq_lengths": [2, -1]}], r"seq_lengths are \[2, -1\]"),
        ([{"input_ids": [1], "group": [1, 2]}], r"group has 2 entries, expected one for each of"),
        (
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [2], "token_type_ids": [0]}],
            r"same co",
        ),
        ([{"input_ids": [1] * 5}] * 2, r"2 features hold 10 tokens, max_tokens is 9: lower"),
    ],
)
def test_what_cannot_be_packed_is_refused(features, message):
    with pytest.raises(ValueError, match=message):
        PackedCollator(max_tokens=9)(features)


def test_as_many_tokens_as_allowed_are_fine():
    assert same(PackedCollator(max_tokens=9)(FEATURES), PackedCollator()(FEATURES))


def test_contradictions_are_refused():
    def mask(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ids, ids

    with pytest.raises(ValueError, match=r"set causal=False"):
        PackedCollator(mask_tokens=mask)
    with pytest.raises(ValueError, match=r"pad_to_multiple_of is 0, expected 1 or more"):
        PackedCollator(pad_to_multiple_of=0)
    with pytest.raises(ValueError, match=r"feature 0 has no labels: give them, or set mask_tokens"):
        PackedCollator(causal=False)(FEATURES)
    for column in ("labels", "completion_mask"):
        with pytest.raises(
            ValueError, match=r"feature 0 says what to learn .* so does mask_tokens"
        ):
            PackedCollator(causal=False, mask_tokens=mask)([{"input_ids": [1], column: [1]}])
