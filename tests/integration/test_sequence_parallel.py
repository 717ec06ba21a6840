"""Rows that workers share: losses, gradients and validation are those of workers that each hold whole rows."""

import pytest
import torch

from tests.fused_models import SETTINGS
from tests.integration import ranks, tiny_models

# Tokens of the samples of each row. Parts end after 24 tokens for two workers, after 16, 32 and 48 for four: samples
# end there exactly, and across; rows are padded to the end of the last part, and one part has no token at all.
PACKED = [[16, 16, 7], [24, 3, 10], [30, 9], [9, 23], [16, 1, 15], [40]]
DENSE = [[39], [24], [30], [9], [32], [48]]
NAMES = {
    "llama": ("llama", PACKED, {}), "llama, dense": ("llama", DENSE, {"training": {"packing": False}}),
    "mistral, sliding window": ("mistral", PACKED, {}),
    "gemma3_text, sliding window, dense": ("gemma3_text", DENSE, {"training": {"packing": False}}),
    "qwen3, all computed again": ("qwen3", PACKED, {"training": {"recompute": "all"}}),
    "phi3, dropout": ("phi3", PACKED, {"model": {"lora_dropout": 0.2}, "training": {"batch_size": 2}}),
    "llama, dora, one row": ("llama", PACKED, {"model": {"lora_variant": "dora"}, "training": {"batch_size": 1}}),
    "llama, whole logits": ("llama", PACKED, {"model": {"modules_to_save": ["lm_head"]}}),
}  # fmt: skip
TEAMS = {"one": (1, 1), "two share": (2, 2), "four share": (4, 4), "two pairs": (4, 2)}  # workers, sequence_parallel


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """What the first worker tells, by team and name."""
    folder = tmp_path_factory.mktemp("ranks")
    more = {**SETTINGS, "mistral": {"sliding_window": 9}}
    bases = {
        family: tiny_models.save(family, folder / family, **more.get(family, {}))
        for family in sorted({family for family, _, _ in NAMES.values()})
    }

    def job(name: str, size: int, num_parts: int) -> ranks.Job:
        family, rows, sections = NAMES[name]
        training = {"batch_size": 2, **sections.get("training", {})}
        training |= {"sequence_parallel": num_parts, "gradient_accumulation_steps": 2 * num_parts // size}
        return ranks.Job(bases[family], {**sections, "training": training}, rows=rows)

    told = {}
    for size in (1, 2, 4):  # the teams of a size share their processes, which are what takes the time
        asked = [(team, name) for team, (of_team, _) in TEAMS.items() if of_team == size for name in NAMES]
        jobs = [job(name, *TEAMS[team]) for team, name in asked]
        for (team, name), of_job in zip(asked, ranks.run(size, folder / str(size), *jobs), strict=True):
            told.setdefault(team, {})[name] = of_job
    return told


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("team", [team for team in TEAMS if team != "one"])
def test_workers_that_share_rows_find_the_loss_and_the_gradient_of_one_that_does_not(held, team, name):
    alone, together = held["one"][name][0], held[team][name]
    exact, made = torch.load(alone.gradient), torch.load(together[0].gradient)
    assert together[0].losses[0] == pytest.approx(alone.losses[0], rel=1e-6)
    assert together[0].eval_loss == pytest.approx(alone.eval_loss, rel=1e-6)
    assert float((made - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_adapter_has_the_same_bits_with_one_group_of_workers_and_with_two(held, name):
    assert held["two share"][name][0].adapter == held["two pairs"][name][0].adapter
