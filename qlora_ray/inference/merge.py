"""Adds an adapter to the weights of its base, one tensor at a time, and writes a model that plain transformers loads.

The output has the base's own files, names and shards. Memory: one weight and its float32 copy, whatever the model, or
the experts of a layer.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_ray.errors import ConfigError
from qlora_ray.model import card, rope
from qlora_ray.model.base import four_bit_modules, pieces_in_files
from qlora_ray.model.facts import HEAD
from qlora_ray.model.record import Adapter, base_tensors
from qlora_ray.model.stack_files import Piece, join
from qlora_ray.model.tensors import BYTES, DTYPES, TensorFiles, write_tensors

Into = Literal["training", "original"]
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
PREFIX = "base_model.model."
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class LoRA:
    """The update of one layer: out x in."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scaling: float
    magnitude: torch.Tensor | None  # (out,), DoRA's


@dataclass(frozen=True)
class Layer:
    """A layer whose weight merging changes."""

    name: str
    is_transposed: bool  # in the files
    was_four_bit: bool  # in training


@dataclass(frozen=True)
class Rows:
    """Rows of a weight that were trained alone."""

    tokens: tuple[int, ...]
    update: str  # their tensor's name in the adapter


@dataclass(frozen=True)
class Merger:
    """What turns a tensor of the base's files into one of the merged model."""

    adapter: Adapter
    into: Into
    dtype: str
    device: torch.device
    base: TensorFiles
    updates: TensorFiles
    layers: dict[str, Layer]  # by the weight's name in the files
    whole: dict[str, str]  # what was trained whole: the tensor's name in the files, and in the adapter
    rows: dict[str, "Rows"]  # by the weight's name in the files
    pieces: dict[str, Piece]  # of stacks of experts that merging changes, by the same
    at_hand: dict[str, torch.Tensor] = field(default_factory=dict)  # merged stacks of one layer

    def merged(self, name: str) -> torch.Tensor:
        """One weight of the merged model, in its dtype, on the CPU."""
        if name in self.whole:
            return self.updates.read(self.whole[name]).to(getattr(torch, self.dtype)).contiguous()
        if name in self.pieces:
            piece = self.pieces[name]
            return piece.cut(self._stack(piece.stack)).to("cpu", getattr(torch, self.dtype)).contiguous()
        weight = self.base.read(name)
        if name in self.rows:
            weight = with_rows(weight, self.rows[name], self.updates.read(self.rows[name].update))
        if not weight.is_floating_point():
            return weight
        layer = self.layers.get(name)
        if layer is not None:
            weight = weight.to(self.device)
            weight = weight.T if layer.is_transposed else weight
            if self.into == "training":
                weight = as_trained_on(weight, layer, self.adapter)
            update = self._update_of(layer.name)
            if update is not None:
                weight = add(weight.to(torch.float32), update)
            weight = weight.T if layer.is_transposed else weight
        return weight.to("cpu", getattr(torch, self.dtype)).contiguous()

    def layout(self, names: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored dtype and shape of the merged tensors of these names."""
        entries = {name: self.base.entries[name] for name in names}
        return {
            name: (STORED[self.dtype] if _is_floating(entry.dtype) else entry.dtype, self._shape(name, entry.shape))
            for name, entry in entries.items()
        }

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (max(shape[0], max(self.rows[name].tokens) + 1), *shape[1:]) if name in self.rows else shape

    def _stack(self, name: str) -> torch.Tensor:
        """A merged stack of experts. Keeps those of one layer: their pieces lie beside each other in the files."""
        if name not in self.at_hand:
            layer = name.rpartition(".")[0]
            for other in [other for other in self.at_hand if not other.startswith(f"{layer}.")]:
                del self.at_hand[other]
            pieces = {piece: stored for stored, piece in self.pieces.items() if piece.stack == name}
            stack = join({piece: self.base.read(stored).to(self.device) for piece, stored in pieces.items()})
            if self.into == "training":
                was_four_bit = name in self.adapter.packed_stacks
                stack = as_trained_on(stack, Layer(name, False, was_four_bit), self.adapter)
            self.at_hand[name] = self._with_update(name, stack, next(iter(pieces)).is_transposed)
        return self.at_hand[name]

    def _with_update(self, name: str, stack: torch.Tensor, is_transposed: bool) -> torch.Tensor:
        """A stack (E, N, K) or transposed, with the LoRAs of its experts, which PEFT lays out beside each other."""
        owner, _, last = name.rpartition(".")
        stem = f"{PREFIX}{owner}." + ("" if last == "down_proj" else "base_layer.")
        if f"{stem}lora_A.weight" not in self.updates.entries:
            return stack
        a, b = (self.updates.read(f"{stem}lora_{which}.weight").to(self.device, torch.float32) for which in "AB")
        rank, stack = len(a) // len(stack), stack.to(torch.float32)
        a, b = a.unflatten(0, (-1, rank)), b.unflatten(1, (rank, -1))  # (E, r, K), (N, r, E)
        for expert, weight in enumerate(stack):
            out = weight.T if is_transposed else weight
            out.addmm_(b[:, :, expert], a[expert], alpha=scaling_of(self.adapter.peft, name, rank))
        return stack

    def _update_of(self, module: str) -> LoRA | None:
        stem = f"{PREFIX}{module}."
        if f"{stem}lora_A.weight" not in self.updates.entries:
            return None
        a, b = (self.updates.read(f"{stem}lora_{which}.weight").to(self.device, torch.float32) for which in "AB")
        magnitude = None
        if f"{stem}lora_magnitude_vector" in self.updates.entries:
            magnitude = self.updates.read(f"{stem}lora_magnitude_vector").to(self.device, torch.float32)
        return LoRA(a, b, scaling_of(self.adapter.peft, module, rank=len(a)), magnitude)


def merge(adapter: Adapter, target: Path, into: Into, dtype: str, device: torch.device) -> None:
    """Write the merged model into the new folder `target`. Raises ConfigError for what cannot be merged."""
    merger = plan_merge(adapter, into, dtype, device)
    shards: dict[str, list[str]] = {}
    for name, entry in merger.base.entries.items():
        shards.setdefault(entry.file.name, []).append(name)
    needed = sum(_size(merger.layout(names)) for names in shards.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ConfigError(f"--output {target}: {needed / 2**30:.1f} GiB are needed there, {free / 2**30:.1f} are free.")
    target.mkdir()
    for file, names in shards.items():
        with (target / file).open("wb") as stream:
            write_tensors(stream, merger.layout(names), _merged_tensors(merger, names))
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": needed}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    _write_config(adapter, target, dtype, merger.into)


def plan_merge(adapter: Adapter, into: Into, dtype: str, device: torch.device) -> Merger:
    """Find each layer's weight in the base's files and each update's layer. Raises ConfigError."""
    key = f"--adapter {adapter.folder}"
    base = base_tensors(adapter.base, key)
    unknown = {entry.dtype for entry in base.entries.values()} - DTYPES.keys()
    if unknown:
        raise ConfigError(f"{key}: its base is stored as {', '.join(sorted(unknown))}; there are no weights to add to.")
    updates = TensorFiles([adapter.folder / "adapter_model.safetensors"], key)
    if "quantization_config" in json.loads((Path(adapter.base) / "config.json").read_text("utf-8")):
        raise ConfigError(
            f"{key}: its base is stored quantized; there are no dense weights to merge into. Serve the adapter "
            "unmerged, or train on the model that its base was quantized from."
        )
    found = _Updates.of(adapter, base, updates)
    if adapter.quantization.type == "none":
        into = "original"
    layers = _layers(adapter, base, found, into)
    pieces = _pieces(adapter, base, into)
    return Merger(adapter, into, dtype, device, base, updates, layers, found.whole, found.rows, pieces)


def _pieces(adapter: Adapter, base: TensorFiles, into: Into) -> dict[str, Piece]:
    """What merging changes of stacks of experts, by its name in the base's files. Raises ConfigError."""
    changed = set(adapter.packed_stacks)
    if not changed or (into == "original" and not adapter.peft.get("target_parameters")):
        return {}
    remote = adapter.model.trust_remote_code, adapter.model.factory
    found = pieces_in_files(adapter.base, base.entries, *remote)
    return {name: piece for name, piece in found.items() if piece.stack in changed}


@dataclass(frozen=True)
class _Updates:
    """What an adapter holds, by kind; tensors of the base by their names in its files."""

    modules: set[str]  # with a LoRA
    whole: dict[str, str]
    rows: dict[str, Rows]
    packable: dict[str, bool]
    prefix: str  # that a weight's name in a file may lack

    @classmethod
    def of(cls, adapter: Adapter, base: TensorFiles, updates: TensorFiles) -> "_Updates":
        """Sort the tensors of an adapter. Raises ConfigError for one that merging does not know."""
        packable, prefix = four_bit_modules(adapter.base, adapter.model.trust_remote_code, adapter.model.factory)
        found = cls(set(), {}, {}, packable, prefix)
        experts = {stack.rpartition(".")[0] for stack in adapter.packed_stacks}
        for name in updates.entries:
            module, _, kind = name.removeprefix(PREFIX).partition(".lora_")
            rows_of, is_rows, _ = module.partition(TOKEN_ROWS)
            if module.removesuffix(".base_layer") in experts:
                continue  # found by the names of their stacks
            if kind in ("A.weight", "B.weight", "magnitude_vector"):
                found.modules.add(module)
            elif is_rows:
                indices = adapter.peft["trainable_token_indices"]
                tokens = tuple(next(rows for key, rows in indices.items() if rows_of.endswith(key)))
                stored = {_stored(base, f"{rows_of}.weight", found, adapter)}
                stored |= {head for head in base.entries if len(indices) == 1 and HEAD.search(head)}  # tied, if stored
                found.rows.update({one: Rows(tokens, name) for one in stored})
            elif name.startswith(PREFIX) and any(
                module.rpartition(".")[0].endswith(entry) for entry in adapter.peft.get("modules_to_save") or ()
            ):
                found.whole[_stored(base, module, found, adapter)] = name
            else:
                raise ConfigError(
                    f"--adapter {adapter.folder}: {name} is no LoRA matrix; merging does not know what to do with it."
                )
        return found


def _stored(base: TensorFiles, name: str, found: _Updates, adapter: Adapter) -> str:
    """The name of a tensor in the base's files. Raises ConfigError where it is not there."""
    names = (name, name.removeprefix(f"{found.prefix}."))
    stored = next((one for one in names if one in base.entries), None)
    if stored is None:
        raise ConfigError(
            f"--adapter {adapter.folder}: the base's files have no weight {names[0]}: it is tied to another, or "
            "stored under another name. Serve the adapter unmerged."
        )
    return stored


def _layers(adapter: Adapter, base: TensorFiles, found: _Updates, into: Into) -> dict[str, Layer]:
    """What merging changes, by the weight's name in the base's files. Raises ConfigError for a layer without one."""
    packable, updated = found.packable, found.modules
    four_bit = set(adapter.record.get("four_bit_layers", packable))  # adapters of earlier versions do not say
    layers = {}
    for name in sorted(updated if into == "original" else updated | four_bit):
        stored = _stored(base, f"{name}.weight", found, adapter)
        layers[stored] = Layer(name, packable.get(name, False), name in four_bit)
    return layers


def as_trained_on(weight: torch.Tensor, layer: Layer, adapter: Adapter) -> torch.Tensor:
    """The weight as training multiplied with it: cast and, if it was in 4 bits, packed and unpacked; (out, in)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = weight.to(getattr(torch, adapter.compute_dtype)).contiguous()
    if not layer.was_four_bit:
        return weight
    quantization = adapter.quantization
    packed, state = quantize_4bit(
        weight, compress_statistics=quantization.double_quant, quant_type=quantization.type, quant_storage=torch.uint8
    )
    return dequantize_4bit(packed, state)


def with_rows(weight: torch.Tensor, rows: Rows, values: torch.Tensor) -> torch.Tensor:
    """The weight with the trained rows in place, and grown where it has none of their numbers (as token_rows.py)."""
    missing = max(rows.tokens) + 1 - len(weight)
    if missing > 0:
        mean = weight.mean(0, dtype=torch.float32).to(weight.dtype)
        weight = torch.cat([weight, mean.expand(missing, -1)])
    weight[list(rows.tokens)] = values.to(weight.dtype)
    return weight


def add(weight: torch.Tensor, update: LoRA) -> torch.Tensor:
    """weight + scaling x B A, and with DoRA (arXiv:2402.09353) its rows at the learnt length. Changes `weight`."""
    weight.addmm_(update.b, update.a, alpha=update.scaling)
    if update.magnitude is not None:
        weight.mul_((update.magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None])
    return weight


def scaling_of(peft: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's factor of B A: alpha / r, or with rslora alpha / sqrt(r). A pattern may give the module another alpha."""
    patterns = peft.get("alpha_pattern") or {}
    alphas = [alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    alpha = alphas[0] if alphas else peft["lora_alpha"]  # the first, as peft.utils.other.get_pattern_key
    return alpha / (rank**0.5 if peft.get("use_rslora") else rank)


def _merged_tensors(merger: Merger, names: list[str]) -> Iterator[torch.Tensor]:
    for name in names:
        yield merger.merged(name)


def _write_config(adapter: Adapter, target: Path, dtype: str, into: Into) -> None:
    config = json.loads((Path(adapter.base) / "config.json").read_text("utf-8"))
    if adapter.rope_scaling:
        text = config.get("text_config") or config
        text.update(rope.scaled(text, adapter.rope_scaling))
    for section in (config, config.get("text_config") or {}):
        section.pop("torch_dtype", None)
        section["dtype"] = dtype
        if "vocab_size" in section:
            section["vocab_size"] = max(section["vocab_size"], adapter.num_token_rows)
    if not config.get("text_config"):
        config.pop("text_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    kept = ["generation_config.json"] + (["*.py"] if adapter.record["base"]["trust_remote_code"] else [])
    for pattern in kept:
        for file in Path(adapter.base).glob(pattern):
            shutil.copyfile(file, target / file.name)
    ours = {"adapter_config.json", "adapter_model.safetensors", "qlora_ray.json", "README.md"}
    (target / "README.md").write_text(card.render_merged(adapter.record, dtype, into), "utf-8")
    for file in adapter.folder.iterdir():  # the tokenizer that the adapter was trained with
        if file.is_file() and file.name not in ours:
            shutil.copyfile(file, target / file.name)


def _size(layout: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(torch.Size(shape).numel() * BYTES[dtype] for dtype, shape in layout.values())


def _is_floating(dtype: str) -> bool:
    return DTYPES[dtype].startswith(("float", "bfloat"))
