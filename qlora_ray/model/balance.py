"""The load-balancing loss of a mixture's routers (Switch Transformer, arXiv:2101.03961, eq. 4 to 6), off by default.

Of one layer it is E x the sum over experts of f x P, f the share of the micro-batch's tokens that an expert has (all
shares together are k), P its mean probability: k where tokens are spread evenly. It is not part of the loss that is
logged; its gradient goes in where the routers' is.
"""

# M tokens, E experts, k of each token
from functools import partial
from typing import Any

import torch

from qlora_ray.libraries import Patch

ROUTERS = Patch(
    "transformers", "5.23.0", "_can_record_outputs names the class of a mixture's routers, which return logits, scores "
    "and experts",
    gains="the gradient of a loss on logits that a fused layer does not return",
    delete_when="transformers' models take a loss on what their routers return",
)  # fmt: skip


class Balance:
    """How much each layer's load-balancing loss counts in a backward pass."""

    def __init__(self, coefficient: float, num_layers: int):
        self._share = coefficient / num_layers
        self.weight: torch.Tensor | None = None

    def follow(self, nats: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Have a micro-batch's layers count as much as its tokens' nats, by the gradient that these get."""
        nats.register_hook(lambda gradient: setattr(self, "weight", self._share * num_tokens * gradient))


def routers_of(base: Any) -> list[torch.nn.Module]:
    """The routers of a model for which transformers has this loss."""
    record = (getattr(base, "_can_record_outputs", None) or {}).get("router_logits")
    if record is None or not hasattr(base.config, "router_aux_loss_coef"):
        return []
    return [module for module in base.modules() if isinstance(module, record.target_class)]


def balance(model: Any, coefficient: float) -> None:
    """Add the loss, times its coefficient and as a mean over layers, to what an adapted model is trained on."""
    routers = routers_of(model.get_base_model())
    model.balance = Balance(coefficient, len(routers))
    for router in routers:
        router.forward = partial(_forward, router.forward, router, model.balance)  # type: ignore[method-assign]


def balance_of(model: Any) -> Balance | None:
    """What `balance` has added; None without."""
    return model.__dict__.get("balance")


def _forward(plain: Any, router: torch.nn.Module, balance: Balance, *given: Any):
    logits, scores, index = plain(*given)
    if router.training and torch.is_grad_enabled():
        scores = _Balanced.apply(scores, logits, index, balance)
    return logits, scores, index


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, logits, index, balance: Balance):
        """Scores (M, k) as they are, of logits (M, E)."""
        ctx.balance = balance
        ctx.save_for_backward(logits, index)
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, grad):
        logits, index = ctx.saved_tensors
        probabilities, numbers = logits.float().softmax(-1), torch.arange(logits.shape[1], device=logits.device)
        shares = (index[:, :, None] == numbers).sum((0, 1)) / len(logits)  # f, (E,)
        of_each = shares * len(shares) / len(logits)  # gradient of each token's probabilities
        of_logits = probabilities * (of_each - (probabilities * of_each).sum(-1, keepdim=True))
        return grad, (of_logits * ctx.balance.weight).to(logits.dtype), None, None
