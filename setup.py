"""Build of the C++ and CUDA library; everything else about the package is in pyproject.toml.

Installing never compiles unless asked: `python setup.py build_ext --inplace` (or `make build`)
builds the library beside the sources, and `APICAL_BUILD=1 pip install .` puts it in the wheel.

Environment: APICAL_CUDA=0 leaves csrc/cuda, if there is any, out even where nvcc is found;
APICAL_CUDA_ARCHS lists the GPU architectures (default "80;90a"); CXX and CXXFLAGS choose and
extend the compiler command.
"""

import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).parent
# the oldest torch whose stable ABI the library uses: 2.11
COMMON = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# contraction: ISO C++ mode would otherwise not use fused multiply-add
CXX_ONLY = ["-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=fast"]
# the same library whatever the folder it is built in: errors name csrc/cpu/..., not a home
CXX_ONLY.append(f"-ffile-prefix-map={ROOT.resolve()}/=")

NINJA_RULES = """\
rule cxx
  command = {cxx} {cxx_flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = C++ $in
rule cuda
  command = {nvcc} {cuda_flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CUDA $in
rule link
  command = {cxx} -shared $in -o $out {link_flags}
  description = link $out
"""


def torch_root() -> Path:
    """Return the folder of the installed torch, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise PlatformError(
            "building the library needs torch: pip install torch, then build without isolation"
        )
    return Path(spec.origin).parent


def find_program(name: str, *, hint: str) -> str:
    """Return the path of a program, looked for beside this python first."""
    found = shutil.which(
        name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if found is None:
        raise PlatformError(f"building the library needs {name}: {hint}")
    return found


def find_nvcc() -> str | None:
    """Return nvcc, or None where there is none or APICAL_CUDA=0 forbids it."""
    if os.environ.get("APICAL_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuda_root(nvcc: str) -> Path:
    """Return the toolkit's folder; asked of nvcc itself, because nvcc may be a wrapper script."""
    dryrun = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    said = subprocess.run(dryrun, capture_output=True, text=True, check=False).stderr
    tops = [line.partition("TOP=")[2] for line in said.splitlines() if line.startswith("#$ TOP=")]
    if not tops:
        raise PlatformError(
            f"{nvcc} does not name its toolkit; set APICAL_CUDA=0 to leave CUDA out"
        )
    return Path(tops[0]).resolve()


def architecture_flags() -> list[str]:
    """Return nvcc's flags: code per architecture, and PTX of the portable ones for later GPUs."""
    flags = []
    for arch in os.environ.get("APICAL_CUDA_ARCHS", "80;90a").split(";"):
        code = f"sm_{arch}" if arch[-1].isalpha() else f"[sm_{arch},compute_{arch}]"
        flags.append(f"-gencode=arch=compute_{arch},code={code}")
    return flags


def link_flags(torch: Path, nvcc: str | None) -> list[str]:
    """Return the linker's flags; no rpath: torch is always loaded before this library."""
    # libtorch is kept although nothing refers to it: it is what brings in torch's CUDA half
    flags = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"]
    if nvcc:
        flags += [f"-L{cuda_root(nvcc) / 'lib64'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        flags.append("-Wl,--exclude-libs,ALL")
    return flags


def ninja_file(library: Path) -> str:
    """Return the text of build.ninja that builds ``library`` from all of csrc/."""
    torch = torch_root()
    kernels = sorted(ROOT.glob("csrc/cuda/*.cu"))
    nvcc = find_nvcc() if kernels else None
    cxx = os.environ.get("CXX") or find_program("g++", hint="install a C++17 compiler or set CXX")
    include = ["-isystem", str(torch / "include")]
    text = NINJA_RULES.format(
        cxx=cxx,
        cxx_flags=shlex.join(
            COMMON + CXX_ONLY + include + shlex.split(os.environ.get("CXXFLAGS", ""))
        ),
        nvcc=nvcc or "nvcc",
        cuda_flags=shlex.join([*COMMON, "-Xcompiler", "-fPIC", *architecture_flags(), *include]),
        link_flags=shlex.join(link_flags(torch, nvcc)),
    )
    sources = {"cxx": sorted(ROOT.glob("csrc/cpu/*.cpp")), "cuda": kernels if nvcc else []}
    objects = []
    for rule, paths in sources.items():
        for source in paths:
            objects.append(f"{rule}/{source.name}.o")
            text += f"build {objects[-1]}: {rule} {escape(source.resolve())}\n"
    return text + f"build {escape(library)}: link {' '.join(objects)}\n"


def escape(path: Path) -> str:
    """Return a path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles with ninja: in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Write build.ninja into the folder of temporary files and run ninja there."""
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "ninja"
        library.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(library))
        ninja = find_program("ninja", hint="pip install ninja")
        if subprocess.run([ninja, "-C", str(folder)], check=False).returncode:
            raise CompileError("the C++ library did not build; the compiler's message is above")


def library() -> Extension:
    """Return the one library; the limited API is in its name because it has no Python in it."""
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*/*.c*"))]
    return Extension("apical._C", sources=sources, py_limited_api=True)


ASKED = "build_ext" in sys.argv or os.environ.get("APICAL_BUILD") == "1"

setup(
    ext_modules=[library()] if ASKED else [],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ASKED else {},
)
