"""The only home of DeepSpeed: builds the ZeRO engine, steps it, and takes its state apart by parameter name."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from qlora_ray.config import TrainingConfig
from qlora_ray.model.adapter import trainable
from qlora_ray.model.fused import is_fused, leaf_modules
from qlora_ray.worker.flat import FlatLora

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names


@dataclass(frozen=True)
class AdapterState:
    """Everything that training changes, whole, in float32 on the CPU, by parameter name."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]  # exp_avg and exp_avg_sq
    optimizer_step: int
    loss_scale: float | None = None


class Engine:
    """A LoRA model inside DeepSpeed, at any ZeRO stage."""

    def __init__(self, model: torch.nn.Module, training: TrainingConfig, deepspeed_config: dict[str, Any]):
        import deepspeed

        if not torch.cuda.is_available():
            # Without this DeepSpeed compiles a shared-memory collective on first use (25 s, a compiler); gloo does.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        groups = parameter_groups(trainable(model), training)
        self._flat = FlatLora(model, [group["names"] for group in groups]) if is_fused(model) else None
        self._parameters = self._flat.parameters if self._flat else trainable(model)
        is_sharded = deepspeed_config["zero_optimization"]["stage"] == 3
        if is_sharded:
            _gather_as_one(model)
            _without_tracing()
        wholes = list(self._parameters.values())
        for number, group in enumerate(groups):
            names = group.pop("names")
            group["params"] = [wholes[number]] if self._flat else [self._parameters[name] for name in names]
        optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, fused=wholes[0].is_cuda)
        self._lr_ratios = [group.pop("lr_ratio") for group in optimizer.param_groups]
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
        if self._flat:
            if is_sharded:
                _keep_resident(self._engine.optimizer, wholes)
            model.register_forward_pre_hook(lambda *_: self._flat.attach(torch.is_grad_enabled()))  # after ZeRO's own
        elif is_sharded:
            _take_norms_at_once(self._engine.optimizer)
        for state in self._torch_optimizer().state.values():  # some wrappers begin with an empty step: not counted
            state["step"].zero_()

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self._engine(**inputs)

    __call__ = forward

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)
        if self._flat and not mode:  # generation does not pass by the hook
            self._flat.attach(with_graph=False)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this worker's share of the global loss."""
        # ZeRO averages gradients over workers (deepspeed/runtime/zero/stage3.py); x world size makes it a sum again.
        self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> None:
        """Finish a micro-batch; after the last of a step, update the weights with this learning rate."""
        for group, ratio in zip(self._engine.optimizer.param_groups, self._lr_ratios, strict=True):
            group["lr"] = learning_rate * ratio
        self._engine.step()

    def grad_norm(self) -> float | None:
        """Global gradient norm before clipping, of the last step."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights, whole, in float32 on the CPU. Every worker must call this."""
        return self._by_matrix({name: self._full(name) for name in self._parameters})

    def state(self) -> AdapterState:
        """Gather weights and optimizer state. Every worker must call this; every worker gets all of it."""
        by_key = {key: self._by_matrix({name: self._full(name, key) for name in self._parameters}) for key in MOMENTS}
        moments = {name: {key: by_key[key][name] for key in MOMENTS} for name in by_key[MOMENTS[0]]}
        scale = getattr(self._engine.optimizer, "cur_scale", None) if self._engine.fp16_enabled() else None
        optimizer_step = int(next(iter(self._torch_optimizer().state.values()))["step"])  # less than ours: fp16 skips
        return AdapterState(self.weights(), moments, optimizer_step, scale)

    def load_state(self, state: AdapterState) -> None:
        """Restore what `state` returned. Every worker must call this, after the weights were put into the module."""
        self._make_optimizer_state(state.optimizer_step)
        moments = {key: {name: both[key] for name, both in state.moments.items()} for key in MOMENTS}
        join = self._flat.join if self._flat else dict
        for name, value in join(state.weights).items():
            self._set(self._parameters[name], value)
        for key in MOMENTS:
            for name, value in join(moments[key]).items():
                self._set(self._parameters[name], value, key)
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if state.loss_scale is not None and scaler is not None:
            scaler.cur_scale = state.loss_scale

    def _by_matrix(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._flat.split(values) if self._flat else values

    def _full(self, name: str, key: str | None = None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if self._is_sharded(parameter):
            value = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
        else:
            master = self._master(parameter)
            value = self._torch_optimizer().state[master][key] if key else master
        return value.detach().to("cpu", torch.float32, copy=True).view(_whole_shape(parameter))

    def _set(self, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._is_sharded(parameter):
            value = value.to(parameter.device)
            if key:
                safe_set_full_optimizer_state(parameter, value, key)
            else:
                safe_set_full_fp32_param(parameter, value)
        else:
            master = self._master(parameter)
            (self._torch_optimizer().state[master][key] if key else master.data).copy_(value)

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What stage 0 optimizes: the parameter, or in 16-bit its float32 copy."""
        # The copies lie beside the parameters in deepspeed/runtime/fp16/unfused_optimizer.py.
        optimizer = self._engine.optimizer
        pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)
        copies = {id(p): copy for low, high in pairs for p, copy in zip(low, high, strict=True)}
        return copies.get(id(parameter), parameter)

    @staticmethod
    def _is_sharded(parameter: torch.nn.Parameter) -> bool:
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


def _gather_as_one(model: torch.nn.Module) -> None:
    """Make each fused module one unit of ZeRO-3: gathered as a whole, announced by one pair of hooks."""
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

    for module in leaf_modules(model):
        set_z3_leaf_module(module, True)
        _remember_parameters(module)
    _remember_parameters(model)
    model.enable_input_require_grads()  # else the first layer's backward is never announced to ZeRO-3


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


def _take_norms_at_once(optimizer: Any) -> None:
    """ZeRO-3 launches one kernel after another for the norm of each gradient; here all come from one call."""
    plain = optimizer.get_grad_norm_direct

    def get_grad_norm_direct(gradients, params, norm_type=2):
        # The norm of the norms is the norm of all; DeepSpeed reduces it over workers and checks it.
        dtype = torch.float32 if gradients[0].is_cuda else torch.float64
        return plain([torch.stack(torch._foreach_norm(gradients, norm_type, dtype))], params[:1], norm_type)

    optimizer.get_grad_norm_direct = get_grad_norm_direct


def _remember_parameters(module: torch.nn.Module) -> None:
    # ZeRO-3's hooks walk the module tree for its parameters several times a step.
    parameters, plain = list(module.named_parameters()), module.named_parameters

    def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        return iter(parameters) if recurse and not prefix and remove_duplicate else plain(prefix, recurse)

    module.named_parameters = named_parameters  # type: ignore[assignment]


def _whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
