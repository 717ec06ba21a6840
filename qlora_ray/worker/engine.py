"""The only home of DeepSpeed: builds the ZeRO engine, steps it, and takes its state apart by parameter name."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.config import TrainingConfig
from qlora_ray.model.adapter import trainable
from qlora_ray.model.fused import leaf_modules
from qlora_ray.worker.flat import FlatLora
from qlora_ray.worker.state import MOMENTS, AdapterState
from qlora_ray.worker.stopwatch import Stopwatch
from qlora_ray.worker.sums import OrderedSum


class Engine:
    """A LoRA model inside DeepSpeed, at any ZeRO stage."""

    def __init__(self, model: torch.nn.Module, training: TrainingConfig, deepspeed_config: dict[str, Any]):
        import deepspeed

        if not torch.cuda.is_available():
            # Without this DeepSpeed compiles a shared-memory collective on first use (25 s, a compiler); gloo does.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        groups = parameter_groups(trainable(model), training)
        self._flat = FlatLora(model, [group.pop("names") for group in groups], dist.get_world_size())
        self._parameters = self._flat.parameters
        self._is_sharded = deepspeed_config["zero_optimization"]["stage"] == 3
        if self._is_sharded:
            _gather_as_one(model)
            _without_tracing()
        wholes = list(self._parameters.values())
        for whole, group in zip(wholes, groups, strict=True):
            group["params"] = [whole]
        optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, fused=wholes[0].is_cuda)
        self._lr_ratios = [group.pop("lr_ratio") for group in optimizer.param_groups]
        # Sum, norm and clipping are done here, in an order that does not depend on the number of workers.
        self._max_grad_norm = deepspeed_config.get("gradient_clipping")
        deepspeed_config = {**deepspeed_config, "gradient_clipping": 0.0, "gradient_accumulation_steps": 1}
        deepspeed_config.pop("train_batch_size", None)  # of all workers that there may be; elastic runs have fewer
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
        if self._is_sharded:
            _keep_resident(self._engine.optimizer, wholes)
            _walk_past_leaves(self._engine)
            if not self._engine.fp16_enabled():
                # ZeRO-3 would compute the norm again and wait for it; `step` knows it.
                self._engine.optimizer._get_norm_groups = lambda: [torch.ones(())]
        _link_moments_once_all_are_there(self._engine.optimizer)
        is_fused = self._is_sharded and wholes[0].is_cuda and not self._engine.optimizer.offload_optimizer
        self._verdict: torch.Tensor | None = None  # whether a gradient is finite, where a step can be launched before
        if is_fused and not self._engine.fp16_enabled():
            self._verdict = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._sum = OrderedSum(self._flat.numel, wholes[0].device)
        self._grad_norm: torch.Tensor | None = None
        model.register_forward_pre_hook(lambda *_: self._flat.attach())  # after ZeRO's own
        for state in self._torch_optimizer().state.values():  # some wrappers begin with an empty step: not counted
            state["step"].zero_()

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    def forward(self, **inputs: torch.Tensor) -> Any:
        # Without stage 3 DeepSpeed has nothing to do before its step, and its hooks expect gradients to reduce.
        return self._engine(**inputs) if self._is_sharded else self._engine.module(**inputs)

    __call__ = forward

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)
        if not mode:  # generation does not pass by the hook
            self._flat.attach()

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradient of a micro-batch's share of the global loss. Every worker must call this."""
        if self._is_sharded:
            self._engine.backward(loss, scale_wrt_gas=False)
        else:
            (loss * self._loss_scale()).backward()

    def add_up(self, num_present: int) -> None:
        """Add what `backward` has computed on the first `num_present` workers. Every worker must call this."""
        self._sum.add(self._flat.take_gradients(), num_present)

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
            coordinator = self._engine.optimizer.parameter_offload.get_param_coordinator()
            fetch = coordinator.fetch_sub_module

            def fetch_sub_module(*arguments: Any, **options: Any) -> None:
                with stopwatch.aside("communication"):
                    fetch(*arguments, **options)

            coordinator.fetch_sub_module = fetch_sub_module

    def grad_norm(self) -> float | None:
        """Global gradient norm before clipping, of the last step; None where it is not finite."""
        norm = None if self._grad_norm is None else float(self._grad_norm)
        return norm if norm is not None and math.isfinite(norm) else None

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights, whole, in float32 on the CPU. Every worker must call this."""
        return self._flat.split({name: self._full(name) for name in self._parameters})

    def state(self) -> AdapterState:
        """Gather weights and optimizer state. Every worker must call this; every worker gets all of it."""
        by_key = {key: self._flat.split({name: self._full(name, key) for name in self._parameters}) for key in MOMENTS}
        moments = {name: {key: by_key[key][name] for key in MOMENTS} for name in by_key[MOMENTS[0]]}
        scale = getattr(self._engine.optimizer, "cur_scale", None) if self._engine.fp16_enabled() else None
        optimizer_step = int(next(iter(self._torch_optimizer().state.values()))["step"])  # less than ours: fp16 skips
        return AdapterState(self.weights(), moments, optimizer_step, scale)

    def load_state(self, state: AdapterState) -> None:
        """Restore what `state` returned. Every worker must call this, after the weights were put into the module."""
        self._make_optimizer_state(state.optimizer_step)
        moments = {key: {name: both[key] for name, both in state.moments.items()} for key in MOMENTS}
        join = self._flat.join
        for name, value in join(state.weights).items():
            self._set(self._parameters[name], value)
        for key in MOMENTS:
            for name, value in join(moments[key]).items():
                self._set(self._parameters[name], value, key)
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if state.loss_scale is not None and scaler is not None:
            scaler.cur_scale = state.loss_scale

    def _full(self, name: str, key: str | None = None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if self._has_shards(parameter):
            value = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
        else:
            master = self._master(parameter)
            value = self._torch_optimizer().state[master][key] if key else master
        return value.detach().to("cpu", torch.float32, copy=True).view(_whole_shape(parameter))

    def _set(self, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._has_shards(parameter):
            value = value.to(parameter.device)
            if key:
                safe_set_full_optimizer_state(parameter, value, key)
            else:
                safe_set_full_fp32_param(parameter, value)
        else:
            master = self._master(parameter)
            (self._torch_optimizer().state[master][key] if key else master.data).copy_(value)

    def _set_gradient(self, number: int, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Put a gradient where DeepSpeed's step looks for it."""
        from deepspeed.utils import safe_set_full_grad

        optimizer = self._engine.optimizer
        if self._is_sharded:
            safe_set_full_grad(parameter, value)
        elif self._engine.zero_optimization():  # deepspeed/runtime/zero/stage_1_and_2.py, step
            size, rank = int(optimizer.partition_size[number]), dist.get_rank()
            share = torch.nn.functional.pad(value, (0, size * dist.get_world_size() - value.numel()))
            share = share[rank * size : (rank + 1) * size]
            if optimizer.cpu_offload:
                master = optimizer.single_partition_of_fp32_groups[number]
                master.grad = share.to(master.device, master.dtype)
            else:
                optimizer.averaged_gradients[number] = [share.to(optimizer.gradient_accumulation_dtype)]
        else:
            parameter.grad = value.to(parameter.dtype)

    def _loss_scale(self) -> float:
        return float(self._engine.optimizer.cur_scale) if self._engine.fp16_enabled() else 1.0

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What stage 0 optimizes: the parameter, or in 16-bit its float32 copy."""
        # The copies lie beside the parameters in deepspeed/runtime/fp16/unfused_optimizer.py.
        optimizer = self._engine.optimizer
        pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)
        copies = {id(p): copy for low, high in pairs for p, copy in zip(low, high, strict=True)}
        return copies.get(id(parameter), parameter)

    @staticmethod
    def _has_shards(parameter: torch.nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _make_optimizer_state(self, optimizer_step: int) -> None:
        """Give torch's AdamW the zeroed state that it would make in its first step, at the right step number."""
        optimizer = self._torch_optimizer()
        groups = getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
        if groups is None:
            groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for flat in groups:
            state = optimizer.state[flat]
            device = flat.device if optimizer.defaults["fused"] else "cpu"  # where torch's AdamW looks for it
            state["step"] = torch.tensor(float(optimizer_step), device=device)
            for key in MOMENTS:
                if key not in state:
                    state[key] = torch.zeros_like(flat)
        link_fragments = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)  # stages 1 and 2
        if link_fragments is not None:
            link_fragments()


def parameter_groups(parameters: dict[str, torch.nn.Parameter], training: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW groups by name: A matrices and the rest, and B matrices at loraplus_lr_ratio times the learning rate."""
    b_matrices = [name for name in parameters if "lora_B" in name]
    others = [name for name in parameters if "lora_B" not in name]
    if training.loraplus_lr_ratio == 1:
        others, b_matrices = list(parameters), []
    groups = [{"names": others, "lr_ratio": 1.0}, {"names": b_matrices, "lr_ratio": training.loraplus_lr_ratio}]
    return [{**group, "weight_decay": training.weight_decay} for group in groups if group["names"]]


def _keep_resident(optimizer: Any, parameters: list[torch.nn.Parameter]) -> None:
    """Have ZeRO-3 gather these after each step and not release them, however large they are."""
    for parameter in parameters:
        if not parameter.ds_persist:
            parameter.ds_persist = True
            optimizer.persistent_parameters.append(parameter)


def _link_moments_once_all_are_there(optimizer: Any) -> None:
    """Have stages 1 and 2 look for the moments of all groups of parameters once the last one has stepped.

    DeepSpeed 0.19.8 looks after the first group's first step, once, and the others' moments are never found
    (deepspeed/runtime/zero/stage_1_and_2.py, _optimizer_step). Drop with a version that waits.
    """
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:

        def link_if_all_are_there() -> None:
            if len(optimizer.optimizer.state) == len(optimizer.bit16_groups):
                link()

        optimizer._lazy_init_hp_params_optimizer_state = link_if_all_are_there


def _gather_as_one(model: torch.nn.Module) -> None:
    """Make each fused module one unit of ZeRO-3: gathered as a whole, announced by one pair of hooks."""
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

    for module in leaf_modules(model):
        set_z3_leaf_module(module, True)
        _remember_parameters(module)
    _remember_parameters(model)
    model.enable_input_require_grads()  # else the first layer's backward is never announced to ZeRO-3


def _walk_past_leaves(engine: Any) -> None:
    """DeepSpeed visits every module before and after a forward pass: thousands, while the GPU has nothing to do.

    It marks them, so that a parameter that one module takes from another is found. Leaf modules are gathered whole.
    """
    model = engine.module
    inside = {id(part) for leaf in leaf_modules(model) for part in leaf.modules() if part is not leaf}
    visited = [module for module in model.modules() if id(module) not in inside]

    def walking_less(walk: Callable[..., Any]) -> Callable[..., Any]:
        def walk_less(*arguments: Any) -> Any:
            model.__dict__["modules"] = lambda: iter(visited)
            try:
                return walk(*arguments)
            finally:
                del model.__dict__["modules"]

        return walk_less

    engine._forward_prologue = walking_less(engine._forward_prologue)
    engine._forward_epilogue = walking_less(engine._forward_epilogue)


def _without_tracing() -> None:
    """Switch off what DeepSpeed does in every hook for profilers and debug prints: the host's time is short."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False
    plain = partition_parameters.print_rank_0

    def print_rank_0(message, debug=False, force=False):
        if debug or force:  # asked before the rank is
            plain(message, debug, force)

    partition_parameters.print_rank_0 = print_rank_0
    if torch.cuda.is_available():
        # torch looks up an unnamed device at length.
        get_accelerator().current_stream = lambda index=None: torch.cuda.current_stream(
            torch.cuda.current_device() if index is None else index
        )


def _remember_parameters(module: torch.nn.Module) -> None:
    # ZeRO-3's hooks walk the module tree for its parameters several times a step.
    parameters, plain = list(module.named_parameters()), module.named_parameters

    def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        return iter(parameters) if recurse and not prefix and remove_duplicate else plain(prefix, recurse)

    module.named_parameters = named_parameters  # type: ignore[assignment]


def _whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
