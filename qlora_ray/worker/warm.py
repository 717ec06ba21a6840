"""What a GPU's first kernels bring with them, brought while the base is read: libraries, and Triton's cache of kernels.

The first forward pass else waits a second for them.
"""

import torch

from qlora_ray.model.attention import Sight, attend
from qlora_ray.model.norm import Norm
from qlora_ray.model.ops import ops_for


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compute a little of what each library is for. For a thread of its own; what it computes is let go."""
    torch.cuda.set_device(device)  # of this thread
    heads = torch.zeros(1, 1, 128, 128, dtype=dtype, device=device)  # rows, heads, tokens, width
    attend(heads, heads, heads, None, Sight(1.0))
    rows = heads[0, 0]
    ops_for(device).norm_rows(rows, None, Norm(rows[0], 1e-6), rows @ rows)
