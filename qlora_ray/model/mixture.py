"""A decoder layer whose MLP is a mixture of experts, as one autograd function: attention as in any fused layer.

The mixture's block stays transformers' own: router, experts and what it has beside them make a small graph in forward,
without the block's input, and the layer's backward goes through it. So tokens are routed once. What experts and
projections beside them need of their input, the layer gives back to them in backward.
"""

# M = rows x tokens, D hidden width
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from qlora_ray.model.kept import Kept
from qlora_ray.model.layer import FusedLayer
from qlora_ray.model.member import member
from qlora_ray.model.norm import norm_of
from qlora_ray.model.ops import ops_for
from qlora_ray.model.recompute import Keep
from qlora_ray.model.routed import Experts, Pass


def experts_of(block: torch.nn.Module) -> Experts | None:
    """The experts in 4 bits of a mixture's block; None where it has none."""
    found = (child.__dict__.get("routed") for child in block.children())
    return next((experts for experts in found if isinstance(experts, Experts)), None)


@dataclass
class Routed:
    """What a block's forward leaves to its backward."""

    held: Pass
    entry: GradientEdge
    exit: GradientEdge
    parameters: list[torch.nn.Parameter]


class NoProjections:
    """Stands for the projections that read a norm's output, where those are the block's own business."""

    members: tuple[Any, ...] = ()
    rank = 0
    hold_weights = False

    def __init__(self, inputs: int):
        self.inputs = inputs

    def parameters(self) -> list[torch.nn.Parameter]:
        """None."""
        return []

    def buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Room for what the block reads, (M, D)."""
        return like.new_empty(like.shape[0], self.inputs)

    def fill(self, buffer: torch.Tensor, turn: Any) -> None:
        """There is no LoRA here."""


class RoutedLayer(FusedLayer):
    """A fused layer around a mixture."""

    takes_slices = takes_zeros = False  # zeros would be routed

    def take_mlp(self, mlp: Any) -> None:
        """Find the block's parts."""
        experts = experts_of(mlp)
        assert experts is not None
        self.block, self.experts, self.room = mlp, experts, 0
        self.gate_up = self.down = NoProjections(self.qkv.inputs)  # type: ignore[arg-type]
        for child in mlp.children():
            if not hasattr(child, "routed") and any(map(_is_lora, child.modules())):
                _compute_again(child, experts)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The LoRA matrices, in the order of `backward`'s gradients."""
        return [*super().parameters(), *self._of_block()]

    def _of_block(self) -> list[torch.nn.Parameter]:
        experts = self.experts.parameters()
        return experts + [
            p for child in self.block.children() if not hasattr(child, "routed") for p in _matrices(child)
        ]

    def mlp_forward(self, kept: Kept, with_graph: bool) -> torch.Tensor:
        """What the block makes of n2, (M, D)."""
        if not with_graph:
            return self._of(kept.n2)
        assert kept.n2 is not None
        held = Pass(is_whole=self.keep == Keep.ALL)
        anchor = torch.empty(0, device=kept.n2.device, requires_grad=True)
        self.experts.held = held
        try:
            with torch.enable_grad(), _without(kept.n2, held):
                entered = _Entered.apply(anchor, kept.n2)
                given = self._of(entered)
        finally:
            self.experts.held = None
        kept.routed = Routed(held, get_gradient_edge(entered), get_gradient_edge(given), self._of_block())
        return given.detach()

    def _of(self, x: Any) -> torch.Tensor:
        given = self.block(x[None])
        return (given[0] if isinstance(given, tuple) else given)[0]

    def complete_mlp(self, kept: Kept) -> None:
        """Experts compute again what they need, when they need it."""

    def thin_out(self, kept: Kept) -> None:
        """Drop what `keep` does not name."""
        super().thin_out(kept)
        if self.keep >= Keep.ATTENTION:
            kept.routed.held.up = None

    def mlp_backward(self, kept: Kept, dy: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Gradients of the block's LoRA matrices, and of x1 with room. dy (M, D)."""
        width, routed = dy.shape[1], kept.routed
        d_given = self.back_to_given(1, kept, None, self.with_room(dy))[:, :width]
        routed.held.x = kept.n2
        dn2, *gradients = torch.autograd.grad([routed.exit], [routed.entry, *routed.parameters], [d_given])
        kept.routed = None
        dx = dy.new_empty(dy.shape[0], width + self.out.room)
        norm = self.before[1]
        assert norm is not None
        ops_for(dy.device).norm_rows_backward(dn2, kept.x1, norm_of(norm, self.family), dy, dx[:, :width])
        return gradients, dx


def _without(x: torch.Tensor, held: Pass) -> saved_tensors_hooks:
    """Have a graph keep no view of x, but take it from `held` in backward.

    The linear layer that ZeRO-3 puts in place of torch's saves what it reads, though a frozen router needs none of it
    (deepspeed/runtime/zero/linear.py).
    """
    start = x.untyped_storage().data_ptr()

    def pack(saved: torch.Tensor) -> Any:
        is_view = saved.untyped_storage().data_ptr() == start
        return (saved.shape, saved.stride(), saved.storage_offset()) if is_view else saved

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        assert held.x is not None, "backward did not leave what the block read"
        return held.x.as_strided(*packed)

    return saved_tensors_hooks(pack, unpack)


class _Entered(torch.autograd.Function):
    """Lets a graph begin at a tensor that it does not hold."""

    @staticmethod
    def forward(ctx, anchor, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def _is_lora(module: torch.nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _matrices(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for one in module.modules() if _is_lora(one) for parameter in member(one).parameters()]


def _compute_again(child: Any, experts: Experts) -> None:
    """Have a part of a block that reads its input keep nothing in a layer that does not keep all."""
    plain = child.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        held = experts.held
        if held is None or held.is_whole:
            return plain(x.view_as(x))  # whose gradient is added up by itself, as _Again does it
        return _Again.apply(x, plain, held, *_matrices(child))

    child.forward = forward


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plain, held: Pass, *parameters):
        ctx.plain, ctx.held, ctx.shape, ctx.parameters = plain, held, x.shape, parameters
        return plain(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.held.x.view(ctx.shape).detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.plain(x)
        dx, *gradients = torch.autograd.grad(y, (x, *ctx.parameters), grad)
        return dx, None, None, *gradients
