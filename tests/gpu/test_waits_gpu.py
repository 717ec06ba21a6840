"""The host runs ahead of the GPU: within a micro-batch nothing is read back, whatever is trained on."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from qlora_ray.data.rows import Rows
from qlora_ray.data.tokenize import Sample
from qlora_ray.worker.batches import to_tensors
from qlora_ray.worker.loss import log_probabilities, sum_of_nats
from tests import fused_models
from tests.made_rows import make_rows

pytestmark = pytest.mark.gpu
COMMON, ANSWERS = [5, 6, 7, 8], ([9, 10, 11], [12, 13])


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Within, what makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rows_of(folder, pairs: str) -> Rows:
    """Two packed rows of two pairs each, or of four samples that are trained on in part."""
    samples = [Sample(COMMON + said, [(4, 4 + len(said))], False) for said in ANSWERS for _ in range(4)]
    return make_rows(folder, samples, [[0, 2, 1, 3], [4, 6, 5, 7]], packed=True, pairs=pairs)


@pytest.mark.parametrize("pairs", ["", "apart"])
def test_the_host_does_not_wait_for_the_gpu_within_a_micro_batch(pairs, tmp_path):
    model = fused_models.build(fused_models.save("llama", tmp_path / "base"), torch.bfloat16, "cuda")
    batch = to_tensors(rows_of(tmp_path / "rows", pairs).gather(np.arange(2)), 0, torch.device("cuda"))

    def nats() -> torch.Tensor:
        return -log_probabilities(model, batch)[0].sum() if pairs else sum_of_nats(model, batch)

    nats().backward()  # compiles its kernels
    torch.cuda.synchronize()
    with refusing_waits():
        nats().backward()
