"""Rows that workers share: what is refused, what a worker gets of a row, and what plan and doctor say of it."""

import dataclasses

import numpy as np
import pytest
import torch

from qlora_ray.cluster.found import Found, look
from qlora_ray.cluster.needs import needs_of
from qlora_ray.cluster.of_cluster import shared_rows
from qlora_ray.config import Config, make_config
from qlora_ray.data.rows import open_rows
from qlora_ray.data.stats import DataStats
from qlora_ray.errors import ConfigError
from qlora_ray.model.attention import Sight, attend
from qlora_ray.model.dropout import drop_of, kept
from qlora_ray.model.facts import ExpertSizes, RopeLimit
from qlora_ray.model.row_group import RowGroup
from qlora_ray.planning.early import exact_facts
from qlora_ray.planning.hardware import Hardware
from qlora_ray.planning.plan import make_plan
from qlora_ray.planning.sharing import exchanged_bytes
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.seat import Seat, seat_of
from tests.made_rows import make_random_entry

FACTS, CPU = exact_facts(Config()), torch.device("cpu")
DATA = DataStats(
    "key", 100, 0, 0, num_rows=90, num_validation_rows=10, num_tokens=900, num_label_tokens=400, longest_row=500
)


def shared(size: int, workers=4, **sections) -> dict:
    training = {"sequence_parallel": size, **sections.pop("training", {})}
    return {**sections, "training": training, "ray": {"num_workers": workers}}


def plan(size: int, workers=4, facts=FACTS, **sections):
    return make_plan(make_config(shared(size, workers, **sections)), DATA, facts, Hardware(8, 0), None)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (shared(2, 3), "sequence_parallel=2: 2 workers share each row, and ray.num_workers=3 is not a multiple of it. "
                       "Use ray.num_workers=2."),
        (shared(4, 1), "ray.num_workers=1 is not a multiple of it. Use ray.num_workers=4."),
        (shared(2, [1, 4]), "ray.num_workers=[1,4] is not a multiple of it. Use ray.num_workers=[2,4]."),
        (shared(2, training={"objective": "dpo"}), "training.objective=dpo compares whole answers"),
        (shared(2, training={"neftune_noise_alpha": 5}), "training.neftune_noise_alpha=5 draws the noise"),
        (shared(0), "training.sequence_parallel=0: input should be greater than or equal to 1."),
    ],
)  # fmt: skip
def test_config_refuses_what_workers_cannot_share(sections, said):
    with pytest.raises(ConfigError) as refused:
        make_config(sections)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sections", "said"),
    [
        ({"model_type": "falcon"}, {}, "those of falcon models are not"),
        ({"model_type": "gpt2"}, {}, "gpt2 models have learned positions, of whole rows"),
        ({"model_type": "mixtral", "experts": ExpertSizes(4, 2, 8, 8, 8, 2, 100, 100)}, {},
         "those of mixtures of experts (mixtral) attend to whole rows"),
        ({}, {"quantization": {"type": "none"}}, "quantization.type=none leaves them to PEFT"),
        ({}, {"model": {"lora_variant": "dora", "lora_dropout": 0.1}, "deepspeed": {"zero_stage": 2}},
         "model.lora_dropout or model.modules_to_save leave them to PEFT"),
        ({"adapted_layers": {**FACTS.adapted_layers, "lm_head": 1}}, {}, "lm_head is adapted beside them"),
        ({"adapted_layers": {"q_proj": 1}, "num_layers": 2}, {}, "some get no LoRA"),
        ({"num_heads": 6}, {}, "the base has 6. Use a number that divides them, such as 3."),
        ({"rope_limit": RopeLimit("longrope", 128)}, {"training": {"batch_size": 1}},
         "the base's RoPE (longrope) changes beyond 128"),
    ],
)  # fmt: skip
def test_plan_refuses_bases_whose_layers_would_see_a_part_of_a_row_alone(changes, sections, said):
    with pytest.raises(ConfigError) as refused:
        plan(4, facts=dataclasses.replace(FACTS, **changes), **sections)
    assert str(refused.value).startswith("training.sequence_parallel=4: ") and said in str(refused.value)


def test_plan_has_as_many_micro_batches_as_groups_and_tokens_of_a_part():
    whole, parts = plan(1), plan(2, training={"gradient_accumulation_steps": 3})
    assert (whole.micro_batches_per_step, parts.micro_batches_per_step) == (4, 6)
    assert (whole.tokens_per_micro_batch, parts.tokens_per_micro_batch) == (4 * 500, 4 * 256)  # 512 / 2, padded to 8
    assert parts.memory_forecast_gib["activations"] < whole.memory_forecast_gib["activations"]


def test_global_batch_is_split_among_groups():
    assert plan(2, training={"global_batch_size": 16}).gradient_accumulation_steps == 2
    with pytest.raises(ConfigError, match=r"batch_size x ray.num_workers / training.sequence_parallel = 4 x 2"):
        plan(2, training={"global_batch_size": 12})


def test_bytes_sent_are_those_of_the_all_to_alls():
    """q, k and v to the other worker, and what attention gives back: forward, again, and their gradients."""
    layer = plan(2).layer_shape
    each = 3 * (layer.queries + 2 * layer.keys + layer.queries) * layer.element_bytes / 2
    assert exchanged_bytes(layer, num_layers=3, num_tokens=10) == 3 * 10 * each


def test_doctor_says_what_workers_share_and_whether_a_group_lies_on_one_node():
    needs = needs_of(make_config(shared(2)), Hardware(4, 0), FACTS)
    assert (needs.row_parts, needs.object_store_bytes) == (2, 4 * 4 * 512 * 12 * 512)
    for held, state in (([2.0, 2.0], "ok"), ([3.0, 1.0], "unknown"), ([3.0], "ok")):
        found = Found({}, {}, needs, {str(node): {"CPU": count} for node, count in enumerate(held)})
        (row,) = look(found, [shared_rows])
        assert row.state == state and "2 workers hold each row, 256 of up to 512 tokens each" in row.found
    alone = needs_of(make_config(shared(1)), Hardware(4, 0), FACTS)
    assert not look(Found({}, {}, alone), [shared_rows])


def test_neighbours_in_rank_are_a_group():
    assert [seat_of(rank, 4, 2) for rank in range(4)] == [Seat(0, 2, 0, 2), Seat(0, 2, 1, 2), Seat(1, 2, 0, 2),
                                                          Seat(1, 2, 1, 2)]  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_parts_of_rows_are_the_whole_rows_cut_with_each_border_label_on_the_side_that_predicts_it(
    tmp_path, num_parts, packed
):
    lengths = [[16, 16, 7], [24, 3]] if packed else [[39], [27]]  # samples end at 16 and 24, where parts do
    rows = open_rows(make_random_entry(tmp_path, lengths, packed), "train").gather(np.array([0, 1]))
    whole = to_tensors(rows, 0, CPU)
    parts = [to_tensors(rows, 0, CPU, Seat(0, 1, part, num_parts)) for part in range(num_parts)]
    joined = {name: torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "position_ids", "targets")}
    used, width = whole["input_ids"].shape[1], joined["input_ids"].shape[1]
    assert width % (8 * num_parts) == 0 and width - used < 8 * num_parts
    assert torch.equal(joined["input_ids"][:, :used], whole["input_ids"])
    assert torch.equal(joined["targets"][:, : used - 1], whole["labels"][:, 1:])
    assert (joined["targets"][:, used - 1 :] == -100).all() and (joined["input_ids"][:, used:] == 0).all()
    positions = whole["position_ids"] if packed else torch.arange(used).expand(2, -1)
    ends = [39, 27]
    for row, end in enumerate(ends):
        assert torch.equal(joined["position_ids"][row, :end], positions[row, :end])
    if packed:
        assert all(part["sample_borders"].tolist() == [0, 16, 32, 39, width, width + 24, width + 27, 2 * width]
                   for part in parts)  # fmt: skip
    own = width // num_parts
    counted = []
    for number, part in enumerate(parts):
        row, column = np.divmod(part["label_places"].numpy(), own)
        assert (part["targets"][row, column] != -100).all() or len(row) == 1
        counted += [
            (int(place), int(r) * width + number * own + int(c))
            for place, r, c in zip(part["place_numbers"], row, column, strict=True)
            if part["targets"][r, c] != -100
        ]
    places = (joined["targets"].flatten() != -100).nonzero()[:, 0].tolist()
    assert [place for _, place in sorted(counted)] == places
    assert [number for number, _ in sorted(counted)] == list(range(len(places)))


class Together(RowGroup):
    """A group whose workers all live here: `exchange` is told what each of them sends."""

    def _exchange(self, sent: torch.Tensor) -> torch.Tensor:
        self.group.append(sent.clone())
        return sent


@pytest.mark.parametrize(("heads", "keys", "size"), [(4, 4, 2), (8, 2, 4), (8, 2, 2), (12, 4, 6), (6, 1, 3)])
def test_each_worker_attends_with_its_heads_and_the_keys_that_these_share(heads, keys, size, monkeypatch):
    random = torch.Generator().manual_seed(0)
    rows, length = 2, 4 * size
    q, k, v = (torch.randn(rows, count, length, 8, generator=random) for count in (heads, keys, keys))
    exact = attend(q, k, v, None, Sight(0.3))
    own = [[part[:, :, rank * 4 : (rank + 1) * 4] for part in (q, k, v)] for rank in range(size)]
    sent: list[torch.Tensor] = []
    for rank in range(size):
        Together(rank, size, sent).to_heads(*own[rank])
    for rank in range(size):
        received = torch.stack([one[rank] for one in sent])
        monkeypatch.setattr(Together, "_exchange", lambda self, _, received=received: received)
        mine = attend(*Together(rank, size, []).to_heads(*own[rank]), None, Sight(0.3))
        assert torch.allclose(mine, exact.chunk(size, 1)[rank], atol=1e-6)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_dropout_of_a_part_is_that_of_whole_rows_that_nobody_shares(tmp_path, num_parts):
    rows = open_rows(make_random_entry(tmp_path, [[39], [24]]), "train").gather(np.array([0, 1]))
    width = to_tensors(rows, 0, CPU)["input_ids"].shape[1]
    whole = kept(2 * width, 9, drop_of(0.5, 3, 1), CPU).view(2, width, 9)
    parts = [to_tensors(rows, 0, CPU, Seat(0, 1, part, num_parts))["token_numbers"] for part in range(num_parts)]
    masks = [kept(part.numel(), 9, drop_of(0.5, 3, 1, part.flatten()), CPU).view(2, -1, 9) for part in parts]
    assert torch.equal(torch.cat(masks, 1)[:, :39], whole[:, :39])


def test_plan_tells_what_a_worker_gets_from_the_others_in_a_step():
    sharing = {"deepspeed": {"share_base": "world"}}
    assert plan(1, workers=1).traffic is None
    alone, elastic = plan(1, **sharing).traffic, plan(1, workers=[2, 4], **sharing).traffic
    assert elastic == alone  # as many as there may be
    trained = FACTS.num_trainable_parameters * 4 * (1 - 1 / 4)  # float32 on CPUs
    assert (alone.gradients, alone.weights, alone.rows) == (2 * trained, trained, 0) and alone.base > 0
    twice = plan(1, training={"gradient_accumulation_steps": 2}, **sharing).traffic
    assert (twice.base, twice.gradients) == (2 * alone.base, 3 * trained)
    assert plan(2, **sharing).traffic.rows > 0 and plan(1, deepspeed={"share_base": "replicate"}).traffic.base == 0
    assert str(alone).startswith("a worker gets ") and "gradients" in str(alone)
