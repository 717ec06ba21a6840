"""How stacks of experts lie in a base's files: whole, or an expert and a projection at a time, under other names.

Stands on transformers' conversion of weights, as from_pretrained applies it: CONVERSIONS.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qlora_ray.libraries import Patch
from qlora_ray.model.experts import stacks_of

CONVERSIONS = Patch(
    "transformers", "5.23.0", "get_model_conversion_mapping and rename_source_key tell the stack that a file's weight "
    "is part of; MergeModulelist and Concatenate are done again by hand",
    gains="the experts of a merged model are those of training, which are packed stack by stack",
    delete_when="transformers tells where each stored weight goes",
)  # fmt: skip
EXPERT = re.compile(r"\.experts\.(\d+)\.")
JOINED = [["MergeModulelist"], ["MergeModulelist", "Concatenate"]]  # by expert, and by expert and projection


@dataclass(frozen=True)
class Piece:
    """What a weight in a file is of a stack: one projection of one expert, or all of it."""

    stack: str
    expert: int | None = None  # None: all
    part: int = 0  # of the projections side by side in the stack
    num_parts: int = 1
    is_transposed: bool = False  # (E, K, N)

    def cut(self, stack: torch.Tensor) -> torch.Tensor:
        """It, of the stack (E, N, K)."""
        return stack if self.expert is None else stack[self.expert].chunk(self.num_parts)[self.part]


def pieces_of_stacks(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Piece]:
    """The weights of these names in a base's files that are part of a stack which can be packed; `model` is the base.

    Raises ValueError where they are joined in a way that is not known here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    stacks, entries = set(stacks_of(model)), get_model_conversion_mapping(model)
    if not stacks:
        return {}
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found, known = {}, model.state_dict()
    for name in names:
        stack, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if stack not in stacks:
            continue
        number = EXPERT.search(name)
        if pattern is None:
            is_transposed = bool(model.get_submodule(stack.rpartition(".")[0]).is_transposed)
            found[name] = Piece(stack, is_transposed=is_transposed)
        elif number and [type(op).__name__ for op in of_pattern[pattern].operations] in JOINED:
            patterns = of_pattern[pattern].source_patterns
            found[name] = Piece(stack, int(number[1]), patterns.index(pattern), len(patterns))
        else:
            raise ValueError(f"{name} is joined into {stack} in a way that is not known here")
    return found


def join(pieces: dict[Piece, torch.Tensor]) -> torch.Tensor:
    """The stack (E, N, K) of all its pieces."""
    if any(piece.expert is None for piece in pieces):
        (whole,) = pieces.values()
        return whole
    experts: dict[int, list[torch.Tensor]] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.expert, piece.part)):
        experts.setdefault(piece.expert or 0, []).append(pieces[piece])
    return torch.stack([torch.cat(parts) for parts in experts.values()])
