"""Models of random weights in a shape: in 4 bits on a device, or as a 16-bit checkpoint on disk."""

import json
from pathlib import Path

from benchmarks.shapes import SEED, shape_of


def build_base(shape: dict, device: str):
    """A random model with linear layers and experts in NF4, as load_base would have loaded it, a layer at a time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_ray.config import QuantizationConfig
    from qlora_ray.model.base import four_bit_config
    from qlora_ray.model.routed import compute_in_4_bits

    torch.manual_seed(SEED)
    config = AutoConfig.for_model(
        max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stack = "h" if shape["model_type"] == "gpt2" else "layers"
    layers = getattr(model.base_model, stack)
    setattr(model.base_model, stack, torch.nn.ModuleList())
    for part in (model, *layers):
        part.to_empty(device=device).apply(model._init_weights)
        if part is not model:
            _pack(part, four_bit_config(QuantizationConfig(), torch.bfloat16), device)
    setattr(model.base_model, stack, layers)
    compute_in_4_bits(model)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    model.config.use_cache = False
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def _pack(layer, four_bit, device: str) -> None:
    """Put the linear layers and the experts of a decoder layer in NF4."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.pytorch_utils import Conv1D

    from qlora_ray.model.experts import pack

    for parent in list(layer.modules()):
        pack(parent, four_bit)
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear | Conv1D):
                values = linear.weight.data.t() if isinstance(linear, Conv1D) else linear.weight.data  # (rows, columns)
                with torch.device("meta"):
                    packed = Linear4bit(values.shape[1], values.shape[0], linear.bias is not None,
                                        compute_dtype=torch.bfloat16, quant_type="nf4")  # fmt: skip
                packed.weight = Params4bit(values, requires_grad=False, quant_type="nf4", module=packed)
                packed.bias = linear.bias
                packed.support_avx512bf16_for_cpu = False
                setattr(parent, name, packed.to(device))


def checkpoint_of(name: str, num_layers: int | None, folder: str) -> Path:
    """Where `save_checkpoint` writes."""
    return Path(folder) / (f"{name}-{num_layers}" if num_layers else name)


def save_checkpoint(name: str, folder: str, device: str, num_layers: int | None = None) -> str:
    """Random weights of a shape as a 16-bit checkpoint, for loaders that want one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qlora_ray.config import base_model_path

    target = checkpoint_of(name, num_layers, folder)
    if not (target / "config.json").exists():
        torch.manual_seed(SEED)
        config = AutoConfig.for_model(
            max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            architectures=None, **shape_of(name, num_layers),
        )  # fmt: skip
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(target)
        del model
        free(device)
        AutoTokenizer.from_pretrained(base_model_path("embedded")).save_pretrained(target)
    return str(target)


def save_four_bit(name: str, folder: str, device: str, num_layers: int | None = None) -> str:
    """Random weights of a shape as bitsandbytes saves them; all layers have those of the first, which is made alone.

    A quarter of `save_checkpoint`'s size, and never more of it in memory than a layer and the ends.
    """
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from qlora_ray.config import QuantizationConfig, base_model_path
    from qlora_ray.model.base import four_bit_config

    target, shape = checkpoint_of(f"{name}-four-bit", num_layers, folder), shape_of(name, num_layers)
    if (target / "config.json").exists():
        return str(target)
    target.mkdir(parents=True)
    model = build_base({**shape, "num_hidden_layers": 1}, device)
    tensors, first = {key: values.cpu() for key, values in model.state_dict().items()}, ".layers.0."
    files = {"ends": {key: values for key, values in tensors.items() if first not in key}}
    for number in range(shape["num_hidden_layers"]):
        of_layer = {key: values for key, values in tensors.items() if first in key}
        files[f"layer_{number}"] = {key.replace(first, f".layers.{number}."): one for key, one in of_layer.items()}
    for file, held in files.items():
        save_file(held, target / f"{file}.safetensors", metadata={"format": "pt"})
    places = {key: f"{file}.safetensors" for file, held in files.items() for key in held}
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    four_bit = four_bit_config(QuantizationConfig(), model.dtype)
    model.config.num_hidden_layers, model.config.quantization_config = shape["num_hidden_layers"], four_bit
    AutoTokenizer.from_pretrained(base_model_path("embedded")).save_pretrained(target)
    model.config.save_pretrained(target)
    del model
    free(device)
    return str(target)


def free(device: str) -> None:
    """Give back the memory of what was deleted: what is measured next has the whole card."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
