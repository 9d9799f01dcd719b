"""Heads that PEFT wraps: copies that it trains are honoured, low-rank additions refused."""

import copy

import pytest
import torch
from torch import nn

from apical.hf import explain, use_kernels

IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(3))


class ModulesToSaveWrapper(nn.Module):
    """As PEFT's: keeps the original, trains a copy, calls one of both."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict(
            {"default": copy.deepcopy(module).requires_grad_(True)}
        )
        self.disable_adapters = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.original_module if self.disable_adapters else self.modules_to_save["default"]
        return chosen(x)


class LowRank(nn.Module):
    """As PEFT's layer: adds a product of two thin matrices."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.base_layer = module
        self.lora_A = nn.Linear(module.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, module.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)
        dtype = out.dtype
        return (out + self.lora_B(self.lora_A(x))).to(dtype)


def wrap(model, wrapper):
    model.lm_head = wrapper(model.lm_head)
    return model


def step(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": out.loss.detach(), "fused": torch.tensor(out.logits is None)}


def assert_same_step(stock, fused):
    theirs, ours = step(stock), step(fused)
    assert ours.pop("fused")
    assert not theirs.pop("fused")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_copy_that_is_trained_computes_the_loss(build):
    stock = wrap(build("llama").train(), ModulesToSaveWrapper)
    # the copy must not be mistaken for the original
    nn.init.normal_(stock.lm_head.modules_to_save["default"].weight, std=0.3)
    fused = use_kernels(copy.deepcopy(stock), attention=False)
    assert_same_step(stock, fused)
    for model in (stock, fused):
        model.lm_head.disable_adapters = True
    assert_same_step(stock, fused)


def test_a_copy_made_after_the_kernels_is_noticed(build):
    fused = wrap(use_kernels(build("llama").train(), attention=False), ModulesToSaveWrapper)
    with pytest.raises(NotImplementedError, match="did not call its head"):
        fused(IDS, labels=IDS)
    # the copy carries copies of hooks, which must stay silent
    assert_same_step(wrap(build("llama").train(), ModulesToSaveWrapper), use_kernels(fused))


def test_a_low_rank_head_is_refused_before_and_after(build):
    before = wrap(build("llama").train(), LowRank)
    with pytest.raises(NotImplementedError, match=r"adapter.*modules_to_save"):
        use_kernels(before, attention=False)
    assert "adapter" in explain(before).splitlines()[2]
    after = wrap(use_kernels(build("llama").train(), attention=False), LowRank)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM did not call its head"):
        after(IDS, labels=IDS)


# of transformers, which an older peft meets
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_models_of_peft_itself(build, after, saved):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False
    )
    models = []
    for fuse in (False, True):
        model = build("llama")
        if fuse and not after:
            use_kernels(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config).train()
        # a copy of the head is a new head
        if fuse and (after or saved):
            use_kernels(model.get_base_model())
        models.append(model)
    assert_same_step(*models)
