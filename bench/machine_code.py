"""`python bench/machine_code.py`: registers and instructions of the Triton kernels.

Compiles what a launch would pick on sm_80 and sm_90, without a GPU, and prints it as a Markdown
table. Bytes of stack are registers that spilled; nothing here is a time.
"""

import argparse
from typing import Any

import torch
import triton

from apical.kernels._common.ahead_of_time import Launch, picked, recorded
from apical.kernels.linear_cross_entropy import _triton as loss
from apical.kernels.linear_cross_entropy import _triton_launch as loss_launch
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


def loss_launches(capability: int, dtype: torch.dtype) -> list[Launch]:
    """Return what one loss with both gradients launches, of 4096 tokens and 32768 classes."""
    x, w = (torch.empty(n, 1024, dtype=dtype, device="meta") for n in (4096, 32768))
    ids = torch.zeros(4096, 1, dtype=torch.int64, device="meta")
    labels = ids, _meta(4096, 1), None, _meta(4096)
    with recorded(capability, loss_launch) as found:
        loss.forward(x, w, None, *labels, 0.0, 0.0, 0.0, 1.0, True, True, False)
    return found


def loss_row(launch: Launch, capability: int) -> tuple[object, ...]:
    """Return one line of the loss's table."""
    name = launch.kernel.__name__.removesuffix("_kernel")
    found = picked(launch, capability)
    if found is None:
        return name, f"sm_{capability}", "nothing fits", *[""] * 6
    choice, machine = found
    sizes = [
        choice.constants[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if x in choice.constants
    ]
    tile = " x ".join(map(str, sizes))
    counts = " ".join(f"{name} {n}" for name, n in machine.instructions.items() if n)
    loads = "TMA" if choice.constants.get("TMA") else "pointers"
    sizes = machine.warps, machine.registers, machine.stack, machine.shared // 1024
    return name, f"sm_{capability}", loads, tile, *sizes, counts


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
    every = parser.parse_args().every
    print(f"Triton {triton.__version__}, {HEADS} heads, one document; nothing was run.\n")
    print("| " + " | ".join(_HEADER) + " |\n" + "|---" * len(_HEADER) + "|")
    for case in cases(every=every):
        capability, name = case.pop("capability"), case.pop("rules")
        for launch in launches(capability, rules_of_interest()[name], **case):
            cells = row(launch, capability, tokens=case["tokens"], rules=name)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print_loss()


def print_loss() -> None:
    """Print the table of the loss's kernels."""
    header = ("loss kernel", "GPU", "loads", "tile", *_HEADER[-5:])
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for capability in (80, 90):
        for launch in loss_launches(capability, torch.bfloat16):
            print("| " + " | ".join(map(str, loss_row(launch, capability))) + " |", flush=True)


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


if __name__ == "__main__":
    main()
