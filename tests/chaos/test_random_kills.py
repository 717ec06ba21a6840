"""Random kills of random processes at random moments: the same bits, and at most one checkpoint interval done again."""

import pytest

from tests.chaos.random_kills import live
from tests.chaos.test_faults import settings
from tests.integration import door, many_runs

STEPS, KILLS, INTERVAL = 60, 5, 5
FILES = ("adapter/adapter_model.safetensors", f"checkpoints/step_{STEPS:08d}/optimizer.safetensors")
MORE = (f"training.max_steps={STEPS}", f"checkpoint.every_steps={INTERVAL}", "ray.max_failures=20")


@pytest.fixture(scope="module")
def undisturbed(storage, one_thread_a_worker):
    ended = many_runs.run(*settings(storage, "undisturbed", *MORE))
    assert ended.returncode == 0, ended.stderr
    return storage / "undisturbed"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 5])  # what they draw: the first one each kind of process
def test_run_killed_five_times_at_random_ends_with_the_bits_of_one_that_was_not(seed, undisturbed, storage):
    run = storage / f"killed-{seed}"
    story = live(settings(storage, run.name, *MORE), run, KILLS, seed)
    print(story)
    assert story.exit_code == 0 and len(story.kills) == KILLS, story
    assert max(story.steps_redone) <= INTERVAL, story
    for file in FILES:
        assert door.sha256(run / file) == door.sha256(undisturbed / file), file
    assert door.losses(run) == door.losses(undisturbed)
