"""What a decoder layer keeps between forward and backward, what that costs, and which to choose. No torch."""

# D hidden width, I width of the MLP, Q and K widths of queries and of keys (or values), all in elements
import math
from dataclasses import dataclass, replace
from enum import IntEnum

from qlora_ray.model.facts import EXPERT_CHUNK_BYTES

LONG_ROW = 8192  # tokens; the MLP of fused layers takes longer rows by slices
SLICE_ROWS = 8192  # tokens in a slice: wide enough for fast products
# What a layer's attention would take again against the way of its output to the host and back. The rate of products is
# that of an H100's attention, the other that of pinned memory behind PCIe 4: both make parking look worse than it is.
ATTENTION_FLOPS, HOST_BYTES_PER_SECOND = 5e14, 2e10


class Keep(IntEnum):
    """What a layer keeps for backward, most first; the rest is computed again. Layers that are not fused know three."""

    ALL = 0
    PRODUCTS = 1  # not the norms' outputs: two element-wise passes again
    ATTENTION = 2  # not gate and up either: their product again, half of a forward pass
    PARKED = 3  # the layer's input, attention's output and its sums, in host memory: all but attention again
    INPUT = 4  # the layer's input alone: everything again but a fused layer's last product, which no gradient needs
    HOST = 5  # that one in host memory


ON_HOST = (Keep.PARKED, Keep.HOST)  # the layer's input lies there


@dataclass(frozen=True)
class LayerShape:
    """Widths of one fused decoder layer, the LoRA ranks of its projections, and the bytes of an element."""

    hidden: int
    inner: int
    queries: int
    keys: int
    rank: int
    element_bytes: int
    adapted: tuple[int, int, int, int] = (3, 1, 2, 1)  # projections with a LoRA among q k v, o, gate up, down
    has_head_norms: bool = False  # queries and keys are kept before their norm, too
    has_gate: bool = True
    drops: bool = False  # values of what attention and MLP give: their gradient then lies apart
    norms_after: int = 0  # of what attention and MLP give: each keeps what it reads
    is_dora: bool = False  # lengths learn from what projections give, which is kept, or copied in backward
    has_whole_logits: bool = False  # the output layer is not fused with its loss
    row_tokens: int = 0  # of the longest row: the MLP takes long ones by slices

    @property
    def is_sliced(self) -> bool:
        """Whether gate and up never lie in memory whole, unless they are kept."""
        return self.row_tokens > LONG_ROW

    @property
    def parks(self) -> bool:
        """Whether attention's output comes back from the host sooner than it is made again."""
        seconds = 2.0 * self.row_tokens * self.row_parts * self.queries / ATTENTION_FLOPS
        more = self.host_bytes(Keep.PARKED) - self.host_bytes(Keep.HOST)
        return self.row_tokens > LONG_ROW and seconds > 2 * more / HOST_BYTES_PER_SECOND

    def of_rows(self, num_tokens: int) -> "LayerShape":
        """The same for rows of so many tokens."""
        return replace(self, row_tokens=num_tokens)

    row_parts: int = 1  # workers that hold each row together
    key_copies: int = 1  # workers among these that get each head of keys

    @property
    def exchanged_bytes(self) -> float:
        """What a worker sends for each of its tokens, forward, backward and forward again: model/row_group.py."""
        elements = 3 * 2 * (self.queries + self.keys * self.key_copies)  # q, k and v one way, as much as q the other
        return elements * self.element_bytes * (1 - 1 / self.row_parts)

    has_shared_prompts: bool = False  # keys and values of a prompt are copied for the second answer, and kept

    @property
    def steps(self) -> tuple[tuple[Keep, ...], ...]:
        """What memory goes to, best use first; within one, most first."""
        return (Keep.PRODUCTS, Keep.ATTENTION, Keep.INPUT), (Keep.ALL,)

    @property
    def gate_and_up(self) -> int:
        """Outputs of the MLP's first projections."""
        return self.inner * (1 + self.has_gate)

    @property
    def num_weights(self) -> int:
        """Of the frozen projections."""
        return self.hidden * (2 * self.queries + 2 * self.keys + self.gate_and_up + self.inner)

    def kept_bytes(self, level: Keep) -> int:
        """Between forward and backward, for each token."""
        of_qkv, of_out, of_gate_up, of_down = (count * self.rank for count in self.adapted)
        elements = of_down + (0 if level in ON_HOST else self.hidden)
        if level < Keep.PARKED:  # q, k, v, the attention's output and its sums, what o_proj's LoRA read, x1
            elements += 2 * self.queries + 2 * self.keys * self.key_copies + self.queries // 64 + of_out + self.hidden
            elements += self.queries * (self.row_parts > 1)  # the output of all heads, beside that of whole rows
            elements += (self.queries + self.keys) * (self.has_head_norms or self.is_dora)
            elements += self.hidden * (2 if self.is_dora else self.norms_after)
            elements += 4 * self.keys * self.has_shared_prompts  # at most: all but the answers comes twice
        if level < Keep.ATTENTION:
            elements += self.gate_and_up
        if level < Keep.PRODUCTS:
            elements += self.hidden + of_qkv + (0 if self.is_sliced else self.hidden + of_gate_up)
        return elements * self.element_bytes

    def host_bytes(self, level: Keep) -> int:
        """Of host memory between forward and backward, for each token."""
        parked = self.queries + self.queries // 64 if level == Keep.PARKED else 0
        return (self.hidden + parked) * self.element_bytes if level in ON_HOST else 0

    def again_bytes(self, level: Keep) -> int:
        """Of what backward makes again of a layer and holds whole, for each token."""
        if not self.is_sliced:
            return self.kept_bytes(Keep.ALL) - self.kept_bytes(level)
        of_qkv = self.adapted[0] * self.rank
        gate_up = self.gate_and_up if level < Keep.ATTENTION else 0
        whole = self.kept_bytes(Keep.ATTENTION) + (self.hidden + of_qkv + gate_up) * self.element_bytes
        return whole - self.kept_bytes(level)

    def _passing_slice_bytes(self, level: Keep, num_tokens: int) -> int:
        """`passing_bytes` of a sliced layer: of its attention, when MLP and x1 are gone, or of a slice of its MLP."""
        expanded = 2 * self.queries if self.keys < self.queries else 0  # keys' and values' gradients, a head each
        gone = self.hidden + self.queries * (self.row_parts > 1) + self.gate_and_up * (level < Keep.ATTENTION)
        attention = 4 * self.queries + 2 * self.keys * self.key_copies + expanded - gone  # dq in float32 among them
        weights = (4 if self.norms_after == 2 or self.is_dora else 3) * self.inner * (self.hidden + 2 * self.rank)
        of_slice = SLICE_ROWS * (self.inner + self.gate_and_up * (1 + self.is_dora) + 4 * self.hidden) + weights
        return max(num_tokens * attention, of_slice) * self.element_bytes

    def passing_bytes(self, level: Keep, num_tokens: int) -> int:
        """The most that one layer's backward holds beyond what was or is kept: gradients, one dequantized weight."""
        if self.is_sliced:
            return self._passing_slice_bytes(level, num_tokens)
        weight = self.inner * (self.hidden + 2 * self.rank)
        apart = self.gate_and_up * self.is_dora + self.hidden * self.drops
        return (num_tokens * (self.hidden + self.inner + apart) + weight) * self.element_bytes

    def repeated_flops(self, level: Keep, length: int) -> float:
        """Computed a second time, for each token."""
        weights = 2.0 * self.hidden * self.gate_and_up if level >= Keep.ATTENTION else 0.0
        if level >= Keep.INPUT:
            weights += 2.0 * length * self.queries
        if level >= Keep.PARKED:
            weights += 2.0 * self.hidden * (2 * self.queries + 2 * self.keys)
            weights += 2.0 * self.hidden * self.inner * (self.norms_after == 2 or self.is_dora)
        return weights

    def sharing_prompts(self) -> "LayerShape":
        """The same where rows hold pairs that share their prompts."""
        return replace(self, has_shared_prompts=True)

    @property
    def can_hold_weights(self) -> bool:
        """Whether there is room for its weights dequantized on any GPU."""
        return True

    def measured(self, whole_bytes: int) -> "PlainShape":
        """The same layer where it is not fused after all, by what autograd keeps of it."""
        return PlainShape(
            self.hidden, whole_bytes, self.num_weights, max(self.inner, self.queries), self.element_bytes,
            self.has_whole_logits,
        )  # fmt: skip


@dataclass(frozen=True)
class RoutedShape(LayerShape):
    """Widths of one fused decoder layer with experts; `inner` is of the shared experts, 0 without."""

    num_experts: int = 1
    num_per_token: int = 1
    up: int = 1  # outputs of an expert's first projection
    expert_inner: int = 1  # inputs of its last
    has_bias: bool = False  # of each expert
    adapts_experts: bool = False

    is_sliced = False  # type: ignore[assignment]

    @property
    def can_hold_weights(self) -> bool:
        """Experts are far too many."""
        return False

    @property
    def num_weights(self) -> int:
        """Of the projections of one token."""
        return super().num_weights + self._first_products + self.num_per_token * self.expert_inner * self.hidden

    @property
    def _first_products(self) -> int:
        return self.num_per_token * self.up * self.hidden

    def kept_bytes(self, level: Keep) -> int:
        """Between forward and backward, for each token."""
        routing = 4 * self.num_experts + 32 * self.num_per_token  # probabilities; experts, scores, and rows' places
        elements = self.num_per_token * self.up if level < Keep.ATTENTION else 0
        shared = (
            2 * self.inner * self.element_bytes if Keep.ALL < level < Keep.ATTENTION else 0
        )  # which ALL alone keeps
        return super().kept_bytes(level) - shared + routing + elements * self.element_bytes

    def passing_bytes(self, level: Keep, num_tokens: int) -> int:
        """The most that one layer's backward holds beyond what was or is kept: rows of experts, their weights."""
        rows = num_tokens * self.num_per_token * (self.hidden * (1 + self.adapts_experts) + self.expert_inner)
        stack = min(EXPERT_CHUNK_BYTES, self.num_experts * self.up * self.hidden * self.element_bytes)
        shared = 3 * num_tokens * self.inner
        return (rows + shared + 2 * num_tokens * self.hidden) * self.element_bytes + stack

    def moved_bytes(self, level: Keep, num_tokens: int) -> float:
        """What one layer's experts read and write, forward and backward: rows, and weights out of their 4 bits."""
        again, hidden, up, inner = level >= Keep.ATTENTION, self.hidden, self.up, self.expert_inner
        elements = 10 * hidden + 5 * (up + inner) + again * (3 * hidden + up)  # model/routed.py, operation by operation
        if self.has_bias:
            elements += 4 * (up * (1 + again) + hidden)
        if self.adapts_experts:
            elements += 16 * hidden + 7 * (up + inner) + again * (hidden + 4 * up)
        stacks = self.num_experts * hidden * (up * (2 + again) + inner * 2)
        rows = num_tokens * self.num_per_token
        return rows * elements * self.element_bytes + stacks * (0.5 + 2 * self.element_bytes)

    def repeated_flops(self, level: Keep, length: int) -> float:
        """Computed a second time, for each token."""
        shared = 2.0 * self.hidden * self.inner * (3 if level > Keep.ALL else 0)
        if level >= Keep.ATTENTION:  # which the base counts already
            shared += 2.0 * self._first_products - 4.0 * self.hidden * self.inner
        return super().repeated_flops(level, length) + shared


@dataclass(frozen=True)
class PlainShape:
    """One decoder layer that is not fused: autograd keeps what it needs of it, or its input alone is kept."""

    hidden: int
    whole_bytes: int  # that autograd keeps for each token: a forecast, until a worker has measured it
    num_weights: int
    widest: int  # of its activations
    element_bytes: int
    has_whole_logits: bool = True
    dequantized_bytes: int = 0  # of experts' weights at a time
    parks = False

    def of_rows(self, num_tokens: int) -> "PlainShape":
        """The same for rows of so many tokens."""
        return self

    def host_bytes(self, level: Keep) -> int:
        """Of host memory between forward and backward, for each token."""
        return self.hidden * self.element_bytes if level == Keep.HOST else 0

    def again_bytes(self, level: Keep) -> int:
        """Of what backward makes again of a layer, for each token."""
        return self.kept_bytes(Keep.ALL) - self.kept_bytes(level)

    @property
    def steps(self) -> tuple[tuple[Keep, ...], ...]:
        """What memory goes to, most first."""
        return ((Keep.ALL, Keep.INPUT),)

    def kept_bytes(self, level: Keep) -> int:
        """Between forward and backward, for each token."""
        if level == Keep.ALL:
            return self.whole_bytes
        return self.hidden * self.element_bytes if level < Keep.HOST else 0

    def passing_bytes(self, level: Keep, num_tokens: int) -> int:
        """The most that one layer's backward holds beyond what was or is kept: gradients, one dequantized weight."""
        elements = num_tokens * (self.hidden + 2 * self.widest) + self.hidden * self.widest
        return elements * self.element_bytes + self.dequantized_bytes

    def repeated_flops(self, level: Keep, length: int) -> float:
        """Computed a second time, for each token."""
        return 2.0 * self.num_weights + 2.0 * length * self.hidden if level >= Keep.INPUT else 0.0

    def sharing_prompts(self) -> "PlainShape":
        """The same where rows hold pairs that share their prompts: attention has a mask, and copies nothing."""
        return self

    def measured(self, whole_bytes: int) -> "PlainShape":
        """The same with what a worker has measured."""
        return replace(self, whole_bytes=whole_bytes)


@dataclass(frozen=True)
class Choice:
    """What each layer keeps, first to last, and how many of the last ones hold their weights dequantized."""

    levels: tuple[Keep, ...]
    num_holding_weights: int = 0

    def __str__(self) -> str:
        counts = {level: self.levels.count(level) for level in Keep if level in self.levels}
        parts = [f"{count} keep {level.name.lower()}" for level, count in counts.items()]
        if self.num_holding_weights:
            parts.append(f"{self.num_holding_weights} hold dequantized weights")
        return "layers: " + ", ".join(parts)


def activation_bytes(shape: LayerShape | PlainShape, choice: Choice, num_tokens: int, vocab_size: int) -> int:
    """Peak of a micro-batch beyond weights and optimizer: the head at the turn, or a layer, there or back."""
    kept, worst, of_stream = 0, 0, num_tokens * shape.hidden * shape.element_bytes
    # Of inputs on the host, beside a gradient: the one before, on its way back. Fused layers without experts have most
    # in forward, where two inputs are on their way there and the model still holds the first layer's; of a long row in
    # backward.
    on_their_way = 2 if type(shape) is LayerShape and not shape.is_sliced else 1
    for level in choice.levels:
        kept += num_tokens * shape.kept_bytes(level)
        again = num_tokens * shape.again_bytes(level) + shape.passing_bytes(level, num_tokens)
        worst = max(worst, kept + again + of_stream * (level in ON_HOST) * on_their_way)
    logits = num_tokens * vocab_size * (shape.element_bytes + 8)  # and in float32, twice
    if not shape.has_whole_logits:
        logits = min(num_tokens * vocab_size * shape.element_bytes, 2**28)
    head = 3 * of_stream + logits
    held = choice.num_holding_weights * shape.num_weights * shape.element_bytes
    return held + max(worst + of_stream, kept + head)


@dataclass(frozen=True)
class Room:
    """What activations may take of a worker's GPU and of its host's memory."""

    gpu_bytes: float
    host_bytes: float = math.inf
    may_hold_weights: bool = False


def host_bytes(shape: LayerShape | PlainShape, choice: Choice, num_tokens: int) -> int:
    """Host memory that a micro-batch takes between forward and backward."""
    return num_tokens * sum(shape.host_bytes(level) for level in choice.levels)


def choose(shape: LayerShape | PlainShape, num_layers: int, num_tokens: int, vocab_size: int, room: Room) -> Choice:
    """The fastest choice that has room, or the leanest if none has.

    Memory goes first to what saves most time a byte: products and attention, then norms, then dequantized weights,
    which only fused layers hold; to the last layers first, since what they keep is gone when the others' backward
    needs room.
    """
    levels = [Keep.HOST] * num_layers

    def fits(num_holding: int = 0) -> bool:
        choice = Choice(tuple(levels), num_holding)
        has_room = activation_bytes(shape, choice, num_tokens, vocab_size) <= room.gpu_bytes
        return has_room and host_bytes(shape, choice, num_tokens) <= room.host_bytes

    for layer in reversed(range(num_layers)):  # what the host has no room for stays on the GPU
        if host_bytes(shape, Choice(tuple(levels)), num_tokens) > room.host_bytes:
            levels[layer] = Keep.INPUT
    for candidates in ((Keep.PARKED,) if shape.parks else (), *shape.steps):
        for layer in reversed(range(num_layers)):
            before = levels[layer]
            for level in candidates:
                levels[layer] = min(level, before)
                if fits():
                    break
                levels[layer] = before
    holding, may_hold = 0, room.may_hold_weights and isinstance(shape, LayerShape) and shape.can_hold_weights
    while may_hold and holding < num_layers and set(levels) == {Keep.ALL} and fits(holding + 1):
        holding += 1
    return Choice(tuple(levels), holding)
