import json
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM


def _run(code, *arguments):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _sparse_checkpoint(directory, config):
    """Write a checkpoint of zeros that takes no room on the disk."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header, offset = {}, 0
    for name, p in model.named_parameters():
        end = offset + 4 * p.numel()
        header[name] = {"dtype": "F32", "shape": list(p.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    directory.mkdir()
    config.save_pretrained(directory)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


# nothing of a copied tensor is in memory; a mapped one is, old and new, also in float32
@pytest.mark.parametrize(("operator", "limit"), [("Stack()", 15), ("Widen(ffn=4224)", 110)])
def test_memory_is_bounded_by_one_tensor(tiny, tmp_path, operator, limit):
    config = tiny("llama-tied").config
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 9}
    config.update(sizes | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64})
    assert _sparse_checkpoint(tmp_path / "small", config) > 400e6
    # the high-water mark of this process alone: ru_maxrss would start at that of the parent
    code = """
        import sys
        from pathlib import Path
        from apical.growth.operators import Stack, Widen
        from apical.growth.checkpoint_files import read_config, with_defaults
        from apical.growth.shards import grow_checkpoint
        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1e3
        with_defaults(read_config(Path(sys.argv[1])))  # imports transformers
        before = peak()
        grow_checkpoint(sys.argv[1], sys.argv[2], eval(sys.argv[3]))
        print(peak() - before)
    """
    done = _run(code, tmp_path / "small", tmp_path / "big", operator)
    assert done.returncode == 0, done.stderr
    # one file of all of the weights
    assert (tmp_path / "big" / "model.safetensors").stat().st_size > 500e6
    assert float(done.stdout) < limit, f"{done.stdout} MB above the baseline"
