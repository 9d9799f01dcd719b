"""Where a checkpoint comes from: a directory, the Hugging Face hub, or a GGUF file."""

import importlib.util
import re
from pathlib import Path

from apical._extras import require

from .checkpoint_output import COMPANIONS

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def fetched(source: str | Path) -> tuple[Path, str]:
    """Return the directory of a checkpoint, and the name by which to call it.

    Args:
        source: a directory; else what looks like `owner/model` is fetched from the hub, or taken
            from its cache: safetensors, configs and tokenizer, nothing more.

    Raises:
        OSError: the hub has no such model, or is not reached.
    """
    path, name = Path(source), str(source)
    if path.exists() or not _HUB_NAME.fullmatch(name):
        return path, path.resolve().name
    hub = require("huggingface_hub", extra="hf", what="reading from the hub")
    try:
        found = hub.snapshot_download(
            name,
            allow_patterns=["*.safetensors", "*.json", *COMPANIONS],
            # other formats of the same weights lie in folders
            ignore_patterns=["*/*.safetensors", "*/*.json"],
        )
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split()).partition(". ")[0]
        raise OSError(
            f"{name} is no directory here and could not be fetched from the hub ({why}); give the "
            "path of a checkpoint directory"
        ) from None
    return Path(found), name


def gguf_of(source: str | Path) -> Path | None:
    """Return the GGUF file that `source` is, or has if it has no config.json.

    Raises:
        ImportError: it is one, but the package gguf is not installed.
        ValueError: it has several.
    """
    found = _gguf_files(Path(source))
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"{source} has {len(found)} GGUF files; expected one: give the path of one"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {found[0].name} needs the package gguf: pip install gguf")
    return found[0]


def for_transformers(source: str | Path) -> dict[str, str]:
    """Return the arguments with which `from_pretrained` of transformers reads a checkpoint."""
    if file := gguf_of(source):
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    return {"pretrained_model_name_or_path": str(fetched(source)[0])}


def _gguf_files(source: Path) -> list[Path]:
    if source.suffix == ".gguf" and source.is_file():
        return [source]
    if not source.is_dir() or (source / "config.json").exists():
        return []
    return sorted(source.glob("*.gguf"))
