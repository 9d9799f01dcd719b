"""Masked language models in training: the last layer and the head on labelled tokens alone."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layout import Layout
from .support import body_of

# attribute of a model that holds what undoes the change
_ROWS = "_apical_rows"
_IGNORED = -100  # transformers' label of a token without one


class _Family(NamedTuple):
    """Where a family of models keeps what works on each token by itself."""

    layers: str  # the list of layers, inside the body
    attention: str  # inside a layer: what is given the documents of the batch
    # inside a layer: first and last module of what works on each token by itself
    spans: tuple[tuple[str, str], ...]
    head: str  # inside the model: what is given the last hidden states


_BERT = _Family(
    "encoder.layer",
    "attention",
    (("attention.self.query", "attention.self.query"), ("attention.output", "output")),
    "cls",
)
_FAMILIES = {
    "BertForMaskedLM": _BERT,
    "RobertaForMaskedLM": _BERT._replace(head="lm_head"),
    "CamembertForMaskedLM": _BERT._replace(head="lm_head"),
    "XLMRobertaForMaskedLM": _BERT._replace(head="lm_head"),
    "ElectraForMaskedLM": _BERT._replace(head="generator_predictions"),
    "DistilBertForMaskedLM": _Family(
        "transformer.layer",
        "attention",
        (
            ("attention.q_lin", "attention.q_lin"),
            ("attention.out_lin", "attention.out_lin"),
            ("sa_layer_norm", "output_layer_norm"),
        ),
        "vocab_transform",
    ),
    # queries, keys and values are one product
    "ModernBertForMaskedLM": _Family(
        "layers", "attn", (("attn.Wo", "attn.Wo"), ("mlp_norm", "mlp")), "head"
    ),
}


class _Rows(NamedTuple):
    """The labelled tokens of a batch."""

    batch: Tensor  # (R,) places among all B * S
    real: Tensor  # (R,) places among the tokens that are not padding
    on_host: Tensor  # the latter on the CPU
    tokens: int  # B * S


def last_layer_rows(model: PreTrainedModel, *, active: bool = True) -> PreTrainedModel:
    """Compute the last layer and the head on labelled tokens alone; return the same model.

    In training with labels, whatever works on each token by itself in the last layer (queries,
    output projection, feed-forward, norms) and in the head runs on the tokens whose label is not
    -100. Keys and values need all tokens and get them. With apical's attention, only labelled
    queries attend (not under a window). Loss and gradients are those of the whole computation, up
    to rounding; dropout draws other numbers. `output.logits` has labelled tokens alone,
    (1, R, V) in the order of the batch, and the last hidden states are right only there. In
    evaluation, without labels, or where no token has one, nothing changes.

    Only this instance changes, by module hooks, which ``active=False`` takes away.

    Raises:
        NotImplementedError: the model is of a family, or has an option, that this does not know.

    Source: `subset_idx` of MosaicBERT, Portes et al. 2023, arXiv:2312.17482, which cuts rows after
    attention.
    """
    present = vars(model).pop(_ROWS, None)
    if present is not None:
        present.remove()
    if active:
        reason = rows_refusal(model)
        if reason is not None:
            raise NotImplementedError(f"{type(model).__name__}: {reason}")
        vars(model)[_ROWS] = MaskedRows(model)
    return model


def rows_refusal(model: PreTrainedModel) -> str | None:
    """Return why a model's last layer needs all tokens, or None where it does not."""
    config = model.config
    if type(model).__name__ not in _FAMILIES:
        return f"the last layer is cut down only for {', '.join(_FAMILIES)}"
    if getattr(config, "is_decoder", False):
        return "is_decoder=True: a causal query cannot be moved to another row"
    if getattr(config, "chunk_size_feed_forward", 0):
        return (
            f"chunk_size_feed_forward={config.chunk_size_feed_forward} cuts rows by itself; set 0"
        )
    if getattr(config, "sparse_prediction", False):
        return "sparse_prediction=True cuts the rows of the head by itself; set it to False"
    return None


class MaskedRows:
    """The hooks on one model, until `remove` is called.

    They are bound methods and hold no module: see `PackedAttention`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        family = _FAMILIES[type(model).__name__]
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.head_rows: Tensor | None = None
        self.layer_rows: Tensor | None = None
        self.shape = torch.Size()
        layers = body_of(model).get_submodule(family.layers)
        assert isinstance(layers, nn.ModuleList)
        last = layers[-1]
        attention = last.get_submodule(family.attention)
        self.handles = [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            attention.register_forward_pre_hook(self.enter_layer, with_kwargs=True),
            model.get_submodule(family.head).register_forward_pre_hook(self.enter_head),
        ]
        for first, final in family.spans:
            self.handles += [
                last.get_submodule(first).register_forward_pre_hook(self.gather),
                last.get_submodule(final).register_forward_hook(self.scatter),
            ]

    def remove(self) -> None:
        """Let the model compute all rows again."""
        for handle in self.handles:
            handle.remove()

    def begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the model: keep the labels that count, and tell the last layer."""
        self.head_rows = None
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        labels = arguments.get("labels")
        if not model.training or labels is None:
            return None
        rows = _labelled(labels, arguments.get("attention_mask"))
        if len(rows.batch) == 0:
            return None
        self.head_rows = rows.batch
        kept = labels.flatten()[rows.batch][None]
        return (), arguments | {"labels": kept, "apical_rows": rows}

    def enter_layer(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the last attention: find the rows, and let only those attend.

        They come with the call, so that a layer that is computed again finds its own.
        """
        rows: _Rows | None = kwargs.pop("apical_rows", None)
        self.layer_rows = None
        if rows is not None:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            whole = hidden.shape[0] * hidden.shape[1] == rows.tokens
            self.layer_rows = rows.batch if whole else rows.real
            layout: Layout | None = kwargs.get("apical_layout")
            # a window goes along with the row of a query
            if layout is not None and getattr(attention, "sliding_window", None) is None:
                kwargs["apical_layout"] = layout.with_queries(self.layer_rows, rows.on_host)
        return args, kwargs

    def gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook where a span begins: (B, S, M) to (1, R, M)."""
        rows = self.layer_rows
        if rows is None:
            return None
        self.shape = args[0].shape[:2]
        return tuple(_rows_of(states, rows) for states in args)

    def scatter(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """Forward hook where a span ends: (1, R, M) to (B, S, M), zero elsewhere."""
        if self.layer_rows is None:
            return None
        whole = out.new_zeros(self.shape.numel(), out.shape[-1])
        return whole.index_copy(0, self.layer_rows, out[0]).unflatten(0, self.shape)

    def enter_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of the head: the rows that have a label."""
        if self.head_rows is None:
            return None
        return _rows_of(args[0], self.head_rows), *args[1:]


def _labelled(labels: Tensor, attention_mask: Tensor | None) -> _Rows:
    # one copy instead of one wait for the device per question
    places = (labels.cpu() != _IGNORED).flatten().nonzero().squeeze(1)
    real = places
    if attention_mask is not None:
        mask = attention_mask.cpu().bool().flatten()
        if not mask[places].all():
            raise ValueError(
                "labels of tokens that attention_mask calls padding are not -100; set them to -100"
            )
        real = (mask.cumsum(0) - 1)[places]
    return _Rows(places.to(labels.device), real.to(labels.device), real, labels.numel())


def _rows_of(states: Tensor, rows: Tensor) -> Tensor:
    return states.flatten(0, 1).index_select(0, rows)[None]
