"""Supports by rows on GPUs: the kernel of the rebuilt weight without a GPU, and both passes."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apical.kernels.sparse_low_rank import Support, _cuda

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "sparse_low_rank.cu"
SCALE = 0.3
# half a unit in the last place of a result: a weight is rounded once
ROUNDED = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Any:
    """The kernel compiled for the CPU, a thread for every CUDA thread."""
    path = tmp_path_factory.mktemp("kernel") / "kernel.so"
    flags = ["-std=c++20", "-O2", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-pthread"]
    source = Path(__file__).with_name("sparse_low_rank_on_cpu.cpp")
    subprocess.run(["g++", *flags, source, "-o", path], check=True)
    return ctypes.CDLL(str(path)).rebuild


def operands(
    n: int, m: int, rank: int, support: Support, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (rank, m), (n, rank), (support.stored,)
    a, b, values = (torch.randn(shape).to(dtype) for shape in shapes)
    return a, b, values


def exact(a: Tensor, b: Tensor, values: Tensor, support: Support) -> Tensor:
    weight = SCALE * b.double() @ a.double()
    # values follow the order of the positions
    return weight.flatten().index_add(0, support.flat(), values.double()).view_as(weight)


def rebuilt(kernel: Any, a: Tensor, b: Tensor, values: Tensor, support: Support) -> Tensor:
    starts, columns, *_ = support.index("cpu")
    out = a.new_empty(len(b), a.shape[1])
    tensors = a, b, values, starts, columns, out
    pointers = (ctypes.c_void_p * 6)(*(x.data_ptr() for x in tensors))
    sizes = (ctypes.c_int64 * 3)(len(b), a.shape[1], len(a))
    dtype = {torch.float32: 4, torch.bfloat16: 2, torch.float16: -2}[a.dtype]
    vectors = not (a.shape[1] % 8 or len(a) % 8)
    kernel(pointers, ctypes.c_float(SCALE), sizes, dtype, vectors)
    return out


def check_weight(actual: Tensor, true: Tensor) -> None:
    # sums of 0.3 times up to 200 products: none is much larger than 20
    budget = ROUNDED[actual.dtype] * true.abs() + 2e-5
    assert ((actual.double() - true).abs() <= budget).all()


@needs_compiler
@pytest.mark.parametrize(
    ("n", "m", "rank", "dtype"),
    [
        # several tiles each way, the last ones cut; more steps than stages
        pytest.param(150, 272, 200, torch.bfloat16, id="vectors"),
        # a rank that ends inside a step, one tile
        pytest.param(40, 64, 40, torch.float16, id="float16"),
        # rows at no multiple of 16 bytes
        pytest.param(131, 133, 35, torch.bfloat16, id="scalars"),
        # fewer steps than stages
        pytest.param(3, 130, 1, torch.float16, id="rank-1"),
        pytest.param(131, 133, 35, torch.float32, id="float32"),
    ],
)
def test_kernel_on_the_cpu(kernel, n, m, rank, dtype):
    support = Support("uniform", n, m, 0.05, seed=1)
    given = operands(n, m, rank, support, dtype)
    check_weight(rebuilt(kernel, *given, support), exact(*given, support))


@needs_compiler
def test_entries_at_the_edges_of_tiles(kernel):
    # first and last of a tile, empty rows, a full row
    positions = torch.cat([torch.tensor([0, 127, 128, 255, 256]), 260 * 5 + torch.arange(260)])
    support = Support.explicit(positions, 7, 260)
    a, b, values = operands(7, 260, 4, support, torch.float32)
    check_weight(rebuilt(kernel, a, b, values, support), exact(a, b, values, support))


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_compiles_without_spills(arch, tmp_path):
    include = str(Path(torch.__file__).parent / "include")
    flags = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-arch={arch}"]
    command = ["nvcc", "-cubin", "-Xptxas", "-v", *flags, "-isystem", include, SOURCE]
    run = subprocess.run(
        [*command, "-o", tmp_path / "cubin"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    # two halves, each with and without vectors, and float32
    assert spilled == [("0", "0")] * 5
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", run.stderr)]
    # two blocks of 256 threads share 65536 registers
    assert len(registers) == 5
    assert max(registers) <= 128


SUPPORTS = {
    # rows without an entry, too
    "uniform": Support("uniform", 30, 24, 0.02, seed=5),
    "regular": Support("regular", 30, 24, 0.1, seed=5),
    "nm": Support("nm", 30, 24, 0.5, seed=5),
    "explicit": Support.explicit(torch.tensor([700, 3, 24, 719]), 30, 24),
}
NAMES = "input", "a", "b", "values", "bias"


def passes(
    kind: str, dtype: torch.dtype, *, bias: bool = True
) -> tuple[Any, Any, Tensor, tuple[Tensor, ...]]:
    """Return the arguments of the forward pass, those after values, and the truth in float64."""
    support = SUPPORTS[kind]
    x = torch.randn(11, 24).to(dtype)
    a, b, values = operands(30, 24, 5, support, dtype)
    leaves = [t.double().requires_grad_() for t in (x, a, b, values, torch.randn(30).to(dtype))]
    weight = torch.zeros(720, dtype=torch.float64).index_put((support.flat(),), leaves[3])
    weight = SCALE * leaves[2] @ leaves[1] + weight.view(30, 24)
    out = torch.nn.functional.linear(leaves[0], weight, leaves[4] if bias else None)
    grads = torch.autograd.grad(out.square().sum() / 2, leaves, allow_unused=True)
    given = [x, a, b, values, leaves[4].detach().to(dtype) if bias else None]
    rest = [list(support.index("cpu")), [0, 30, 24, 0, 0], SCALE]
    return given, rest, out.detach(), tuple(g for g in grads if g is not None)


def relative(actual: Tensor, true: Tensor) -> float:
    return ((actual.double() - true).norm() / true.norm()).item()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes on the CPU: what the kernel would make is made in float64, and rounded."""

    def made(a: Tensor, b: Tensor, values: Tensor, index: list[Tensor], scale: float) -> Tensor:
        rows = torch.arange(len(b)).repeat_interleave(index[0].diff())
        weight = scale * b.double() @ a.double()
        return weight.index_put((rows, index[1].long()), values.double(), accumulate=True).to(a)

    monkeypatch.setattr(_cuda, "rebuilt", made)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SUPPORTS)
def test_both_passes(kind, dtype):
    given, rest, true, gradients = passes(kind, dtype)
    budget = 1e-6 if dtype == torch.float32 else 1e-2
    out, hidden = _cuda.forward(*given, *rest)
    # what the fake kernel is told
    assert hidden.shape == (0,)
    assert not _cuda.KEEPS_HIDDEN
    assert relative(out, true) <= budget
    x, a, b, values, _ = given
    got = _cuda.backward(true.to(dtype), x, a, b, values, hidden, *rest, wanted=[True] * 5)
    for name, actual, wanted in zip(NAMES, got, gradients, strict=True):
        assert actual.dtype == dtype
        assert relative(actual, wanted) <= budget, name


@pytest.mark.usefixtures("no_gpu")
def test_no_bias():
    given, rest, true, _ = passes("uniform", torch.float32, bias=False)
    assert relative(_cuda.forward(*given, *rest)[0], true) <= 1e-6


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("i", range(5), ids=NAMES)
def test_only_what_is_wanted(i):
    given, rest, true, gradients = passes("uniform", torch.float32)
    wanted = [j == i for j in range(5)]
    x, a, b, values, _ = given
    hidden = torch.empty(0)
    got = _cuda.backward(true.float(), x, a, b, values, hidden, *rest, wanted=wanted)
    assert [x.shape == (0,) for x in got] == [not each for each in wanted]
    assert relative(got[i], gradients[i]) <= 1e-6
