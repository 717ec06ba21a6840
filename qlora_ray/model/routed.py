"""Products of tokens with the experts that they are routed to, on stacks in 4 bits, forward and backward written out.

y = sum over a token's experts of score x down(gate(gate_up x)). Rows are sorted by expert, one grouped product a
projection does all experts. Weights are read from their modules each time, dequantized a few experts at a time and
never kept: where workers share them, other layers lie in their place after forward. Sums are added in a fixed order.
"""

# M tokens, k experts of each, S = M x k rows, E experts, K inputs and N outputs of a projection, R the rank of a LoRA
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from qlora_ray.model.adapter import ADAPTER_NAME
from qlora_ray.model.experts import blocks_around_experts, clamp_of, gate, has_silu, is_packed, stack_names, unwrapped
from qlora_ray.model.facts import EXPERT_CHUNK_BYTES
from qlora_ray.model.ops import ops_for


class Rows:
    """Rows sorted by expert: how many of them are each expert's."""

    def __init__(self, ends: torch.Tensor):
        self.ends = ends  # (E,) int32: the row after each expert's last

    @cached_property
    def bounds(self) -> list[int]:
        """First row of each expert, and the number of rows, on the host. Waits for the device."""
        return [0, *self.ends.tolist()]

    def part(self, first: int, last: int) -> tuple[slice, "Rows"]:
        """Where the rows of experts first to last - 1 lie, and how they are shared among these."""
        if (first, last) == (0, len(self.ends)):
            return slice(None), self
        start, end = self.bounds[first], self.bounds[last]
        return slice(start, end), Rows(self.ends[first:last] - start)


class Routing(Rows):
    """The rows of some tokens, each once for each of its experts."""

    def __init__(self, index: torch.Tensor, num_experts: int):
        """index (M, k): experts of each token."""
        flat, count = index.reshape(-1).to(torch.int32), index.shape[1]
        order = torch.argsort(flat, stable=True)  # (S,) which (token, expert) each row is
        self.experts = flat[order]
        self.tokens = (order // count).to(torch.int32)
        places = torch.empty_like(flat)
        places[order] = torch.arange(len(flat), device=flat.device, dtype=torch.int32)
        self.places = places.view(-1, count)  # (M, k) the row of each (token, expert)
        numbers = torch.arange(num_experts, device=flat.device, dtype=torch.int32)
        super().__init__(torch.searchsorted(self.experts, numbers, right=True).to(torch.int32))

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """(M, k) -> (S,)."""
        rows = torch.empty(values.numel(), dtype=values.dtype, device=values.device)
        rows[self.places.reshape(-1)] = values.reshape(-1)
        return rows

    def sum_of_tokens(self, rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(S, N) -> (M, N), each token's rows times their scores (M, k), added in the order of its experts."""
        out = rows.new_empty(len(self.places), rows.shape[1])
        ops_for(rows.device).sum_of_rows(rows, self.places, scores, out)
        return out


@dataclass
class Pass:
    """What the experts of a layer have of one micro-batch between forward and backward."""

    x: torch.Tensor | None = None  # (M, K) what they read
    routing: Routing | None = None
    up: torch.Tensor | None = None  # (S, 2 I) their first products; None: computed again
    is_whole: bool = False  # what lies beside the experts is kept, too


class Stack:
    """One projection of all experts of a module, with the LoRA on it if there is one."""

    def __init__(self, module: Any, name: str, lora: Any = None):
        self.module, self.name, self.lora = module, name, lora
        self.is_transposed = bool(module.is_transposed)

    @property
    def bias(self) -> torch.Tensor | None:
        """(E, N)."""
        return getattr(self.module, f"{self.name}_bias") if self.module.has_bias else None

    def parameters(self) -> list[torch.nn.Parameter]:
        """A (E R, K) and B (N, R E), as PEFT lays them out, if there is a LoRA."""
        return [getattr(self.lora, which)[ADAPTER_NAME].weight for which in ("lora_A", "lora_B")] if self.lora else []

    def forward(self, x: torch.Tensor, routing: Routing, is_adapted: bool) -> torch.Tensor:
        """(S, K) -> (S, N)."""
        y = self._product(x, routing, backward=False)
        if self.bias is not None:
            y.add_(self.bias[routing.experts])
        if self.lora and is_adapted:
            a, b, scale = self._factors()
            y.add_(grouped(grouped(x, a.mT, routing), b.mT, routing), alpha=scale)
        return y

    def input_gradient(self, dy: torch.Tensor, routing: Routing, is_adapted: bool):
        """Gradient of (S, K) for dy (S, N), and that of x A^T (S, R) if there is a LoRA."""
        dx = self._product(dy, routing, backward=True)
        if not (self.lora and is_adapted):
            return dx, None
        a, b, scale = self._factors()
        dz = grouped(dy, b, routing).mul_(scale)
        return dx.add_(grouped(dz, a, routing)), dz

    def parameter_gradients(
        self, dy: torch.Tensor, dz: torch.Tensor | None, x: torch.Tensor, scores: torch.Tensor, routing: Routing
    ) -> list[torch.Tensor]:
        """Of A and B, for dy (S, N), dz (S, R) and x (S, K), where each row counts by its score (S, 1)."""
        if dz is None:
            return []
        a, _, scale = self._factors()
        rank = self.lora.r[ADAPTER_NAME]
        da = outer(dz * scores.to(dz.dtype), x, routing)  # (E, R, K)
        db = outer(dy, grouped(x, a.mT, routing).mul_(scores), routing).mul_(scale)  # (E, N, R)
        return [da[:, :rank].flatten(0, 1), db[:, :, :rank].permute(1, 2, 0).flatten(1)]

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A (E, R, K), B (E, N, R) and their product's factor. On a GPU zeros fill R up to 16 bytes."""
        a, b = (parameter.detach() for parameter in self.parameters())
        rank = self.lora.r[ADAPTER_NAME]
        a, b = a.unflatten(0, (-1, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1).contiguous()
        if a.is_cuda and rank % 8:
            a, b = F.pad(a, (0, 0, 0, -rank % 8)), F.pad(b, (0, -rank % 8))
        return a, b, float(self.lora.scaling[ADAPTER_NAME])

    def _product(self, x: torch.Tensor, rows: Rows, backward: bool) -> torch.Tensor:
        y: Any = None
        for first, last, weight in self._weights():
            where, few = rows.part(first, last)
            part = grouped(x[where], weight if backward != self.is_transposed else weight.mT, few)
            if last - first == len(rows.ends):
                return part
            y = x.new_empty(len(x), part.shape[1]) if y is None else y
            y[where] = part
        return y

    def _weights(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Dequantized weights of some experts, and their numbers: first, last + 1, (n, N, K) as it is stored."""
        weight: Any = getattr(self.module, self.name)
        state = weight.quant_state
        num_experts, *sides = state.shape
        each = sides[0] * sides[1]
        at_a_time = max(1, EXPERT_CHUNK_BYTES // (each * state.dtype.itemsize))
        if at_a_time >= num_experts or each % state.blocksize:  # else a scale is of two experts
            assert weight.data.numel() * 2 >= num_experts * each, "not gathered"
            whole = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
            ops_for(weight.device).dequantize(weight, None, whole.flatten(0, 1))
            yield 0, num_experts, whole
            return
        scales = _scales(state)
        for first in range(0, num_experts, at_a_time):
            last = min(num_experts, first + at_a_time)
            yield first, last, _dequantized(weight, scales, first, last)


def _scales(state: Any) -> torch.Tensor:
    """Those of a packed weight, in float32, as bitsandbytes.functional.dequantize_4bit makes them."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def _dequantized(weight: Any, scales: torch.Tensor, first: int, last: int) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state, shape = weight.quant_state, torch.Size((last - first, *weight.quant_state.shape[1:]))
    start, end = first * shape[1] * shape[2], last * shape[1] * shape[2]
    assert weight.data.numel() * 2 >= end, "not gathered"
    scales = scales[start // state.blocksize : -(-end // state.blocksize)]
    part = QuantState(scales, shape, state.code, state.blocksize, state.quant_type, state.dtype)
    return dequantize_4bit(weight.data.view(-1, 1)[start // 2 : -(-end // 2)], part)


def grouped(x: torch.Tensor, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(S, K) sorted by expert, with weights (E, K, N) of the experts: (S, N)."""
    if _has_grouped_product(x):
        return F.grouped_mm(x, weights, offs=rows.ends)
    y = x.new_empty(len(x), weights.shape[2])
    for number, (start, end) in enumerate(zip(rows.bounds, rows.bounds[1:], strict=False)):
        torch.mm(x[start:end], weights[number], out=y[start:end])
    return y


def outer(left: torch.Tensor, right: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(S, N) and (S, R), sorted by expert: left^T right of each expert, (E, N, R); zeros for one without rows."""
    if _has_grouped_product(left) and _has_grouped_product(right):
        sums = F.grouped_mm(left.t(), right, offs=rows.ends)
        # Some GPUs leave them as they were allocated: pytorch issue 172439.
        is_empty = torch.diff(rows.ends, prepend=rows.ends.new_zeros(1)) == 0
        return sums.masked_fill_(is_empty[:, None, None], 0)
    sums = left.new_zeros(len(rows.ends), left.shape[1], right.shape[1])
    for number, (start, end) in enumerate(zip(rows.bounds, rows.bounds[1:], strict=False)):
        if end > start:
            torch.mm(left[start:end].t(), right[start:end], out=sums[number])
    return sums


def _has_grouped_product(x: torch.Tensor) -> bool:
    """Whether one product does all experts: from Ampere on, in bfloat16, where rows are multiples of 16 bytes."""
    is_new = x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return is_new and x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0


class Experts:
    """The experts of one layer with their LoRAs, for autograd."""

    def __init__(self, module: Any, loras: dict[str, Any]):
        self.module = module
        self.up, self.down = (Stack(module, name, loras.get(name)) for name in stack_names(module))
        self.num_experts = int(module.down_proj.quant_state.shape[0])
        self.has_silu, self.clamp = has_silu(module), clamp_of(module)
        self.wrapper = next(iter(loras.values()), None)
        self.held: Pass | None = None  # where the next forward leaves what it has; None: with autograd
        self.num_rows: torch.Tensor | None = None  # (E,) that each expert had in training, since it was asked for

    def __call__(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """x (M, K), index and scores (M, k) -> (M, K)."""
        is_adapted = self.wrapper is not None and not self.wrapper.disable_adapters
        return _Routed.apply(x, index, scores, self, is_adapted, *(self.parameters() if is_adapted else ()))

    def parameters(self) -> list[torch.nn.Parameter]:
        """The LoRA matrices, in the order of `backward`'s gradients."""
        return [*self.up.parameters(), *self.down.parameters()]

    def count(self, rows: Rows) -> None:
        """Add up, in training, the rows of each expert. The host does not wait."""
        if self.module.training:
            counts = torch.diff(rows.ends.long(), prepend=rows.ends.new_zeros(1))
            self.num_rows = counts if self.num_rows is None else self.num_rows.add_(counts)

    def gate(self, up: torch.Tensor) -> torch.Tensor:
        """(S, 2 I) -> (S, I)."""
        if not self.has_silu and not self.clamp:
            return gate(self.module, up)
        out, ops = up.new_empty(len(up), up.shape[1] // 2), ops_for(up.device)
        if self.clamp:
            ops.clamped_glu(up, self.clamp, out)
        else:
            ops.activate(up, False, out)
        return out

    def gate_backward(self, dh: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradient of what `gate` was given, what it returned, and <dh, that> of each row. Overwrites both."""
        ops = ops_for(up.device)
        if self.has_silu or self.clamp:
            return (
                up,
                dh,
                ops.clamped_glu_backward(dh, up, self.clamp) if self.clamp else ops.activate_backward_with_dots(dh, up),
            )
        with torch.enable_grad():
            leaf = up.detach().requires_grad_()
            h = self.gate(leaf)
        (dup,) = torch.autograd.grad(h, leaf, dh)
        h = h.detach()
        return dup, h, dh.mul_(h).sum(-1, dtype=torch.float32)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, scores, experts: Experts, is_adapted: bool, *parameters):
        routing = Routing(index, experts.num_experts)
        experts.count(routing)
        up = experts.up.forward(x[routing.tokens], routing, is_adapted)  # (S, 2 I)
        y = experts.down.forward(experts.gate(up), routing, is_adapted)  # (S, K)
        ctx.experts, ctx.is_adapted, ctx.routing, ctx.held = experts, is_adapted, routing, experts.held
        if ctx.held is not None:
            ctx.held.routing, ctx.held.up = routing, up
        ctx.save_for_backward(scores, index, *(() if ctx.held else (up, x) if is_adapted else (up,)))
        return routing.sum_of_tokens(y, scores)

    @staticmethod
    def backward(ctx, grad):
        scores, index, *kept = ctx.saved_tensors
        experts, routing, is_adapted = ctx.experts, ctx.routing, ctx.is_adapted
        held = ctx.held or Pass(kept[1] if is_adapted else None, routing, kept[0])
        x_rows = None
        if is_adapted or held.up is None:
            assert held.x is not None, "the layer did not leave what its experts read"
            x_rows = held.x[routing.tokens]
        up = experts.up.forward(x_rows, routing, is_adapted) if held.up is None else held.up
        held.up, x_rows = None, x_rows if is_adapted else None  # the first is overwritten
        score = routing.by_row(scores)[:, None] if is_adapted else None  # (S, 1)
        # Scores are factors of the rows of the sum; left out here, they come in where gradients are sums over rows.
        dy = grad[routing.tokens]  # (S, K)
        dh, dz = experts.down.input_gradient(dy, routing, is_adapted)  # (S, I)
        dup, h, dots = experts.gate_backward(dh, up)
        of_down = experts.down.parameter_gradients(dy, dz, h, score, routing)
        del dy, h, dh, up
        dx, dz = experts.up.input_gradient(dup, routing, is_adapted)
        of_up = experts.up.parameter_gradients(dup, dz, x_rows, score, routing)
        dscores = dots[routing.places]  # (M, k)
        if experts.down.bias is not None:
            dscores += (grad @ experts.down.bias.t()).gather(1, index)
        return routing.sum_of_tokens(dx, scores), None, dscores.to(scores.dtype), None, None, *of_up, *of_down


def compute_in_4_bits(model: torch.nn.Module) -> None:
    """Have all packed experts of a model, with their LoRAs, compute from their 4 bits, in place."""
    for block in blocks_around_experts(model):
        for child in block.children():
            if is_packed(unwrapped(child)):
                routed = Experts(unwrapped(child), _loras(child))
                child.routed, child.forward = routed, routed.__call__  # type: ignore[assignment,method-assign]


def take_counts(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of each layer with experts, the rows (E,) that each of them had in training since the last call."""
    found = []
    for module in model.modules():
        experts = module.__dict__.get("routed")
        if isinstance(experts, Experts) and experts.num_rows is not None:
            found.append(experts.num_rows)
            experts.num_rows = None
    return found


def _loras(wrapper: Any) -> dict[str, Any]:
    """PEFT's wrappers around experts, by the stack that each adapts: they lie in one another."""
    found = {}
    while hasattr(wrapper, "parameter_name"):
        found[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    return found
