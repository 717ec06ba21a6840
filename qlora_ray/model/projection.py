"""A frozen 4-bit projection with its LoRA, forward and backward written out: y = x W^T + s (x A^T) B^T.

With DoRA (model/dora.py) rows of [W, s B] are multiplied by gains as they are written, and all else stays as it is; a
factor that the model has for what a projection gives is one of its products. Arithmetic is that of
PEFT's lora.Linear4bit on bitsandbytes: W is dequantized to the compute dtype, once in forward and again in backward.
Weights are read from their modules each time and never kept: where workers share them, other layers lie in their place
after forward, and backward reads what was gathered again.
"""

# M tokens, K inputs, N outputs (of all members), R the members' LoRA ranks together, of a group rounded up
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from qlora_ray.model.dropout import Drop
from qlora_ray.model.member import Member, Turn
from qlora_ray.model.ops import ops_for
from qlora_ray.model.ops_plain import Placed


class Group:
    """Projections that read the same input.

    Input and LoRA share one buffer, and so do W and B: [x, x A^T] [W, s B]^T is the whole output in one product without
    another pass over it, and dy [W, s B] is both the gradient of x past the LoRA and that of x A^T. Small members are
    one product together; with `apart` each has its own, which is faster for wide ones.
    """

    def __init__(self, members: list[Member], apart: bool = False, spare_rows: int = 0):
        self.members = members
        self.spare_rows = spare_rows  # below held weights, for `Single`
        self.adapted = [m for m in members if m.lora]
        self.rows = [m.base.out_features for m in members]
        self.inputs = members[0].base.in_features
        ranks = sum(m.rank for m in members)
        self.rank = -(-ranks // 8) * 8  # rows begin at multiples of 16 bytes, which fast products need
        self._spare_ranks = self.rank - ranks  # columns of zeros
        self.factor = members[0].factor
        self.products = [[m] for m in members] if apart else [members]
        self.hold_weights = False  # dequantized ones, between steps: the same values for more memory
        self.held: list[torch.Tensor] = []
        self._made: list[torch.Tensor] | None = None

    @contextmanager
    def made_once(self, like: torch.Tensor, turn: Turn) -> Iterator[None]:
        """Within, the weights of one turn are there whole: dequantized once for all slices of its rows."""
        self._made = list(self._weights(like, turn))
        try:
            yield
        finally:
            self._made = None

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those of each member in turn: the order of `backward`'s gradients."""
        return [parameter for m in self.members for parameter in m.parameters()]

    def buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Room for an input x and x A^T, side by side: (M, K + R)."""
        return like.new_empty(like.shape[0], self.inputs + self.rank)

    def fill(self, buffer: torch.Tensor, turn: Turn) -> None:
        """Write x A^T into the last R columns, of what is kept of the x in the first K."""
        if self.rank:
            _lora_in(buffer[:, : self.inputs], self._a(), turn.drop, buffer[:, self.inputs :])

    def forward(self, buffer: torch.Tensor, turn: Turn, y: torch.Tensor | None = None) -> torch.Tensor:
        """(M, N) of a filled buffer, into `y` if that is given."""
        y, row = buffer.new_empty(buffer.shape[0], sum(self.rows)) if y is None else y, 0
        for number, weight in enumerate(self._weights(buffer, turn)):
            out, bias = y[:, row : row + len(weight)], self._bias(self.products[number])
            if bias is None:
                out.addmm_(buffer, weight.t(), beta=0, alpha=self.factor)
            else:
                torch.addmm(bias, buffer, weight.t(), beta=self.factor, alpha=self.factor, out=out)
            row += len(weight)
        return y

    def backward(self, dy: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Gradients of the input (M, K) and of x A^T (M, R), side by side. Adding the LoRA's share is included."""
        both, row = dy.new_empty(dy.shape[0], self.inputs + self.rank), 0
        for weight in self._weights(dy, turn):
            both.addmm_(dy[:, row : row + len(weight)], weight, beta=1 if row else 0)
            row += len(weight)
        if self.rank:
            _add_lora_back(both[:, self.inputs :], self._a(), turn.drop, both[:, : self.inputs])
        return both

    def parameter_gradients(
        self, dy: torch.Tensor, dz: torch.Tensor, buffer: torch.Tensor, turn: Turn
    ) -> list[torch.Tensor]:
        """In the order of `parameters`. dy (M, N), dz (M, R), buffer as forward left it."""
        if not self.rank:
            return []
        da = _lora_in_gradient(dz, buffer[:, : self.inputs], turn.drop)  # (R, K)
        gradients, row, column = [], 0, 0
        for number, (m, n) in enumerate(zip(self.members, self.rows, strict=True)):
            if m.lora:
                z = buffer[:, self.inputs + column : self.inputs + column + m.rank]
                given = None if turn.given is None else turn.given[:, row : row + n]
                gradients.append(da[column : column + m.rank])
                gradients += _gradients_of_rows(m, dy[:, row : row + n], z, turn.gains[number], given)
            row, column = row + n, column + m.rank
        return gradients

    def _a(self) -> torch.Tensor:
        each = [m.a.data for m in self.adapted]
        if self._spare_ranks:
            each.append(each[0].new_zeros(self._spare_ranks, self.inputs))
        return each[0] if len(each) == 1 else torch.cat(each)

    def _weights(self, like: torch.Tensor, turn: Turn) -> Iterator[torch.Tensor]:
        """[W, s B] of each product: (n, K + R), members one under the other, each member's B in its own columns."""
        if self._made is not None:
            yield from self._made
            return
        column, count = 0, 0
        for number, members in enumerate(self.products):
            is_new = number >= len(self.held)
            rows = sum(m.base.out_features for m in members)
            if is_new:
                spare = self.spare_rows if self.hold_weights else 0
                whole = like.new_empty(rows + spare, self.inputs + self.rank)
            else:
                whole = self.held[number]
            weight, row = whole[:rows], 0
            for m in members:
                part = weight[row : row + m.base.out_features]
                if count == len(turn.gains):
                    turn.gains.append(m.gain())
                if is_new:
                    ops_for(like.device).dequantize(m.base.weight, turn.gains[count], part[:, : self.inputs])
                if self.rank:
                    b = Placed(m.b.data, m.scale, column, turn.gains[count]) if m.lora else None
                    ops_for(like.device).place(b, part[:, self.inputs :])
                row, column, count = row + m.base.out_features, column + m.rank, count + 1
            if self.hold_weights and is_new:
                self.held.append(whole)
            yield weight

    def _bias(self, members: list[Member]) -> torch.Tensor | None:
        biases = [m.base.bias for m in members]
        if all(bias is None for bias in biases):
            return None
        like = next(bias for bias in biases if bias is not None)
        return torch.cat([like.new_zeros(m.base.out_features) if m.base.bias is None else m.base.bias for m in members])


class Single:
    """One projection whose input comes in a buffer of its own, which is not copied.

    Its gradient may have room beside it: [dy, s dy B] [W; A] is then the whole gradient of x in one product.
    """

    def __init__(self, only: Member, held_by: Group | None = None):
        self.member, self.members, self.factor = only, [only], only.factor
        self.shape = (only.base.out_features, only.base.in_features)
        self.room = -(-only.rank // 8) * 8  # columns beside dy (M, N); rows stay aligned to 16 bytes
        self.hold_weights = False
        self._held: torch.Tensor | None = None
        self._made: torch.Tensor | None = None
        self._holder = held_by

    @contextmanager
    def made_once(self, like: torch.Tensor, turn: Turn) -> Iterator[None]:
        """As `Group.made_once`."""
        self._made = self._weight(like, turn)
        try:
            yield
        finally:
            self._made = None

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained of it: the order of `backward`'s gradients."""
        return self.member.parameters()

    def forward(self, x: torch.Tensor, turn: Turn) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(M, N), and x A^T (M, R) for backward."""
        weight, bias = self._weight(x, turn)[: self.shape[0]], self.member.base.bias
        if bias is None:
            y = _scaled_product(self.factor, x, weight.t())
        else:
            y = torch.addmm(bias, x, weight.t(), beta=self.factor, alpha=self.factor)
        if not self.member.lora:
            return y, None
        z = x.new_empty(x.shape[0], self.member.rank)
        _lora_in(x, self.member.a.data, turn.drop, z)
        return y.addmm_(z, self._b(turn).t(), alpha=self.member.scale * self.factor), z

    def input_gradient(self, buffer: torch.Tensor, turn: Turn) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradient of x (M, K); and s dy B (M, R), written beside dy. buffer (M, N + room) holds dy."""
        rows, rank, weight = self.shape[0], self.member.rank, self._weight(buffer, turn)
        dy, dz = buffer[:, :rows], buffer[:, rows : rows + rank]
        if rank:
            torch.addmm(dz, dy, self._b(turn), beta=0, alpha=self.member.scale * self.factor, out=dz)
        if rank and turn.drop.probability:  # what the LoRA adds has a mask of its own
            dx = _scaled_product(self.factor, dy, weight[:rows])
            _add_lora_back(dz, self.member.a.data, turn.drop, dx)
            return dx, dz
        if rank:
            torch.mul(self.member.a.data, 1 / self.factor, out=weight[rows:])  # dz has the factor already
        return _scaled_product(self.factor, buffer[:, : rows + rank], weight), dz if rank else None

    def parameter_gradients(
        self, dy: torch.Tensor, dz: torch.Tensor | None, x: torch.Tensor, z: torch.Tensor | None, turn: Turn
    ) -> list[torch.Tensor]:
        """In the order of `parameters`."""
        if dz is None or z is None:
            return []
        of_rows = _gradients_of_rows(self.member, dy, z, turn.gains[0], turn.given)
        return [_lora_in_gradient(dz, x, turn.drop), *of_rows]

    def backward(self, dy: torch.Tensor, x: torch.Tensor, z: torch.Tensor | None, turn: Turn):
        """Gradients of x (M, K) and of what is trained, of a dy (M, N) without room."""
        dx, dz = _scaled_product(self.factor, dy, self._weight(dy, turn)[: self.shape[0]]), None
        if self.member.lora:
            dz = _scaled_product(self.member.scale * self.factor, dy, self._b(turn))
            _add_lora_back(dz, self.member.a.data, turn.drop, dx)
        return dx, self.parameter_gradients(dy, dz, x, z, turn)

    def _weight(self, like: torch.Tensor, turn: Turn) -> torch.Tensor:
        """W, and rows for A below it: (N + R, K)."""
        if self._made is not None:
            return self._made
        held = self._held
        if self._holder is not None and self._holder.held:
            held = self._holder.held[0][:, : self.shape[1]]
        if held is not None:
            turn.gains[:] = [None]  # weights with gains are never held
            return held
        weight = like.new_empty(self.shape[0] + self.member.rank, self.shape[1])
        if not turn.gains:
            turn.gains.append(self.member.gain())
        ops_for(like.device).dequantize(self.member.base.weight, turn.gains[0], weight[: self.shape[0]])
        if self.hold_weights:
            self._held = weight
        return weight

    def _b(self, turn: Turn) -> torch.Tensor:
        gain = turn.gains[0] if turn.gains else None
        return self.member.b.data if gain is None else self.member.b.data * gain[:, None].to(self.member.b.dtype)


def _gradients_of_rows(
    m: Member, dy: torch.Tensor, z: torch.Tensor, gain: torch.Tensor | None, given: torch.Tensor | None
) -> list[torch.Tensor]:
    """Of B, and with DoRA of the magnitude: dy and given (M, n), z (M, r)."""
    of_b = _scaled_product(m.scale * m.factor, dy.t(), z)
    if m.magnitude is None:
        return [of_b]
    assert gain is not None and given is not None, "a magnitude's gradient needs what its projection gave"
    dots = ops_for(dy.device).column_dots(dy, given)
    if m.base.bias is not None:
        dots -= m.factor * m.base.bias.float() * dy.float().sum(0)
    return [of_b.mul_(gain[:, None]), m.magnitude.gradient(dots)]


def _scaled_product(scale: float, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """scale x left @ right without a pass of its own for the scale."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


def _lora_in(x: torch.Tensor, a: torch.Tensor, drop: Drop, out: torch.Tensor) -> None:
    if drop.probability:
        ops_for(x.device).lora_in(x, a, drop, out)
    else:
        torch.mm(x, a.t(), out=out)


def _lora_in_gradient(dz: torch.Tensor, x: torch.Tensor, drop: Drop) -> torch.Tensor:
    return ops_for(x.device).lora_in_gradient(dz, x, drop) if drop.probability else torch.mm(dz.t(), x)


def _add_lora_back(dz: torch.Tensor, a: torch.Tensor, drop: Drop, dx: torch.Tensor) -> None:
    if drop.probability:
        ops_for(dx.device).add_lora_back(dz, a, drop, dx)
    else:
        dx.addmm_(dz, a)


class LoraProjection(torch.autograd.Function):
    """`Single` for autograd: what a lora.Linear4bit outside a fused layer computes."""

    @staticmethod
    def forward(ctx, x, single: Single, turn: Turn, *parameters):
        """x (..., K) -> (..., N)."""
        flat = x.reshape(-1, x.shape[-1])
        y, z = single.forward(flat, turn)
        ctx.single, ctx.turn = single, turn
        kept = [z] if z is not None else []
        if single.member.magnitude:
            kept.append(y.clone())  # the model may add to y
        ctx.save_for_backward(flat, *kept)
        return y.resize_(*x.shape[:-1], y.shape[-1])  # and not a view of y, to which no model could add: falcon does

    @staticmethod
    def backward(ctx, dy):
        """Gradients of x and of what is trained."""
        flat, *kept = ctx.saved_tensors
        turn = replace(ctx.turn, given=kept[1] if len(kept) > 1 else None)
        dx, gradients = ctx.single.backward(dy.reshape(-1, dy.shape[-1]), flat, kept[0] if kept else None, turn)
        return dx.view(*dy.shape[:-1], -1), None, None, *gradients
