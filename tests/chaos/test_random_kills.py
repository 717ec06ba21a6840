"""Random kills of random processes at random moments: the same bits, and at most one checkpoint interval done again."""

import pytest

from tests.chaos.random_kills import live
from tests.chaos.test_faults import FILES, settings
from tests.integration import door


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_run_killed_seven_times_at_random_ends_with_the_bits_of_one_that_was_not(seed, whole, storage):
    run = storage / f"killed-{seed}"
    story = live(settings(storage, run.name, "ray.max_failures=20"), run, num_kills=7, seed=seed)
    print(story)
    assert story.exit_code == 0 and len(story.kills) == 7, story
    for file in FILES:
        assert door.sha256(run / file) == door.sha256(whole / file), file
