"""`python bench/machine_code.py`: registers and instructions of the Triton kernels.

Compiles what a launch would pick on sm_80 and sm_90, without a GPU, and prints it as a Markdown
table. Bytes of stack are registers that spilled; nothing here is a time.
"""

import argparse
from typing import Any, NamedTuple

import torch
import triton

from apical.kernels._common.ahead_of_time import Launch, picked, recorded
from apical.kernels._common.triton_launch import compiled_by
from apical.kernels.linear_cross_entropy import _triton as loss
from apical.kernels.linear_cross_entropy import _triton_launch as loss_launch
from apical.kernels.linear_cross_entropy._rules import Rules as LossRules
from apical.kernels.sparse_low_rank import Support
from apical.kernels.sparse_low_rank import _triton as blocks
from apical.kernels.sparse_low_rank import _triton_launch as blocks_launch
from apical.kernels.varlen_attention import PackedLayout, _triton_backward, _triton_forward
from apical.kernels.varlen_attention._rules import UNBOUNDED, Rules

HEADS, LONG, SHORT = 16, 1024, 200
_FULL = Rules(None, None, None, None, 0.125, UNBOUNDED, UNBOUNDED, UNBOUNDED, "none", 0.0, 0.0, 0.0)
_CAUSAL = _FULL._replace(right=0)
_HEADER = (
    "kernel", "GPU", "dtype", "head", "tokens", "rules", "loads", "tile", "warps", "registers",
    "stack, B", "shared, KiB", "instructions",
)  # fmt: skip


def rules_of_interest() -> dict[str, Rules]:
    """Return masks and scores, each by the name of its row."""
    gain, seed = _meta(LONG, HEADS), torch.empty(1, dtype=torch.int64, device="meta")
    return {
        "causal": _CAUSAL,
        "full": _FULL,
        "window": _CAUSAL._replace(left=127),
        "alibi": _CAUSAL._replace(alibi_slopes=_meta(HEADS)),
        "sinks": _CAUSAL._replace(sinks=_meta(HEADS)),
        "softcap": _CAUSAL._replace(transform="softcap", a=50.0),
        "dropout": _CAUSAL._replace(seed=seed, dropout=0.1),
        "softplus": _CAUSAL._replace(transform="softplus"),
        "power": _CAUSAL._replace(transform="power", a=15.0, b=0.5, gain=gain),
    }


def launches(
    capability: int, rules: Rules, *, tokens: int, head_size: int, dtype: torch.dtype
) -> list[Launch]:
    """Return what one forward and one backward pass launch."""
    q = torch.empty(tokens, HEADS, head_size, dtype=dtype, device="meta")
    layout = PackedLayout.from_lengths([tokens])
    if rules.gain is not None:
        rules = rules._replace(gain=rules.gain[:tokens])
    with recorded(capability, _triton_forward, _triton_backward) as found:
        out, lse = _triton_forward.forward(q, q, q, layout, rules)
        _triton_backward.backward(out, None, q, q, q, out, lse, layout, rules)
    return found


def row(launch: Launch, capability: int, *, tokens: int, rules: str) -> tuple[object, ...]:
    """Return one line of the table."""
    q = launch.arguments["q_ptr"]
    case = (
        launch.kernel.__name__.removesuffix("_kernel"),
        f"sm_{capability}",
        str(q.dtype).removeprefix("torch."),
        launch.arguments["D"],
        tokens,
        rules,
    )
    found = picked(launch, capability)
    if found is None:
        return *case, "nothing fits", *[""] * (len(_HEADER) - len(case) - 1)
    choice, machine = found
    kinds = [name for name, on in (("TMA", choice.tma), ("own warps", machine.specialized)) if on]
    counts = " ".join(f"{name} {n}" for name, n in machine.instructions.items() if n)
    return (
        *case,
        ", ".join(kinds) or "pointers",
        f"{choice.queries} x {choice.keys}",
        machine.warps,
        machine.registers,
        machine.stack,
        machine.shared // 1024,
        counts,
    )


class Loss(NamedTuple):
    """What is asked of the loss in some rows of its table: a forward, or a backward `again`."""

    name: str
    rules: LossRules = LossRules(smoothing=0.0, z_loss=0.0, softcap=0.0, logit_scale=1.0)
    bias: bool = False
    labels: int = 1
    filtered: bool = False
    again: bool = False
    dtype: torch.dtype = torch.bfloat16
    sizes: tuple[int, int, int] = (4096, 1024, 32768)  # tokens, width, vocabulary


_GEMMA = LossRules(smoothing=0.0, z_loss=1e-4, softcap=30.0, logit_scale=1.0)
_SMOOTH = LossRules(smoothing=0.1, z_loss=0.0, softcap=0.0, logit_scale=1.0)
_EVERY = LossRules(smoothing=0.1, z_loss=1e-4, softcap=30.0, logit_scale=0.5)
LOSSES = (
    Loss("plain"),
    Loss("filtered", filtered=True),
    Loss("softcap and z-loss", _GEMMA),
    Loss("smoothing, bias, 5 labels", _SMOOTH, bias=True, labels=5),
    Loss("per token, plain", again=True),
    Loss("per token, every option", _EVERY, bias=True, labels=5, again=True),
    Loss("odd sizes, two chunks", sizes=(40000, 1023, 50257)),
    Loss("float16", dtype=torch.float16),
)


def loss_launches(capability: int, case: Loss) -> list[Launch]:
    """Return what one loss with all gradients launches."""
    (T, H, V), half = case.sizes, {"dtype": case.dtype, "device": "meta"}
    x, w = torch.empty(T, H, **half), torch.empty(V, H, **half)
    bias, classes = (torch.empty(V, **half), _meta(V)) if case.bias else (None, None)
    ids = torch.empty(T, case.labels, dtype=torch.int64, device="meta")
    operands, wanted = (x, w, bias, ids, _meta(T, case.labels), classes), (True, True, case.bias)
    with recorded(capability, loss_launch) as found:
        if case.again:
            rows = _meta(T), torch.empty(T, dtype=torch.bool, device="meta")
            loss.backward(_meta(T), _meta(T), _meta(T), *operands, *rows, *case.rules, *wanted)
        else:
            loss.forward(*operands, _meta(T), *case.rules, *wanted, filtered=case.filtered)
    return found


def compiled_alike(launch: Launch) -> tuple[object, ...]:
    """Return all that decides what a launch of the loss compiles."""
    dtypes = [getattr(value, "dtype", None) for value in launch.arguments.values()]
    aligned = [isinstance(v, int) and v % 16 == 0 for v in launch.arguments.values()]
    return launch.kernel, *dtypes, *aligned, *compiled_by(launch.arguments), *launch.choices


def blocks_launches(capability: int, size: int, tokens: int, dtype: torch.dtype) -> list[Launch]:
    """Return what both passes of a square layer with blocks launch, of a rank of size / 4."""
    support = Support("grouped", size, size, 0.03)
    shapes = (tokens, size), (size // 4, size), (size, size // 4), (support.stored,), (size,)
    x, a, b, values, bias = (torch.empty(n, dtype=dtype, device="meta") for n in shapes)
    rest = list(support.index("meta")), [1, size, size, *support.block], 0.25
    with recorded(capability, blocks_launch) as found:
        out, hidden = blocks.forward(x, a, b, values, bias, *rest)
        blocks.backward(out, x, a, b, values, hidden, *rest, [True] * 5)
    return found


def loss_row(launch: Launch, capability: int, case: str) -> tuple[object, ...]:
    """Return one line of the table of the loss, or of layers with blocks."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    found = picked(launch, capability)
    if found is None:
        return name, f"sm_{capability}", case, "nothing fits", *[""] * 6
    choice, machine = found
    sizes = [
        choice.constants[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if x in choice.constants
    ]
    tile = " x ".join(map(str, sizes))
    counts = " ".join(f"{name} {n}" for name, n in machine.instructions.items() if n)
    loads = "TMA" if choice.constants.get("TMA") else "pointers"
    sizes = machine.warps, machine.registers, machine.stack, machine.shared // 1024
    return name, f"sm_{capability}", case, loads, tile, *sizes, counts


def cases(*, every: bool) -> list[dict[str, Any]]:
    """Return capability, rules, tokens, head size and dtype of each row: a few, or all."""
    half = torch.bfloat16
    found = [
        {"capability": c, "rules": "causal", "tokens": n, "head_size": d, "dtype": half}
        for c in (80, 90)
        for n in (LONG, SHORT)
        for d in ((64, 80, 128, 256) if every else (64, 128))
    ]
    names = list(rules_of_interest())[1:] if every else ["full"]
    for name in names:
        found += [
            {"capability": 90, "rules": name, "tokens": LONG, "head_size": d, "dtype": half}
            for d in (64, 128)
        ]
    sizes = (64, 128, 256) if every else ()
    return found + [
        {"capability": c, "rules": "causal", "tokens": LONG, "head_size": d, "dtype": torch.float32}
        for c in (80, 90)
        for d in sizes
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="bench/machine_code.py", description=__doc__)
    parser.add_argument("--every", action="store_true", help="all rules, sizes and dtypes: minutes")
    parser.add_argument("--loss", action="store_true", help="the loss alone")
    parser.add_argument("--blocks", action="store_true", help="layers with blocks alone")
    options = parser.parse_args()
    one = options.loss or options.blocks
    if not one:
        print_attention(every=options.every)
    if options.loss or not one:
        print_loss()
    if options.blocks or not one:
        print_blocks()


def print_attention(*, every: bool) -> None:
    """Print the table of attention's kernels."""
    print(f"Triton {triton.__version__}, {HEADS} heads, one document; nothing was run.\n")
    print("| " + " | ".join(_HEADER) + " |\n" + "|---" * len(_HEADER) + "|")
    for case in cases(every=every):
        capability, name = case.pop("capability"), case.pop("rules")
        for launch in launches(capability, rules_of_interest()[name], **case):
            cells = row(launch, capability, tokens=case["tokens"], rules=name)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_loss() -> None:
    """Print the table of the loss's kernels: of those that several cases share, once."""
    (T, H, V), header = LOSSES[0].sizes, ("loss kernel", "GPU", "case", "loads", "tile")
    print(f"\nTriton {triton.__version__}, {T} tokens, width {H}, vocabulary {V}, bfloat16 unless")
    print("said otherwise; a kernel that several cases share is in the first. Nothing was run.\n")
    header = *header, *_HEADER[-5:]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for capability in (80, 90):
        seen: set[tuple[object, ...]] = set()
        for case in LOSSES:
            for launch in loss_launches(capability, case):
                key = compiled_alike(launch)
                if key not in seen:
                    cells = loss_row(launch, capability, case.name)
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                seen.add(key)


def print_blocks() -> None:
    """Print the table of the kernels of sparse plus low-rank layers with blocks."""
    print(f"\nTriton {triton.__version__}, density 0.03, rank size / 4. Nothing was run.\n")
    header = "layer's kernel", "GPU", "case", "loads", "tile", *_HEADER[-5:]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for capability in (80, 90):
        for size, tokens in ((4096, 16384), (1024, 2048)):
            for dtype in (torch.bfloat16, torch.float32):
                name = f"{size} x {size}, {tokens} tokens, {dtype}".replace("torch.", "")
                for launch in blocks_launches(capability, size, tokens, dtype):
                    cells = loss_row(launch, capability, name)
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


if __name__ == "__main__":
    main()
