"""Hands an adapter to llama.cpp's own converter."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qlora_ray.errors import ConfigError
from qlora_ray.model.record import Adapter

SCRIPT = "convert_lora_to_gguf.py"
OUT_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def find_converter(llama_cpp: str | None) -> Path:
    """llama.cpp's converter: in the folder named, in $LLAMA_CPP, or on PATH. Raises ConfigError."""
    named = llama_cpp or os.environ.get("LLAMA_CPP")
    if named:
        path = Path(named).expanduser() / SCRIPT
        if not path.is_file():
            raise ConfigError(f"--llama-cpp {named}: holds no {SCRIPT}. Name a checkout of llama.cpp.")
        return path
    found = shutil.which(SCRIPT)
    if found is None:
        raise ConfigError(
            f"--to gguf: llama.cpp's {SCRIPT} was not found. Name a checkout of llama.cpp with --llama-cpp DIR."
        )
    return Path(found)


def convert(adapter: Adapter, output: Path, dtype: str, llama_cpp: str | None) -> None:
    """Write the adapter as a GGUF file. Raises ConfigError where llama.cpp cannot hold it, or its converter fails."""
    converter = find_converter(llama_cpp)
    _refuse_unknown(adapter)
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("adapter_model.safetensors",):
            shutil.copyfile(adapter.folder / name, f"{temporary}/{name}")
        Path(temporary, "adapter_config.json").write_text(json.dumps(as_llama_cpp_reads(adapter.peft)), "utf-8")
        command = [sys.executable, str(converter), temporary, "--base", adapter.base, "--outfile", str(output),
                   "--outtype", OUT_TYPES[dtype]]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0 or not output.is_file():
        output.unlink(missing_ok=True)
        reason = (ran.stderr.strip() or ran.stdout.strip() or "it wrote nothing").splitlines()[-1]
        raise ConfigError(f"--to gguf: {converter} failed (exit code {ran.returncode}): {reason}")


def _refuse_unknown(adapter: Adapter) -> None:
    """Raise ConfigError for what a LoRA of llama.cpp does not have: it multiplies by one alpha / r of each layer."""
    peft = adapter.peft
    has_ranks = bool(peft.get("rank_pattern"))
    unknown = {
        "rows of new tokens (model.new_tokens)": peft.get("trainable_token_indices"),
        "modules that are trained whole (model.modules_to_save)": peft.get("modules_to_save"),
        "RoPE of its own (model.rope_scaling)": adapter.rope_scaling,
        "magnitudes (DoRA)": peft.get("use_dora"),
        "scale of its own for a layer (model.alpha_pattern)": peft.get("alpha_pattern"),
        "scale by the root of a layer's own rank (rslora with model.rank_pattern)": has_ranks and peft["use_rslora"],
    }
    for what, is_there in unknown.items():
        if is_there:
            raise ConfigError(f"--to gguf: llama.cpp's LoRA has no {what}. Merge it: --to merged.")


def as_llama_cpp_reads(peft: dict) -> dict:
    """The config with rslora's scale as a plain alpha: llama.cpp always multiplies by alpha / r."""
    if not peft.get("use_rslora"):
        return peft
    return {**peft, "lora_alpha": peft["lora_alpha"] * peft["r"] ** 0.5, "use_rslora": False}
