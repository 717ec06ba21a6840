"""Forward and backward pass of a micro-batch in one launch: a host takes longer to launch small layers than a GPU.

A CUDA graph repeats kernels with the addresses and numbers they had when it was recorded. What differs between
micro-batches lies in tensors that stay where they are: rows, the loss's share of the step, and what dropout's masks
take of the seed (torch's generator is read as it stands). Rows are padded to few widths, and a shape is recorded when
it has come BEFORE times.
"""

# B rows in a micro-batch, T tokens per row, L places whose next token is trained on, P trained values
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from qlora_ray.config import Config
from qlora_ray.data.tokenize import IGNORE_INDEX
from qlora_ray.libraries import Patch
from qlora_ray.model.dropout import generator_state, reading, word_of, word_on
from qlora_ray.model.fused import fused_layers, is_fused
from qlora_ray.model.head import returns_nats
from qlora_ray.model.layer import FusedLayer
from qlora_ray.model.recompute import Choice, Keep
from qlora_ray.planning.plan import Plan
from qlora_ray.planning.sharing import PAD_TO_MULTIPLE_OF
from qlora_ray.worker import deepspeed_patches as patches
from qlora_ray.worker.flat import FlatLora
from qlora_ray.worker.loss import sum_of_nats

Batch = dict[str, torch.Tensor]
INPUTS = {"input_ids", "labels", "label_places"}
WIDTHS, PLACES = 64, 256  # T and L are padded to multiples of these
BEFORE = 2  # micro-batches of a shape that are launched one by one first: their kernels are compiled, chosen and loaded
MAX_SHAPES = 32  # that are recorded; others go on one by one
# Weights x tokens of a layer beyond which its products take a GPU longer than a host takes to launch it: 10 ms and more
# at an H100's 4e14 operations a second. Larger layers gain nothing.
LARGEST = 1e12


NO_HOOKS = Patch(
    "torch", "2.13.0", "_forward_hooks and _forward_pre_hooks of modules are empty while a graph is recorded",
    gains="a graph of a model in ZeRO-3's hands: its hooks wait for other streams, which no recording may do",
    delete_when="DeepSpeed leaves what is resident without hooks",
)  # fmt: skip


def gains_from_graphs(model: Any, config: Config, plan: Plan, choice: Choice | None) -> bool:
    """Whether a micro-batch of this model can be recorded, and is launched sooner then.

    Not with training.deterministic, whose bits are those of rows as they are, nor where workers could take turns with
    ZeRO-3's collectives.
    """
    layers, training = fused_layers(model), config.training
    if choice is None or not layers or set(choice.levels) != {Keep.ALL}:
        return False
    has_ends = getattr(model, "takes_borders", False) and returns_nats(model.get_output_embeddings())
    is_lora = is_fused(model) and not config.model.modules_to_save and not plan.new_tokens
    is_known = all(type(layer) is FusedLayer and not any(layer.learns_lengths) for layer in layers)
    is_plain = training.recompute == "auto" and not (training.deterministic or training.prefers)
    is_plain = is_plain and not training.neftune_noise_alpha and (plan.zero_stage < 3 or config.ray.max_workers == 1)
    is_small = plan.layer_shape.num_weights * plan.tokens_per_micro_batch < LARGEST
    kinds = {str(getattr(module, "rope_type", "")) for module in model.modules()}
    looks_at_rows = any(kind in text for text in kinds for kind in ("dynamic", "longrope"))  # and waits for the GPU
    in_16_bits = plan.compute_dtype == "bfloat16"
    is_fit = is_lora and has_ends and is_known and in_16_bits and not looks_at_rows
    return is_fit and is_plain and is_small and _is_alone(config)


def _is_alone(config: Config) -> bool:
    return config.training.sequence_parallel == 1 and config.deepspeed.offload_params == "none"


@contextmanager
def _bare(model: torch.nn.Module, frozen: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Within, modules run without hooks, which no graph repeats, and read copies of what ZeRO-3 holds frozen."""
    hooks = [(module, module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    values = [parameter.data for parameter, _ in frozen]
    try:
        for module, *_ in hooks:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
        for parameter, copy in frozen:
            parameter.data = copy
        yield
    finally:
        for module, behind, before in hooks:
            module._forward_hooks, module._forward_pre_hooks = behind, before
        for (parameter, _), value in zip(frozen, values, strict=True):
            parameter.data = value


def padded(batch: Batch, widest: int) -> Batch:
    """The batch as one of few shapes, with the same loss: rows padded up to `widest`, places by one without a label."""
    rows, width = batch["input_ids"].shape
    wide = max(width, min(-(-width // WIDTHS) * WIDTHS, widest))
    more, places = (0, wide - width), batch["label_places"]
    count = min(-(-len(places) // PLACES) * PLACES, rows * wide)
    places = places + places.div(width, rounding_mode="floor") * more[1]
    return {
        "input_ids": F.pad(batch["input_ids"], more), "labels": F.pad(batch["labels"], more, value=IGNORE_INDEX),
        "label_places": F.pad(places, (0, count - len(places)), value=rows * wide - 1),  # a row's last predicts nothing
    }  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """One graph, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    share: torch.Tensor  # () float32
    word: torch.Tensor  # (1,) int32
    nats: torch.Tensor  # () float32
    gradient: torch.Tensor  # (P,)

    def replay(self, batch: Batch, num_summands: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats of a batch, and the gradient of nats / num_summands (P,), which the next replay overwrites."""
        for name, held in self.batch.items():
            held.copy_(batch[name])
        self.share.fill_(float(np.float32(1) / np.float32(num_summands)))  # as torch divides by a number
        self.word.copy_(word_on(word_of(torch.initial_seed()), self.word.device))
        self.graph.replay()
        return self.nats.clone(), self.gradient


class Graphs:
    """What was recorded of a model, by the shape of its micro-batches."""

    def __init__(self, model: torch.nn.Module, flat: FlatLora, widest: int):
        self._model, self._flat = model, flat
        self._widest = -(-widest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
        self._seen: Counter[Any] = Counter()
        self._recorded: dict[Any, Recorded] = {}
        self._pool: Any = None  # of memory, which they share: one runs at a time
        self._stream: torch.cuda.Stream | None = None
        self._wholes: dict[str, torch.Tensor] = {}  # copies of the trained parameters, which ZeRO-3 moves about
        self._matrices: dict[str, torch.Tensor] = {}  # views of these
        self._frozen: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def padded(self, batch: Batch) -> Batch | None:
        """The batch as it is recorded; None for one that is not: packed rows, whose samples differ in number."""
        is_known = batch.keys() - {"attention_mask"} == INPUTS and len(batch["label_places"]) > 0
        return padded(batch, self._widest) if is_known else None

    def of(self, batch: Batch) -> Recorded | None:
        """What was recorded of a padded batch's shape, with the weights of now; None where it has not come often.

        The trained parameters must be there.
        """
        shape = tuple(value.shape for value in batch.values())
        self._seen[shape] += 1
        if shape not in self._recorded and self._seen[shape] > BEFORE and len(self._recorded) < MAX_SHAPES:
            self._recorded[shape] = self._record({name: value.clone() for name, value in batch.items()})
        self._renew_weights()
        return self._recorded.get(shape)

    def _record(self, batch: Batch) -> Recorded:
        device, graph = batch["input_ids"].device, torch.cuda.CUDAGraph()
        share, word = torch.ones((), device=device), torch.zeros(1, dtype=torch.int32, device=device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        drawn = generator_state(device)
        with reading(word), torch.cuda.stream(self._stream):
            if not self._wholes:
                self._copy_weights()  # here, for autograd waits for the stream in which it first saw a leaf
            self._compute(batch, share)  # what this stream's products and kernels need is there when they are recorded
        torch.cuda.current_stream(device).wait_stream(self._stream)
        torch.cuda.set_rng_state(drawn, device)
        # Other threads, which deliver rows and save, may use CUDA meanwhile.
        how: dict[str, Any] = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with reading(word), torch.cuda.graph(graph, **how):
            nats, gradient = self._compute(batch, share)
        self._pool = graph.pool()
        return Recorded(graph, batch, share, word, nats, gradient)

    def _copy_weights(self) -> None:
        self._wholes = {name: one.detach().clone() for name, one in self._flat.parameters.items()}
        self._matrices = {name: one.requires_grad_() for name, one in self._flat.split(self._wholes).items()}
        frozen = [one for one in self._model.parameters() if not one.requires_grad and patches.has_shards(one)]
        self._frozen = [(one, patches.whole_of(one)) for one in frozen]

    def _renew_weights(self) -> None:
        for name, copy in self._wholes.items():
            copy.copy_(self._flat.parameters[name].data)

    def _compute(self, batch: Batch, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with _bare(self._model, self._frozen), self._flat.replaced(self._matrices):
            nats = sum_of_nats(self._model, batch)
            return nats.detach(), self._flat.gradients_of(nats * share)
