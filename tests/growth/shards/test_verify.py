import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apical import cli
from apical.growth.operators import Stack, Widen
from apical.growth.shards import grow_checkpoint
from apical.growth.verify import Probe


@pytest.fixture
def text(tmp_path):
    # ten tokens: more than the windows, fewer than any family's positions
    path = tmp_path / "text.txt"
    path.write_text("w5 w9 w13 w60 w8 w21 w5 w33 w40 w7")
    return path


def _tokenizer(directory):
    words = {f"w{i}": i for i in range(63)} | {"[MASK]": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]")
    fast.save_pretrained(directory)


@pytest.mark.parametrize(
    ("family", "head", "what"),
    [
        ("llama-tied", "CausalLM", "logits"),
        ("bert-tied", "MaskedLM", "logits"),
        ("gpt2-tied", "", "hidden states"),
        ("bert-tied", "", "hidden states"),
    ],
)
def test_what_keeps_the_function_is_preserved(checkpoint, tmp_path, text, family, head, what):
    _, source = checkpoint(family, head=head)
    _tokenizer(source)
    probe = Probe(source, text)
    # all directions twice: hidden states of models without a head are twice as long
    plan = grow_checkpoint(source, tmp_path / "big", Widen(factor=2))
    verdict = probe.compare(tmp_path / "big", plan)
    assert verdict.preserved, verdict
    assert verdict.what == what
    assert (verdict.losses is None) == (head == "")
    assert str(verdict).startswith("preserved: ")


def test_what_changes_it_says_by_how_much_and_why(checkpoint, tmp_path, text):
    model, source = checkpoint("llama-tied")
    _tokenizer(source)
    probe = Probe(source, text)
    plan = grow_checkpoint(source, tmp_path / "big", Stack())
    verdict = probe.compare(tmp_path / "big", plan)
    assert not verdict.preserved
    assert verdict.losses is not None
    ids = torch.tensor([[5, 9, 13, 60, 8, 21, 5, 33, 40, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert verdict.losses[0] == pytest.approx(expected, rel=1e-5)
    assert "changed: " in str(verdict)
    assert all(f"because: {note}" in str(verdict) for note in plan.notes)


def test_16_bits_are_said_to_round(checkpoint, tmp_path, text):
    _, source = checkpoint("llama-tied", dtype=torch.bfloat16)
    _tokenizer(source)
    # one and a half times as wide: copies are scaled by numbers that bfloat16 does not have
    operator = Widen(hidden=48, heads=6, kv_heads=3)
    plan = grow_checkpoint(source, tmp_path / "big", operator)
    verdict = Probe(source, text).compare(tmp_path / "big", plan)
    assert "torch.bfloat16" in str(verdict)
    assert verdict.difference > 1e-4


def test_the_command_line_verifies(checkpoint, tmp_path, text, capsys):
    _, source = checkpoint("llama-tied")
    _tokenizer(source)
    words = ["zero-depth", "--verify", str(text)]
    assert cli.main(["grow", str(source), str(tmp_path / "big"), *words]) == 0
    assert "\npreserved: the largest relative difference of logits is " in capsys.readouterr().out


def test_mistakes_show_before_anything_is_grown(saved, tmp_path, text, capsys):
    out = ["grow", str(saved), str(tmp_path / "big"), "stack", "--verify"]
    assert cli.main([*out, str(text)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    _tokenizer(saved)
    assert cli.main([*out, str(tmp_path / "none")]) == 2
    assert "none is no file" in capsys.readouterr().err
    text.write_text("w1")
    assert cli.main([*out, str(text)]) == 2
    assert "has 1 tokens; expected a text of two or more" in capsys.readouterr().err
    assert not list(tmp_path.glob("big*"))
