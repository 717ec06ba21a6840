"""Rows that workers share: losses, gradients and validation are those of workers that each hold whole rows."""

import functools

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
    "gemma3_text, as long rows": ("gemma3_text", PACKED, {}),
    "llama, yarn": ("llama", PACKED, {"model": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}}),
    "llama, whole logits": ("llama", PACKED, {"model": {"modules_to_save": ["lm_head"]}}),
}  # fmt: skip
TEAMS = {"one": (1, 1), "two share": (2, 2), "four share": (4, 4), "two pairs": (4, 2)}  # workers, sequence_parallel
FOUR = ("llama", "phi3, dropout")  # by four workers, which take their time; the others of them are slow


def of_four(name: str):
    return name if name in FOUR else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Answers what the workers of a team tell of a name; those of a size share their processes."""
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
        return ranks.Job(bases[family], {**sections, "training": training}, rows=rows, takes_as_long="long" in name)

    @functools.cache
    def told(size: int, names: tuple[str, ...]) -> dict[tuple[str, str], list[ranks.Held]]:
        asked = [(team, name) for team, (of_team, _) in TEAMS.items() if of_team == size for name in names]
        jobs = [job(name, *TEAMS[team]) for team, name in asked]
        return dict(zip(asked, ranks.run(size, folder / f"{size}-{len(names)}", *jobs), strict=True))

    def of(team: str, name: str) -> list[ranks.Held]:
        size, others = TEAMS[team][0], tuple(one for one in NAMES if one not in FOUR)
        names = tuple(NAMES) if size < 4 else FOUR if name in FOUR else others
        return told(size, names)[team, name]

    return of


def check(alone: ranks.Held, together: ranks.Held) -> None:
    exact, made = torch.load(alone.gradient), torch.load(together.gradient)
    assert together.losses[0] == pytest.approx(alone.losses[0], rel=1e-6)
    assert together.eval_loss == pytest.approx(alone.eval_loss, rel=1e-6)
    assert float((made - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_that_share_rows_find_the_loss_and_the_gradient_of_one_that_does_not(held, name):
    check(held("one", name)[0], held("two share", name)[0])


@pytest.mark.parametrize("name", map(of_four, NAMES))
@pytest.mark.parametrize("team", ["four share", "two pairs"])
def test_four_workers_that_share_rows_find_the_loss_and_the_gradient_of_one_that_does_not(held, team, name):
    check(held("one", name)[0], held(team, name)[0])


@pytest.mark.parametrize("name", map(of_four, NAMES))
def test_adapter_has_the_same_bits_with_one_group_of_workers_and_with_two(held, name):
    assert held("two share", name)[0].adapter == held("two pairs", name)[0].adapter
