"""All LoRA matrices of a model as one parameter, so that ZeRO handles one tensor and not hundreds.

Hundreds of hooks, norms, copies and collectives a step become one each. Module tree and PEFT's own forward stay: each
matrix is a view of the whole, and a leaf of autograd's graph, so that a micro-batch's gradient can be taken as it is,
before anything is added to it. Weights and optimizer state go out and come in by PEFT's parameter names.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora_ray.model.adapter import trainable

Place = tuple[torch.nn.Module, str, int, torch.Size]  # owner, attribute, offset in the whole, shape


class FlatLora:
    """The trained parameters of a model, moved into one parameter for each group of names.

    Wholes are padded with zeros to a multiple of `multiple_of` values, so that as many workers get equal shares.
    """

    def __init__(self, model: torch.nn.Module, groups: list[list[str]], multiple_of: int = 1):
        matrices, self._multiple_of = trainable(model), multiple_of
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self._places: dict[str, list[Place]] = {}
        self._attached: dict[str, int] = {}  # where the memory lies that the matrices are views of
        self._is_replaced = False
        self._homes: dict[str, tuple[str, int, torch.Size]] = {}
        for number, names in enumerate(groups):
            whole, offset = f"lora_flat_{number}", 0
            self._places[whole] = []
            for name in names:
                path, attribute = name.rsplit(".", 1)
                owner, shape = model.get_submodule(path), matrices[name].shape
                self._places[whole].append((owner, attribute, offset, shape))
                self._homes[name] = (whole, offset, shape)
                offset += shape.numel()
                delattr(owner, attribute)
            values = torch.cat([matrices[name].detach().flatten() for name in names])
            self.parameters[whole] = torch.nn.Parameter(self._padded(values))
            model.register_parameter(whole, self.parameters[whole])
        self._homes = {name: self._homes[name] for name in matrices}  # in the model's order
        self.attach()

    @property
    def numel(self) -> int:
        """Trained values, all together."""
        return sum(shape.numel() for _, _, shape in self._homes.values())

    def attach(self) -> None:
        """Make the modules' matrices views of the wholes, where those have moved."""
        if self._is_replaced:
            return
        for whole, parameter in self.parameters.items():
            if self._attached.get(whole) == parameter.data_ptr():
                continue
            for owner, attribute, offset, shape in self._places[whole]:
                view = parameter.detach()[offset : offset + shape.numel()].view(shape)
                owner.__dict__[attribute] = view.requires_grad_()
            self._attached[whole] = parameter.data_ptr()

    @contextmanager
    def replaced(self, values: dict[str, torch.Tensor]) -> Iterator[None]:
        """Within, the modules compute with these matrices, by PEFT's names, and the wholes stay as they are."""
        for name, (whole, at, _) in self._homes.items():
            like = self.parameters[whole]
            (owner, attribute), *_ = [place[:2] for place in self._places[whole] if place[2] == at]
            owner.__dict__[attribute] = values[name].to(like.device, like.dtype)
        self._is_replaced = True
        try:
            yield
        finally:
            self._is_replaced = False
            self._attached.clear()
            self.attach()

    def take_gradients(self) -> torch.Tensor:
        """The gradients since the last call, one whole after the other, each in its order: (numel,). Empties them."""
        parts = []
        for places in self._places.values():
            for owner, attribute, _, shape in places:
                matrix = owner.__dict__[attribute]
                parts.append(matrix.new_zeros(shape.numel()) if matrix.grad is None else matrix.grad.flatten())
                matrix.grad = None
        return torch.cat(parts)

    def gradients_of(self, loss: torch.Tensor) -> torch.Tensor:
        """Those of a loss alone, as `take_gradients` has them; nothing is added to what that returns."""
        matrices = [owner.__dict__[attribute] for places in self._places.values() for owner, attribute, *_ in places]
        found = torch.autograd.grad(loss, matrices, allow_unused=True)
        pairs = zip(matrices, found, strict=True)
        return torch.cat([torch.zeros_like(one).flatten() if grad is None else grad.flatten() for one, grad in pairs])

    def cut(self, gradients: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `take_gradients` returned, by whole, each padded as its parameter is."""
        sizes = [sum(shape.numel() for *_, shape in places) for places in self._places.values()]
        return dict(zip(self.parameters, map(self._padded, gradients.split(sizes)), strict=True))

    def split(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A value for each whole -> a value for each matrix, by PEFT's names."""
        return {
            name: values[whole].flatten()[offset : offset + shape.numel()].view(shape)
            for name, (whole, offset, shape) in self._homes.items()
        }

    def join(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `split`."""
        ordered: dict[str, list[tuple[int, torch.Tensor]]] = {whole: [] for whole in self.parameters}
        for name, (whole, offset, _) in self._homes.items():
            ordered[whole].append((offset, values[name].flatten()))
        return {
            whole: self._padded(torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]))
            for whole, parts in ordered.items()
        }

    def _padded(self, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, -values.numel() % self._multiple_of))
