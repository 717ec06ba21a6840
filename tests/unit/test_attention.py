"""Attention with sinks is transformers' own of gpt_oss."""

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from qlora_ray.model.attention import Sight, attend, dense_mask, mask_of_borders, no_mask

SCALE, LENGTH = 0.3, 12


@pytest.mark.parametrize("borders", [None, [0, 5, 12, 24]])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_with_sinks_and_its_gradients_are_those_of_transformers(borders, window):
    torch.manual_seed(0)
    parts = [torch.randn(2, heads, LENGTH, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    sinks, grad = torch.randn(4, dtype=torch.float64), torch.randn(2, 4, LENGTH, 8, dtype=torch.float64)
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups, module.training = sinks, 2, True
    mask = no_mask(sinks.device) if borders is None else mask_of_borders(torch.tensor(borders), sinks.device)
    sight = Sight(SCALE, window, sinks)
    ours = attend(*parts, mask, sight)
    seen = dense_mask(mask, 2, LENGTH, sight)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None] if seen is None else seen
    blocked = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    theirs = eager_attention_forward(module, *parts, blocked, scaling=SCALE)[0].transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(y, parts, grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
