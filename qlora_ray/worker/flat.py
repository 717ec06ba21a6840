"""All LoRA matrices of a model as one parameter, so that ZeRO handles one tensor and not hundreds.

Hundreds of hooks, norms, copies and collectives a step become one each. Module tree and PEFT's own forward stay: each
matrix is a view of the whole. Weights and optimizer state go out and come in by PEFT's parameter names.
"""

import torch

from qlora_ray.model.adapter import trainable

Place = tuple[torch.nn.Module, str, str, int, torch.Size]  # owner, attribute, name of the whole, offset, shape


class FlatLora:
    """The trained parameters of a model, moved into one parameter for each group of names."""

    def __init__(self, model: torch.nn.Module, groups: list[list[str]]):
        matrices = trainable(model)
        self.parameters: dict[str, torch.nn.Parameter] = {}
        places: dict[str, Place] = {}
        for number, names in enumerate(groups):
            whole, offset = f"lora_flat_{number}", 0
            for name in names:
                path, attribute = name.rsplit(".", 1)
                places[name] = (model.get_submodule(path), attribute, whole, offset, matrices[name].shape)
                offset += matrices[name].numel()
            values = torch.cat([matrices[name].detach().flatten() for name in names])
            self.parameters[whole] = torch.nn.Parameter(values)
        for owner, attribute, *_ in places.values():
            del owner._parameters[attribute]
        for whole, parameter in self.parameters.items():
            model.register_parameter(whole, parameter)
        self._places = {name: places[name] for name in matrices}  # in the model's order
        self.attach(with_graph=False)

    def attach(self, with_graph: bool) -> None:
        """Make the modules' matrices views of the wholes as they are now; with_graph, so that gradients reach these."""
        for whole, parameter in self.parameters.items():
            places = [place for place in self._places.values() if place[2] == whole]
            views = _Views.apply(parameter, places) if with_graph else _views(parameter.detach(), places)
            for (owner, attribute, *_), view in zip(places, views, strict=True):
                owner.__dict__[attribute] = view

    def split(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A value for each whole -> a value for each matrix, by PEFT's names."""
        return {
            name: values[whole].flatten()[offset : offset + shape.numel()].view(shape)
            for name, (_, _, whole, offset, shape) in self._places.items()
        }

    def join(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `split`."""
        ordered: dict[str, list[tuple[int, torch.Tensor]]] = {whole: [] for whole in self.parameters}
        for name, (_, _, whole, offset, _) in self._places.items():
            ordered[whole].append((offset, values[name].flatten()))
        return {
            whole: torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])])
            for whole, parts in ordered.items()
        }


def _views(whole: torch.Tensor, places: list[Place]) -> tuple[torch.Tensor, ...]:
    return tuple(whole[offset : offset + shape.numel()].view(shape) for *_, offset, shape in places)


class _Views(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, places):
        ctx.set_materialize_grads(False)
        ctx.places = places
        return _views(whole.detach(), places)

    @staticmethod
    def backward(ctx, *gradients):
        like = next(gradient for gradient in gradients if gradient is not None)
        parts = [
            like.new_zeros(shape.numel()) if gradient is None else gradient.flatten()
            for gradient, (*_, shape) in zip(gradients, ctx.places, strict=True)
        ]
        order = sorted(range(len(parts)), key=lambda i: ctx.places[i][3])
        return torch.cat([parts[i] for i in order]), None
