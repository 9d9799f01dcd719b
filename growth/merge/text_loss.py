"""The score of a causal language model on a text file."""

from __future__ import annotations

from pathlib import Path

import torch

from apical._extras import require


def text_loss(directory: str | Path, text: str | Path, *, window: int = 1024) -> float:
    """Return the mean loss of a checkpoint on a text, in nats per token.

    The text is cut into windows, whose first tokens are not predicted.

    Args:
        directory: with config, weights and tokenizer; it is loaded whole.
        text: a file of UTF-8; two tokens at least.
        window: tokens at once; fewer if the model has fewer positions.

    Raises:
        ValueError: the text is too short.
        OSError: a file is missing.

    Source: ours.
    """
    transformers = require("transformers", extra="hf", what="scoring a checkpoint")
    content = Path(text).read_text(encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokens = torch.tensor(tokenizer.encode(content, add_special_tokens=False))  # (T,)
    if len(tokens) < 2:
        raise ValueError(f"{text} has {len(tokens)} tokens; expected a text of two or more")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    window = min(window, getattr(model.config, "max_position_embeddings", window))
    nats = count = 0.0
    with torch.no_grad():
        for part in tokens.split(window):
            if len(part) > 1:
                predicted = len(part) - 1
                nats += model(input_ids=part[None], labels=part[None]).loss.item() * predicted
                count += predicted
    return nats / count
