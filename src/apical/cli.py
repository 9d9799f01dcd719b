"""The `apical` command: what a user got wrong becomes one line and exit code 2."""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from . import __version__

# what transformers and datasets print by themselves says nothing to the user of a command
_QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# waiting threads sleep: spinning ones make a busy machine several times slower for all
_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
_EXTRAS = {
    "train": "apical[train]",
    "grow": "apical[hf]",
    "sparsify": "apical[hf]",
    "export-dense": "apical[hf]",
    "merge": "apical[hf]",
    "bench": "apical[bench]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: without the program's name; those of the process unless given.

    Raises:
        SystemExit: the help was asked for, or the arguments are not understood.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if arguments == ["--version"]:
        print(f"apical {__version__}")
        return 0
    debug = "--debug" in arguments
    _set_up(debug=debug)
    try:
        # here, because tyro may be missing
        from .commands import run

        if text := run(arguments):
            print(text)
        return 0
    except KeyboardInterrupt:
        print("apical: interrupted", file=sys.stderr)
        return 130
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        print(f"apical: error: {_one_line(error, arguments)}", file=sys.stderr)
        return 2


def _set_up(*, debug: bool) -> None:
    for name, value in (_QUIET | _THREADS).items():
        os.environ.setdefault(name, value)
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")


def _one_line(error: Exception, arguments: Sequence[str]) -> str:
    missing = isinstance(error, ModuleNotFoundError) and error.name
    # a module of ours that is missing is not the user's to install
    if missing and not missing.startswith("apical"):
        package = missing.partition(".")[0]
        command = next((word for word in arguments if word in _EXTRAS), "")
        what = f"'{_EXTRAS[command]}'" if command and package != "tyro" else package
        return f"apical {command}".strip() + f" needs the package {package}: pip install {what}"
    text = re.sub(r"\[Errno \d+\] ", "", " ".join(str(error).split()))
    return text or type(error).__name__
