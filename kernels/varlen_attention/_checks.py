"""What a call of packed attention must satisfy, each with one line that says what to do."""

import torch
from torch import Tensor

from .._common.shapes import bind_shapes
from ._rules import UNBOUNDED

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST_HEAD = 256


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q (T, H, D), k (S, K, D) and v (S, K, E) go together."""
    size = bind_shapes(q=(q, "T H D"), k=(k, "S K D"), v=(v, "S K E"))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them"
        )
    if q.dtype not in _DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; expected float16, bfloat16, float32 or float64")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k, v must be on one device, got {q.device}, {k.device} and {v.device}; move them"
        )
    if size["K"] == 0 or size["H"] == 0 or size["H"] % size["K"]:
        raise ValueError(
            f"q has H={size['H']} heads and k has K={size['K']}; "
            "H must be a multiple of K, and none may be 0"
        )
    for letter in "DE":
        if not 0 < size[letter] <= _LARGEST_HEAD:
            raise ValueError(
                f"heads have {letter}={size[letter]} channels; expected 1 to {_LARGEST_HEAD}"
            )


def check_boundaries(q: Tensor, **named: Tensor | None) -> None:
    """Raise ValueError unless boundaries are int32 or int64 vectors of one length, within reach."""
    given = {name: bounds for name, bounds in named.items() if bounds is not None}
    bind_shapes(**{name: (bounds, "N+1") for name, bounds in given.items()})
    for name, bounds in given.items():
        if bounds.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} has dtype {bounds.dtype}; expected int32 or int64")
        if bounds.device not in (q.device, torch.device("cpu")):
            raise ValueError(
                f"{name} is on {bounds.device}; expected cpu or {q.device}, where q is"
            )


def check_window(window_size: tuple[int | None, int | None]) -> tuple[int, int]:
    """Return how many keys a window sees to the left and to the right, or raise ValueError."""
    sides = [-1 if side is None else side for side in window_size]
    if len(sides) != 2 or not all(isinstance(side, int) and side >= -1 for side in sides):
        raise ValueError(
            f"window_size is {window_size}; expected two ints, keys seen to the left and to the"
            " right, each 0 or more, or -1 for all"
        )
    left, right = (UNBOUNDED if side < 0 else min(side, UNBOUNDED) for side in sides)
    return left, right


def check_per_head(q: Tensor, documents: int, **named: Tensor | None) -> None:
    """Raise ValueError unless sinks are (H,) and slopes (H,) or (N, H), on q's device."""
    for name, values in named.items():
        if values is None:
            continue
        # number by number: torch.compile does not know (4,) from (H,) where H may vary
        slopes = name == "alibi_slopes" and values.ndim == 2
        one_per_head = values.ndim == 1 + slopes and values.shape[-1] == q.shape[1]
        if not one_per_head or (slopes and values.shape[0] != documents):
            other = f" or {(documents, q.shape[1])}" * (name == "alibi_slopes")
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; expected {(q.shape[1],)}{other}"
            )
        if values.device != q.device or not values.is_floating_point():
            raise ValueError(
                f"{name} is {values.dtype} on {values.device}; expected floats on {q.device}"
            )


def check_dropout(q: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> None:
    """Raise ValueError unless dropout_p is a probability below 1 and the seed one int64."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected at least 0 and less than 1")
    if dropout_seed is None:
        return
    if dropout_seed.shape != (1,) or dropout_seed.dtype != torch.int64:
        raise ValueError(
            f"dropout_seed is {dropout_seed.dtype} of shape {tuple(dropout_seed.shape)};"
            " expected int64 of shape (1,)"
        )
    if dropout_seed.device != q.device:
        raise ValueError(f"dropout_seed is on {dropout_seed.device}; expected {q.device}")


def check_scores(
    *,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    weights: str,
    global_tokens: int,
) -> None:
    """Raise ValueError unless the options that change scores have a meaning together."""
    if not softcap >= 0.0:
        raise ValueError(f"softcap is {softcap}; expected a positive cap, or 0 for none")
    if weights not in ("softmax", "softplus"):
        raise ValueError(f"weights must be 'softmax' or 'softplus', got {weights!r}")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes requires a gradient, which it has not; detach it")
    extras = {"softcap": softcap != 0.0, "alibi_slopes": alibi_slopes is not None}
    extras |= {"sinks": sinks is not None, "global_tokens": global_tokens != 0}
    if weights == "softplus" and any(extras.values()):
        named = ", ".join(name for name, given in extras.items() if given)
        raise ValueError(f"weights='softplus' has no {named}; leave it out")


def check_reweight(
    reweight: tuple[float, float] | None, weights: str, *, left: int, right: int
) -> None:
    """Raise ValueError unless the second stage has a first, and queries that see few keys begin."""
    if reweight is None:
        return
    if weights != "softplus":
        raise ValueError("reweight goes with weights='softplus'; leave it out")
    if len(reweight) != 2 or not reweight[0] > 0.0:
        raise ValueError(f"reweight is {reweight}; expected (power, offset), the power above 0")
    if left < UNBOUNDED and right:
        raise ValueError("reweight with a window to both sides is not defined; set causal=True")


def check_global(
    q: Tensor,
    k: Tensor,
    global_tokens: int,
    left: int,
    causal: bool,
    *,
    q_global: Tensor | None,
    k_global: Tensor | None,
) -> None:
    """Raise ValueError unless global tokens come with a causal window, and a pair with them."""
    if global_tokens < 0:
        raise ValueError(f"global_tokens is {global_tokens}; expected 0 or more")
    if global_tokens and (not causal or left == UNBOUNDED):
        raise ValueError(
            "global_tokens are the keys seen beyond a causal window; set causal=True and the left"
            " side of window_size"
        )
    for name, tensor, like in (("q_global", q_global, q), ("k_global", k_global, k)):
        if tensor is None:
            continue
        if not global_tokens:
            raise ValueError(f"{name} is for global_tokens, of which there are 0; leave it out")
        sizes = tensor.ndim == 3 and all(
            a == b for a, b in zip(tensor.shape, like.shape, strict=True)
        )
        if not sizes or tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(
                f"{name} must be as {name[0]}, {like.dtype} of shape {tuple(like.shape)} on"
                f" {like.device}; got {tensor.dtype} of shape {tuple(tensor.shape)} on"
                f" {tensor.device}"
            )
