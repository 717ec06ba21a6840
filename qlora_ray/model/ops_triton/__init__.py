"""Element-wise steps of a fused decoder layer on a GPU: the functions of `ops_plain`, one kernel each."""

from qlora_ray.model.ops_triton.activation import activate, activate_backward, activate_backward_with_dots
from qlora_ray.model.ops_triton.dropout import add_lora_back, drop_values, lora_in, lora_in_gradient
from qlora_ray.model.ops_triton.experts import clamped_glu, clamped_glu_backward, sum_of_rows
from qlora_ray.model.ops_triton.loss import cross_entropy
from qlora_ray.model.ops_triton.norm import norm_groups, norm_groups_backward, norm_rows, norm_rows_backward
from qlora_ray.model.ops_triton.rotary import rotate, rotate_backward
from qlora_ray.model.ops_triton.weights import column_dots, dequantize, place, row_lengths

__all__ = [
    "activate",
    "activate_backward",
    "activate_backward_with_dots",
    "add_lora_back",
    "clamped_glu",
    "clamped_glu_backward",
    "column_dots",
    "cross_entropy",
    "dequantize",
    "drop_values",
    "lora_in",
    "lora_in_gradient",
    "norm_groups",
    "norm_groups_backward",
    "norm_rows",
    "norm_rows_backward",
    "place",
    "rotate",
    "rotate_backward",
    "row_lengths",
    "sum_of_rows",
]
