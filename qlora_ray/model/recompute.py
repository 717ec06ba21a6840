"""What a decoder layer keeps between forward and backward, what that costs, and which to choose. No torch."""

# D hidden width, I width of the MLP, Q and K widths of queries and of keys (or values), all in elements
from dataclasses import dataclass, replace
from enum import IntEnum

from qlora_ray.model.facts import EXPERT_CHUNK_BYTES


class Keep(IntEnum):
    """What a layer keeps for backward, most first; the rest is computed again. Layers that are not fused know three."""

    ALL = 0
    PRODUCTS = 1  # not the norms' outputs: two element-wise passes again
    ATTENTION = 2  # not gate and up either: their product again, half of a forward pass
    INPUT = 3  # the layer's input alone: everything again but a fused layer's last product, which no gradient needs
    HOST = 4  # that one in host memory


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
    row_parts: int = 1  # workers that hold each row together
    key_copies: int = 1  # workers among these that get each head of keys

    @property
    def exchanged_bytes(self) -> float:
        """What a worker sends for each of its tokens, forward, backward and forward again: model/row_group.py."""
        elements = 3 * 2 * (self.queries + self.keys * self.key_copies)  # q, k and v one way, as much as q the other
        return elements * self.element_bytes * (1 - 1 / self.row_parts)

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
        elements = of_down + (self.hidden if level < Keep.HOST else 0)
        if level < Keep.INPUT:  # q, k, v, the attention's output and its sums, what o_proj's LoRA read, x1
            elements += 2 * self.queries + 2 * self.keys * self.key_copies + self.queries // 64 + of_out + self.hidden
            elements += self.queries * (self.row_parts > 1)  # the output of all heads, beside that of whole rows
            elements += (self.queries + self.keys) * (self.has_head_norms or self.is_dora)
            elements += self.hidden * (2 if self.is_dora else self.norms_after)
        if level < Keep.ATTENTION:
            elements += self.gate_and_up
        if level < Keep.PRODUCTS:
            elements += 2 * self.hidden + of_qkv + of_gate_up
        return elements * self.element_bytes

    def passing_bytes(self, num_tokens: int) -> int:
        """The most that one layer's backward holds beyond what was or is kept: gradients, one dequantized weight."""
        weight = self.inner * (self.hidden + 2 * self.rank)
        apart = self.gate_and_up * self.is_dora + self.hidden * self.drops
        return (num_tokens * (self.hidden + self.inner + apart) + weight) * self.element_bytes

    def repeated_flops(self, level: Keep, length: int) -> float:
        """Computed a second time, for each token."""
        weights = 2.0 * self.hidden * self.gate_and_up if level >= Keep.ATTENTION else 0.0
        if level >= Keep.INPUT:
            weights += 2.0 * self.hidden * (2 * self.queries + 2 * self.keys) + 2.0 * length * self.queries
            weights += 2.0 * self.hidden * self.inner * (self.norms_after == 2 or self.is_dora)
        return weights

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

    def passing_bytes(self, num_tokens: int) -> int:
        """The most that one layer's backward holds beyond what was or is kept: rows of experts, their weights."""
        rows = num_tokens * self.num_per_token * (self.hidden + self.expert_inner)
        stack = min(EXPERT_CHUNK_BYTES, self.num_experts * self.up * self.hidden * self.element_bytes)
        shared = 3 * num_tokens * self.inner
        return (rows + shared + 2 * num_tokens * self.hidden) * self.element_bytes + stack

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

    @property
    def steps(self) -> tuple[tuple[Keep, ...], ...]:
        """What memory goes to, most first."""
        return ((Keep.ALL, Keep.INPUT),)

    def kept_bytes(self, level: Keep) -> int:
        """Between forward and backward, for each token."""
        if level == Keep.ALL:
            return self.whole_bytes
        return self.hidden * self.element_bytes if level < Keep.HOST else 0

    def passing_bytes(self, num_tokens: int) -> int:
        """The most that one layer's backward holds beyond what was or is kept: gradients, one dequantized weight."""
        elements = num_tokens * (self.hidden + 2 * self.widest) + self.hidden * self.widest
        return elements * self.element_bytes + self.dequantized_bytes

    def repeated_flops(self, level: Keep, length: int) -> float:
        """Computed a second time, for each token."""
        return 2.0 * self.num_weights + 2.0 * length * self.hidden if level >= Keep.INPUT else 0.0

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
    """Peak of a micro-batch beyond weights and optimizer: the head at the turn, or a layer's backward."""
    kept, worst = 0, 0
    for level in choice.levels:
        kept += num_tokens * shape.kept_bytes(level)
        again = num_tokens * (shape.kept_bytes(Keep.ALL) - shape.kept_bytes(level))
        coming = num_tokens * shape.hidden * shape.element_bytes if level == Keep.HOST else 0
        worst = max(worst, kept + again + coming)
    of_stream = num_tokens * shape.hidden * shape.element_bytes
    logits = num_tokens * vocab_size * (shape.element_bytes + 8)  # and in float32, twice
    if not shape.has_whole_logits:
        logits = min(num_tokens * vocab_size * shape.element_bytes, 2**28)
    head = 3 * of_stream + logits
    held = choice.num_holding_weights * shape.num_weights * shape.element_bytes
    return held + max(worst + shape.passing_bytes(num_tokens) + of_stream, kept + head)


def choose(
    shape: LayerShape | PlainShape, num_layers: int, num_tokens: int, vocab_size: int, budget_bytes: float,
    may_hold: bool,
) -> Choice:  # fmt: skip
    """The fastest choice whose peak stays within a budget, or the leanest if none does.

    Memory goes first to what saves most time a byte: products and attention, then norms, then dequantized weights,
    which only fused layers hold; to the last layers first, since what they keep is gone when the others' backward
    needs room.
    """
    levels = [Keep.HOST] * num_layers

    def fits(num_holding: int = 0) -> bool:
        return activation_bytes(shape, Choice(tuple(levels), num_holding), num_tokens, vocab_size) <= budget_bytes

    for candidates in shape.steps:
        for layer in reversed(range(num_layers)):
            before = levels[layer]
            for level in candidates:
                levels[layer] = min(level, before)
                if fits():
                    break
                levels[layer] = before
    holding, may_hold = 0, may_hold and isinstance(shape, LayerShape) and shape.can_hold_weights
    while may_hold and holding < num_layers and set(levels) == {Keep.ALL} and fits(holding + 1):
        holding += 1
    return Choice(tuple(levels), holding)
