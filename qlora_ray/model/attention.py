"""Causal attention for training, over rows of one sample or of several that must not see each other.

A sample may go on from the first tokens of the one before it in the row (the answers of a pair, behind one prompt): it
sees those and itself. Its queries are its own; keys and values are laid out anew, sample by sample, with those of its
beginning copied before them. No kernel needs a mask for that, since causal attention ends where the keys do.

Stands on two internals, of torch and of transformers: FLASH and OWN_MASK.
"""

# B rows, T tokens per row, M = B x T, H heads of E values, S samples, K keys as they are laid out
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from qlora_ray.libraries import Patch

MAX_FLASH_HEAD = 256  # largest E of PyTorch's FlashAttention
logger = logging.getLogger(__name__)

FLASH = Patch(
    "torch", "2.13.0", "torch.ops.aten._flash_attention_forward is called with the borders of samples",
    gains="all samples of packed rows in one kernel, without a mask",
    delete_when="torch.nn.attention.varlen is no prototype any more",
)  # fmt: skip
OWN_MASK = Patch(
    "transformers", "5.23.0", "masking_utils hands a mask of four dimensions on to the layers as it is",
    gains="borders of samples reach the fused layers, and transformers does not look for packed rows, which waits for "
    "the GPU",
    delete_when="transformers takes the borders of samples",
)  # fmt: skip


def mask_of_borders(
    borders: torch.Tensor, device: torch.device, num_shared: torch.Tensor | None = None
) -> torch.Tensor:
    """Borders of the samples (S + 1,), in tokens through all rows, as `attend` takes them in the place of a mask.

    (1, 1, L, S + 1) int32 with L the longest sample. With num_shared (S,), how many first tokens of the sample before
    it each goes on from: (S, L, longest of the keys, 2 (S + 1) + K + 2 M), which `_Runs` reads.
    """
    longest = int(borders.diff().max())
    if num_shared is None:
        return borders.to(device, torch.int32, non_blocking=True).expand(1, 1, longest, -1)
    lengths = borders.diff() + num_shared
    known = torch.cat(_places(borders.long(), num_shared.long())).to(device, torch.int32, non_blocking=True)
    return known.expand(len(lengths), longest, int(lengths.max()), -1)


class _Runs:
    """Where samples lie among queries and among keys, and where keys and values come from."""

    def __init__(self, mask: torch.Tensor, num_tokens: int):
        self.longest = self.longest_keys = mask.shape[2]
        row = mask[0, 0, 0]
        self.is_shared = mask.shape[1] > 1
        if not self.is_shared:
            self.borders = self.key_borders = row
            return
        borders = mask.shape[0] + 1
        self.longest, self.longest_keys = mask.shape[1:3]
        sizes = [borders, borders, len(row) - 2 * borders - 2 * num_tokens, num_tokens, num_tokens]
        self.borders, self.key_borders, self.tokens, self.own, self.again = row.split(sizes)

    def keys_of(self, part: torch.Tensor) -> torch.Tensor:
        """Keys or values as they are laid out: (M, H, E) -> (K, H, E)."""
        return _LaidOut.apply(part, self) if self.is_shared else part


def _places(borders: torch.Tensor, num_shared: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `_Runs` reads: borders among queries and among keys, both (S + 1,).

    Then the token of each key (K,), each token's key in its own sample (M,), and that in the next one (M,), -1 where
    that does not go on from it.
    """
    lengths = borders.diff()
    key_borders = F.pad((lengths + num_shared).cumsum(0), (1, 0))
    sample = torch.repeat_interleave(lengths + num_shared)  # of each key
    place = torch.arange(len(sample)) - key_borders[sample]  # in it
    behind = place - num_shared[sample]
    tokens = torch.where(behind < 0, borders[sample - 1] + place, borders[sample] + behind)
    sample = torch.repeat_interleave(lengths)  # of each token
    place = torch.arange(len(sample)) - borders[sample]
    own = key_borders[sample] + num_shared[sample] + place
    of_next = F.pad(num_shared[1:], (0, 1))
    again = torch.where(place < of_next[sample], key_borders[sample + 1] + place, -1)
    return borders, key_borders, tokens, own, again


class _LaidOut(torch.autograd.Function):
    """A gather whose gradient is one, too: no two values are added in an order that may change."""

    @staticmethod
    def forward(ctx, part, runs: _Runs):
        ctx.runs = runs
        return part.index_select(0, runs.tokens)

    @staticmethod
    def backward(ctx, grad):
        own, again = ctx.runs.own, ctx.runs.again
        copied = grad.index_select(0, again.clamp(min=0)).where((again >= 0)[:, None, None], 0)
        return copied.add_(grad.index_select(0, own)), None


def no_mask(device: torch.device) -> torch.Tensor:
    """The same for rows of one sample, (1, 1, 0, 0): else transformers looks for packed rows, and waits for the GPU."""
    return torch.empty(1, 1, 0, 0, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Sight:
    """How a layer's attention weighs scores, and of how many tokens, itself among them, each sees the last."""

    scale: float
    window: int | None = None  # None: of all
    sinks: torch.Tensor | None = None  # (H,), a score beside those of the keys, whose share goes nowhere; frozen
    dropout: float = 0.0  # of scores' weights, from torch's generator; not with sinks

    def is_whole(self, length: int) -> bool:
        """Whether the window shows all of a sample of this length."""
        return self.window is None or length <= self.window


def dense_mask(mask: torch.Tensor, num_rows: int, length: int, sight: Sight) -> torch.Tensor | None:
    """What transformers makes of packed rows, from `mask_of_borders`: (B, 1, T, T), whether a query sees a key."""
    if not mask.numel():
        return None if sight.is_whole(length) else _band(length, length, sight, mask.device)[None, None]
    runs = _Runs(mask, num_rows * length)
    token = torch.arange(num_rows * length, dtype=torch.int32, device=mask.device)
    sample = torch.searchsorted(runs.borders, token, right=True, out_int32=True).view(num_rows, 1, length)
    query, key = sample[:, :, :, None], sample[:, :, None, :]
    if not runs.is_shared:
        return (query == key) & _band(length, length, sight, mask.device)
    num_shared = F.pad(runs.key_borders.diff() - runs.borders.diff(), (1, 0))  # by sample, which are counted from 1
    position = (token - runs.borders[sample.flatten() - 1]).view_as(sample) + num_shared[sample]
    behind = position[:, :, :, None] - position[:, :, None, :]  # of the query, in its sample and its beginning
    begins = (query == key + 1) & (position[:, :, None, :] < num_shared[query])
    return ((query == key) | begins) & (behind >= 0) & (behind < (sight.window or 2 * length))


def added_mask(mask: torch.Tensor | None, like: torch.Tensor, sight: Sight) -> torch.Tensor:
    """`dense_mask` for attention that is written out, which adds one to its scores; it reads `like` (B, T, D)."""
    seen = _band(like.shape[1], like.shape[1], sight, like.device)[None, None] if mask is None else mask
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, torch.finfo(like.dtype).min)


def masks_of_model(config: Any, mask: torch.Tensor, size: torch.Size) -> torch.Tensor | dict[str, torch.Tensor]:
    """`dense_mask` for rows (B, T) as a model of transformers takes it: of each kind of layer, where there are several.

    Its eager attention adds what its other kinds ask.
    """

    def seen(window: int | None) -> torch.Tensor:
        is_seen = dense_mask(mask, size[0], size[1], Sight(1.0, window))
        assert is_seen is not None
        if config._attn_implementation != "eager":
            return is_seen
        return torch.where(is_seen, 0.0, torch.finfo(config.dtype or torch.float32).min)

    window = getattr(config, "sliding_window", None)
    kinds = {"full_attention": None, "sliding_attention": window}
    named = sorted(set(getattr(config, "layer_types", None) or ()))
    return {kind: seen(kinds[kind]) for kind in named} if named else seen(window)


def _band(queries: int, keys: int, sight: Sight, device: torch.device) -> torch.Tensor:
    """Whether a query sees a key of its own sample, whose last tokens the queries are: (queries, keys)."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if sight.is_whole(keys) else seen.triu(keys - queries + 1 - (sight.window or 0))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sight: Sight) -> torch.Tensor:
    """q (B, H, T, E), k and v with H or fewer heads -> (B, H, T, E). No mask means causal.

    PyTorch picks the kernel; without a mask that is cuDNN's on Hopper, FlashAttention on other GPUs since Ampere.
    """
    rows, _, length, _ = q.shape
    if mask is None or not mask.numel():
        by_borders = not sight.is_whole(length) or sight.sinks is not None and _has_flash(q)
        mask = _borders_of_rows(rows, length, q.device) if by_borders else None
    if mask is not None and mask.dtype == torch.int32:
        within = _attend_flash if _has_flash(q) else _attend_one_by_one
        output = within(_as_rows(q), _as_rows(k), _as_rows(v), mask, sight)
        return output.unflatten(0, (rows, length)).transpose(1, 2)
    return _attend_dense(q, k, v, mask, sight)


def _attend_dense(q, k, v, mask: torch.Tensor | None, sight: Sight) -> torch.Tensor:
    if sight.sinks is not None:
        return _attend_with_a_sink(q, k, v, mask, sight)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not (mask is None and _kernels_share_keys(q)):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        groups = 1
    return F.scaled_dot_product_attention(
        q, k, v, mask, sight.dropout, mask is None, scale=sight.scale, enable_gqa=groups > 1
    )


def _borders_of_rows(rows: int, length: int, device: torch.device) -> torch.Tensor:
    """`mask_of_borders` of rows of one sample each."""
    borders = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
    return borders.expand(1, 1, length, -1)


def _attend_flash(q, k, v, mask: torch.Tensor, sight: Sight) -> torch.Tensor:
    """All samples in one kernel: q (M, H, E), k and v (M, fewer, E) -> (M, H, E)."""
    runs = _Runs(mask, len(q))
    k, v = runs.keys_of(k), runs.keys_of(v)
    if sight.sinks is not None:
        output: torch.Tensor = _FlashWithSinks.apply(q, k, v, runs, sight)
        return output
    more = (sight.dropout, True, False)
    return torch.ops.aten._flash_attention_forward(q, k, v, *_borders(runs), *more, **_weighing(sight))[0]


def _borders(runs: _Runs) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Of queries and of keys, and the longest sample of both."""
    return runs.borders, runs.key_borders, runs.longest, runs.longest_keys


def _weighing(sight: Sight) -> dict[str, Any]:
    window = {} if sight.window is None else {"window_size_left": sight.window - 1, "window_size_right": 0}
    return {"scale": sight.scale, **window}


class _FlashWithSinks(torch.autograd.Function):
    """Attention whose weights add up to less than 1: exp(sink) is added to each sum of exponentials.

    With that sum in place of the kernel's own, its backward pass is right as it is: the weights, and the products of
    output and gradient that it takes from them, become those with the sink.
    """

    @staticmethod
    def forward(ctx, q, k, v, runs: _Runs, sight: Sight) -> torch.Tensor:
        output, sums, *rest = torch.ops.aten._flash_attention_forward(
            q, k, v, *_borders(runs), 0.0, True, False, **_weighing(sight)
        )  # sums: (H, M), logarithms
        assert sight.sinks is not None
        with_sinks = torch.logaddexp(sums, sight.sinks.to(sums.dtype)[:, None])
        output = (output * (sums - with_sinks).exp().T[..., None]).to(output.dtype)
        ctx.save_for_backward(q, k, v, output, with_sinks, *rest[:2])
        ctx.runs, ctx.sight = runs, sight
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        *kept, state, unused = ctx.saved_tensors
        gradients = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), *kept, *_borders(ctx.runs), 0.0, True, state, unused, **_weighing(ctx.sight)
        )
        return *gradients, None, None


def _attend_with_a_sink(q, k, v, mask: torch.Tensor | None, sight: Sight) -> torch.Tensor:
    """The same by one key more, of zeros, whose score is the sink."""
    length, keys, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    seen = _band(length, keys, Sight(sight.scale), q.device) if mask is None else mask
    seen = seen if seen.dtype == torch.bool else seen == 0  # of attention that is written out, which adds its mask
    assert sight.sinks is not None
    shape = (*seen.shape[:-3], len(sight.sinks), length)
    scores = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    sinks = sight.sinks.to(q.dtype)[:, None, None]
    scores = torch.cat([scores.expand(*shape, keys), sinks.expand(*shape, 1)], -1)
    k, v = (F.pad(part.repeat_interleave(groups, 1), (0, 0, 0, 1)) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scores, scale=sight.scale)


def _attend_one_by_one(q, k, v, mask: torch.Tensor, sight: Sight) -> torch.Tensor:
    runs = _Runs(mask, len(q))
    sizes, key_sizes = (borders.diff().tolist() for borders in (runs.borders, runs.key_borders))
    parts = (q.split(sizes), runs.keys_of(k).split(key_sizes), runs.keys_of(v).split(key_sizes))
    outputs = []
    for of_sample in zip(*parts, strict=True):
        one_q, one_k, one_v = (part.transpose(0, 1)[None] for part in of_sample)  # (1, H, length, E)
        queries, keys = one_q.shape[2], one_k.shape[2]
        is_causal = queries == keys and sight.is_whole(keys)
        band = None if is_causal else _band(queries, keys, sight, q.device)
        outputs.append(_as_rows(_attend_dense(one_q, one_k, one_v, band, sight)))
    return torch.cat(outputs)


def _as_rows(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).flatten(0, 1)  # (B, H, T, E) -> (M, H, E)


def _has_flash(q: torch.Tensor) -> bool:
    if q.device.type != "cuda":
        return False
    fits = q.dtype != torch.float32 and q.shape[-1] <= MAX_FLASH_HEAD and q.shape[-1] % 8 == 0
    has = fits and _is_ampere(q.device) and torch.backends.cuda.is_flash_attention_available()
    if not has:
        _say_once(f"packed rows: no FlashAttention for {q.dtype} heads of {q.shape[-1]} here; one sample at a time")
    return has


@cache
def _say_once(line: str) -> None:
    logger.info("%s", line)


@cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _kernels_share_keys(q: torch.Tensor) -> bool:
    """Whether a fast kernel takes fewer key heads than query heads; else PyTorch would make the whole T x T matrix."""
    if q.device.type != "cuda":
        return True
    return q.dtype != torch.float32 and _is_ampere(q.device)
