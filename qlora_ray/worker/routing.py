"""How evenly a mixture's tokens are spread over its experts."""

from typing import Any

import torch

from qlora_ray.model.routed import take_counts
from qlora_ray.worker.team import Team


def busiest_expert(model: Any, team: Team) -> dict[str, float]:
    """The largest share of a layer's tokens that one expert had since the last call; {} of a base without experts.

    Padding counts. Every worker must call this; waits for the device.
    """
    counts = take_counts(model)
    if not counts:
        return {}
    mine = torch.stack(counts).tolist()
    layers = [[sum(each) for each in zip(*rows, strict=True)] for rows in zip(*team.gather(mine), strict=True)]
    per_token = int(model.config.get_text_config().num_experts_per_tok)
    return {"busiest_expert_share": max(per_token * max(rows) / sum(rows) for rows in layers)}
