"""Does a grown checkpoint still compute what the old one does? Both run on a text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from apical._extras import require

from .checkpoint_files import read_headers, with_defaults
from .plan import GrowthPlan
from .progress_bars import without_bars
from .source import for_transformers
from .spaces import architecture_of
from .spaces.naming import Naming
from .widths import complete

TOKENS = 512
# float32 rounds differently in sums that are longer or in another order
_TOLERANCE = 1e-4
# weights are rounded to 16 or 8 bits once, and what they compute moves by some such steps
_STEPS = 8
# every so many-th token of a text is hidden from masked language models
_HIDDEN = 7


@dataclass(frozen=True)
class Verdict:
    """What became of a function.

    Args:
        plan: that changed it.
        what: was compared, "logits" or "hidden states".
        difference: largest difference, relative to the largest value; NaN if there is none.
        tolerance: below which it is rounding.
        losses: before and after, in nats per token; None for a model without a head.
        dtype: of the grown weights, the shortest one.
        tokens: how many were compared.
    """

    plan: GrowthPlan
    what: str
    difference: float
    tolerance: float
    losses: tuple[float, float] | None
    dtype: torch.dtype
    tokens: int

    @property
    def preserved(self) -> bool:
        """Whether the function is what it was, but for rounding."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        apart = f"the largest relative difference of {self.what} is {self.difference:.2g}"
        if self.losses:
            old, new = self.losses
            apart += f", loss {old:.4f} -> {new:.4f} ({new - old:+.4f}) nats per token"
        apart += f", over {self.tokens} tokens"
        if self.preserved:
            exact = self.difference <= _TOLERANCE
            return f"preserved{'' if exact else f' but for rounding in {self.dtype}'}: {apart}"
        if self.plan.preserves_function:
            return f"NOT preserved, although the plan says so: {apart}"
        return "\n".join([f"changed: {apart}", *(f"because: {note}" for note in self.plan.notes)])


class Probe:
    """A text on which to compare a checkpoint with what is grown out of it.

    Only the tokenizer and the config are read at first, so that mistakes show before hours of work.

    Args:
        source: the old checkpoint: a directory, a name of the hub or a GGUF file.
        text: a file of UTF-8, of which the first 512 tokens are used.

    Raises:
        FileNotFoundError: the text is not there.
        ValueError: it has less than two tokens, or the checkpoint no tokenizer.
        OSError: `source` is not there.
    """

    def __init__(self, source: str | Path, text: str | Path) -> None:
        self._transformers = require("transformers", extra="hf", what="--verify")
        self._where = for_transformers(source)
        if not Path(text).is_file():
            raise FileNotFoundError(f"{text} is no file; expected a text in UTF-8")
        self._config = self._transformers.AutoConfig.from_pretrained(**self._where)
        limit = min(TOKENS, getattr(self._config, "max_position_embeddings", TOKENS))
        tokenizer = self._tokenizer()
        # some families keep the first positions for themselves
        content = Path(text).read_text(encoding="utf-8")
        ids = tokenizer.encode(content)[: limit - 2]
        if len(ids) < 2:
            raise ValueError(f"{text} has {len(ids)} tokens; expected a text of two or more")
        self._tokens = torch.tensor([ids])  # (1, T)
        self._mask = tokenizer.mask_token_id

    def compare(self, out: str | Path, plan: GrowthPlan) -> Verdict:
        """Load both checkpoints, one after the other, in float32, and compare what they compute.

        Args:
            out: the directory that was grown.
            plan: that grew it.
        """
        out = Path(out)
        kind = self._kind(out)
        old, old_loss = self._run(kind, self._where)
        new, new_loss = self._run(kind, {"pretrained_model_name_or_path": str(out)})
        if kind == "AutoModel":
            new = _read_back(new, plan, with_defaults(self._config.to_dict()))
        new = new[..., : old.shape[-1]]
        dtype = max((t.dtype for t in read_headers(out).values()), key=lambda d: torch.finfo(d).eps)
        steps = _STEPS * torch.finfo(dtype).eps
        return Verdict(
            plan,
            "hidden states" if kind == "AutoModel" else "logits",
            float((new - old).abs().max() / old.abs().max()),
            max(_TOLERANCE, min(steps, 0.1)) if dtype.itemsize < 4 else _TOLERANCE,
            None if old_loss is None or new_loss is None else (old_loss, new_loss),
            dtype,
            self._tokens.shape[1],
        )

    def _tokenizer(self) -> Any:
        try:
            return self._transformers.AutoTokenizer.from_pretrained(**self._where)
        except (OSError, ValueError, TypeError) as error:
            why = " ".join(str(error).split())[:120]
            raise ValueError(
                f"{self._where['pretrained_model_name_or_path']} has no tokenizer to read the text "
                f"with; expected its files, or leave out --verify: {why}"
            ) from None

    def _kind(self, out: Path) -> str:
        """Return the class that the config's architectures name, as grown models have it too."""
        auto = self._transformers.models.auto.modeling_auto
        kinds = {
            "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "AutoModelForMaskedLM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        }
        named = self._config.architectures
        for kind, classes in kinds.items():
            if named and classes.get(self._config.model_type) in named:
                return kind
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        whole = Naming.of(architecture_of(config), read_headers(out)).whole_model
        return "AutoModelForCausalLM" if whole and not named else "AutoModel"

    @torch.no_grad()
    def _run(self, kind: str, where: dict[str, str]) -> tuple[Tensor, float | None]:
        with without_bars():
            model = getattr(self._transformers, kind).from_pretrained(**where, dtype="float32")
        if model.main_input_name != "input_ids":
            raise ValueError(f"a {self._config.model_type} reads no text; leave out --verify")
        tokens, targets = self._tokens, torch.full_like(self._tokens, -100)
        if kind == "AutoModelForCausalLM":
            targets[:, :-1] = tokens[:, 1:]
        elif kind == "AutoModelForMaskedLM" and self._mask is not None:
            hidden = torch.arange(tokens.shape[1]) % _HIDDEN == 1
            targets[:, hidden] = tokens[:, hidden]
            tokens = tokens.masked_fill(hidden, self._mask)
        result = model.eval()(input_ids=tokens)[0]
        if kind == "AutoModel" or bool((targets < 0).all()):
            return result, None
        return result, functional.cross_entropy(result[0], targets[0]).item()


def _read_back(states: Tensor, plan: GrowthPlan, config: dict[str, Any]) -> Tensor:
    """Return the old model's hidden states from those of the grown one, as its readers do."""
    table = architecture_of(config)
    maps = complete(table, config, plan.spaces)
    norms = [w for n, w in table.shared.items() if w.norm and n.startswith(table.root)]
    space = norms[-1].axes[0] if norms else "hidden"
    return maps[space].reads.transposed().apply(states, 2) if space in maps else states
