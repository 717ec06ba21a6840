"""The home of DeepSpeed: builds the ZeRO engine, steps it, and takes its state apart by parameter name.

What is changed or read inside DeepSpeed for it lies in deepspeed_patches/.
"""

import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.config import TrainingConfig
from qlora_ray.libraries import Patch
from qlora_ray.model.adapter import trainable
from qlora_ray.model.ring import Ring
from qlora_ray.worker import deepspeed_patches as patches
from qlora_ray.worker.flat import FlatLora
from qlora_ray.worker.graphs import Graphs, Recorded
from qlora_ray.worker.state import MOMENTS, AdapterState
from qlora_ray.worker.stopwatch import Stopwatch
from qlora_ray.worker.sums import OrderedSum

FOUND_INF = Patch(
    "torch", "2.13.0", "AdamW's found_inf, which torch's GradScaler sets, tells a step to change nothing",
    gains="the host does not wait for the gradient's norm before it launches the step",
    delete_when="a fused optimizer takes a condition as an argument",
)  # fmt: skip


class Engine:
    """A LoRA model inside DeepSpeed, at any ZeRO stage; at stage 3 workers share what is frozen, or each has all."""

    def __init__(
        self, model: torch.nn.Module, training: TrainingConfig, deepspeed_config: dict[str, Any],
        shares_base: bool = False, ring: Ring | None = None,
    ):  # fmt: skip

        patches.begin()
        groups = parameter_groups(trainable(model), training)
        self._flat = FlatLora(model, [group.pop("names") for group in groups], dist.get_world_size())
        self._parameters = self._flat.parameters
        self._ring = ring  # by which workers bring layers to each other
        self._is_sharded = deepspeed_config["zero_optimization"]["stage"] == 3
        wholes = list(self._parameters.values())
        if self._is_sharded:
            self._keep_frozen_out_of_zero(model, shares_base)
            patches.gather_as_one(model)
            patches.mark_no_ranges()
            patches.print_only_on_demand()
            if wholes[0].is_cuda:
                patches.name_the_device_of_streams()
        for whole, group in zip(wholes, groups, strict=True):
            group["params"] = [whole]
        optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, fused=wholes[0].is_cuda)
        self._lr_ratios = [group.pop("lr_ratio") for group in optimizer.param_groups]
        # Sum, norm and clipping are done here, in an order that does not depend on the number of workers.
        self._max_grad_norm = deepspeed_config.get("gradient_clipping")
        config = patches.for_each_micro_batch(deepspeed_config)
        self._engine, *_ = patches.initialize(model=model, optimizer=optimizer, config=config)
        if self._is_sharded:
            patches.keep_resident(self._engine.optimizer, wholes)
            patches.walk_past_leaves(self._engine)
            if not self._engine.fp16_enabled():
                patches.take_norm_as_known(self._engine.optimizer)
        patches.link_moments_once_all_are_there(self._engine.optimizer)
        is_fused = self._is_sharded and wholes[0].is_cuda and not self._engine.optimizer.offload_optimizer
        self._verdict: torch.Tensor | None = None  # whether a gradient is finite, where a step can be launched before
        if is_fused and not self._engine.fp16_enabled():
            self._verdict = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._sum = OrderedSum(self._flat.numel, wholes[0].device)
        self._grad_norm: torch.Tensor | None = None
        self.graphs: Graphs | None = None  # of micro-batches, where those gain from them
        model.register_forward_pre_hook(lambda *_: self._flat.attach())  # after ZeRO's own
        for state in self._torch_optimizer().state.values():  # some wrappers begin with an empty step: not counted
            state["step"].zero_()

    def _keep_frozen_out_of_zero(self, model: torch.nn.Module, shares_base: bool) -> None:
        if not shares_base:  # the smallest stays: transformers asks a model's first parameter for its device
            frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
            patches.keep_out_of_zero([model], min(frozen, key=torch.Tensor.numel, default=None))
        elif self._ring:
            patches.keep_out_of_zero(self._ring.modules)

    @property
    def module(self) -> Any:
        """The PEFT model inside."""
        return self._engine.module

    def forward(self, **inputs: torch.Tensor) -> Any:
        """What the model returns. Every worker must call this: ZeRO-3 gathers weights in it."""
        # Without stage 3 DeepSpeed has nothing to do before its step, and its hooks expect gradients to reduce.
        return self._engine(**inputs) if self._is_sharded else self._engine.module(**inputs)

    __call__ = forward

    def train(self, mode: bool = True) -> None:
        """Go to training or evaluation mode, in which the model can also generate. Every worker must call this."""
        self._engine.train(mode)
        if not mode:  # generation does not pass by the hook
            if self._is_sharded:
                patches.make_available(list(self._parameters.values()))
            self._flat.attach()

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradient of a micro-batch's share of the global loss. Every worker must call this."""
        if self._is_sharded:
            self._engine.backward(loss, scale_wrt_gas=False)
        else:
            (loss * self._loss_scale()).backward()

    def record_graphs(self, widest: int) -> None:
        """Have micro-batches of rows of up to `widest` tokens recorded from now on."""
        self.graphs = Graphs(self.module, self._flat, widest)

    def recorded(self, batch: dict[str, torch.Tensor]) -> Recorded | None:
        """What was recorded of such a padded batch, ready to be replayed."""
        assert self.graphs is not None
        if self._is_sharded:
            patches.make_available(list(self._parameters.values()))
        return self.graphs.of(batch)

    def add_up(self, num_present: int, gradient: torch.Tensor | None = None) -> None:
        """Add what `backward` has computed on the first `num_present` workers, or a gradient that a graph has made.

        Every worker must call this.
        """
        if gradient is not None and self._is_sharded:
            patches.end_backward(self._engine.optimizer)
        self._sum.add(self._flat.take_gradients() if gradient is None else gradient, num_present)

    def step(self, learning_rate: float) -> bool:
        """Update the weights with what `add_up` has added up; False where it is not finite, and nothing changes.

        Every worker must call this, and every worker gets the same answer.
        """
        gradient = self._sum.take()
        self._grad_norm = torch.linalg.vector_norm(gradient) / self._loss_scale()
        is_finite = torch.isfinite(self._grad_norm)
        if self._verdict is not None:
            # The optimizer leaves everything as it is where found_inf is 1, so it can be launched before that is known.
            self._torch_optimizer().found_inf = (~is_finite).float()
            self._verdict.copy_(is_finite, non_blocking=True)
            known = torch.cuda.current_stream().record_event()
        elif not self._engine.fp16_enabled() and not is_finite:
            return False
        if self._max_grad_norm:
            gradient *= (self._max_grad_norm / (self._grad_norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for number, (name, part) in enumerate(self._flat.cut(gradient).items()):
            self._set_gradient(number, self._parameters[name], part)
        for group, ratio in zip(self._engine.optimizer.param_groups, self._lr_ratios, strict=True):
            group["lr"] = learning_rate * ratio
        self._engine.step()
        if self._verdict is not None:
            known.synchronize()
            return bool(self._verdict)
        # DeepSpeed skips a float16 step that overflows and scales the loss down: an error only where it cannot.
        return not getattr(self._engine.optimizer, "overflow", False) or self._loss_scale() > 1

    def time_gathers(self, stopwatch: Stopwatch) -> None:
        """Have the stopwatch tell the time that forward and backward wait for weights of other workers."""
        if self._is_sharded:
            patches.time_gathers(self._engine.optimizer, stopwatch)
        if self._ring:
            self._ring.waiting = partial(stopwatch.aside, "communication")

    def grad_norm(self) -> float | None:
        """Global gradient norm before clipping, of the last step; None where it is not finite."""
        norm = None if self._grad_norm is None else float(self._grad_norm)
        return norm if norm is not None and math.isfinite(norm) else None

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights, whole, in float32 on the CPU. Every worker must call this."""
        return self._flat.split({name: self._full(name) for name in self._parameters})

    def with_weights(self, weights: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """Within, forward passes without gradient use these weights instead of the trained ones, which stay."""
        return self._flat.replaced(weights)

    def state(self) -> AdapterState:
        """Gather weights and optimizer state. Every worker must call this; every worker gets all of it."""
        by_key = {key: self._flat.split({name: self._full(name, key) for name in self._parameters}) for key in MOMENTS}
        moments = {name: {key: by_key[key][name] for key in MOMENTS} for name in by_key[MOMENTS[0]]}
        scale = self._loss_scale() if self._engine.fp16_enabled() else None
        optimizer_step = int(next(iter(self._torch_optimizer().state.values()))["step"])  # less than ours: fp16 skips
        return AdapterState(self.weights(), moments, optimizer_step, scale)

    def load_state(self, state: AdapterState) -> None:
        """Restore what `state` returned. Every worker must call this, after the weights were put into the module."""
        patches.make_optimizer_state(self._engine.optimizer, state.optimizer_step)
        moments = {key: {name: both[key] for name, both in state.moments.items()} for key in MOMENTS}
        join = self._flat.join
        for name, value in join(state.weights).items():
            self._set(self._parameters[name], value)
        for key in MOMENTS:
            for name, value in join(moments[key]).items():
                self._set(self._parameters[name], value, key)
        if state.loss_scale is not None and self._engine.fp16_enabled():
            self._engine.optimizer.loss_scale = state.loss_scale

    def _full(self, name: str, key: str | None = None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if patches.has_shards(parameter):
            value = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
        else:
            master = patches.master_of(self._engine.optimizer, parameter)
            value = self._torch_optimizer().state[master][key] if key else master
        return value.detach().to("cpu", torch.float32, copy=True).view(patches.whole_shape(parameter))

    def _set(self, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if patches.has_shards(parameter):
            value = value.to(parameter.device)
            if key:
                safe_set_full_optimizer_state(parameter, value, key)
            else:
                safe_set_full_fp32_param(parameter, value)
        else:
            master = patches.master_of(self._engine.optimizer, parameter)
            (self._torch_optimizer().state[master][key] if key else master.data).copy_(value)

    def _set_gradient(self, number: int, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Put a gradient where DeepSpeed's step looks for it."""
        from deepspeed.utils import safe_set_full_grad

        optimizer = self._engine.optimizer
        if self._is_sharded:
            safe_set_full_grad(parameter, value)
        elif self._engine.zero_optimization():
            patches.put_gradient(optimizer, number, value)
        else:
            parameter.grad = value.to(parameter.dtype)

    def _loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0

    def _torch_optimizer(self) -> Any:
        return patches.torch_optimizer(self._engine.optimizer)


def parameter_groups(parameters: dict[str, torch.nn.Parameter], training: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW groups by name: A matrices and the rest, and B matrices at loraplus_lr_ratio times the learning rate."""
    b_matrices = [name for name in parameters if "lora_B" in name]
    others = [name for name in parameters if "lora_B" not in name]
    if training.loraplus_lr_ratio == 1:
        others, b_matrices = list(parameters), []
    groups = [{"names": others, "lr_ratio": 1.0}, {"names": b_matrices, "lr_ratio": training.loraplus_lr_ratio}]
    return [{**group, "weight_decay": training.weight_decay} for group in groups if group["names"]]
