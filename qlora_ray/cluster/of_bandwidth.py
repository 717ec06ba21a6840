"""Checks of how fast weights come from each node's disk and host, against what the plan needs. Pure."""

from typing import Any

from qlora_ray.cluster.found import Found, Row

SLOWER = "Steps would wait for weights: more rows or longer ones a forward pass give them more time, {}."


def host_to_gpu(found: Found):
    """From host memory to a GPU; no row where it was not measured."""
    passing = found.needs.passing
    for node, told in found.bandwidth.items():
        todo = SLOWER.format("or more GPU memory, which keeps the last layers")
        need = passing.bytes_per_second if passing else None
        yield _row("host to GPU", node, told["device"], need, todo)


def disk_speed(found: Found):
    """Of deepspeed.nvme_path, or of a local ray.storage_path; no row where it was not measured."""
    passing = found.needs.passing
    for node, told in found.bandwidth.items():
        todo = SLOWER.format("or deepspeed.offload_params=cpu")
        need = passing.bytes_per_second if passing and passing.disk_bytes else None
        yield _row("disk speed", node, told["disk"], need, todo)


def _row(check: str, node: str, told: dict[str, Any], need: float | None, todo: str) -> Row:
    """Yellow where it was asked and not measured, or weights would be waited for."""
    if "why" in told:
        is_fault = told["why"] not in ("no GPU on this node", "not asked")
        return Row(check, node, "unknown" if is_fault else "ok", told["why"], "See there." if is_fault else "")
    where = f"{told['folder']}: " if "folder" in told else ""
    text = f"{where}{told['bytes_per_second'] / 1e9:.1f} GB/s"
    if need is None:
        return Row(check, node, "ok", text)
    text += f"; the layers' weights need {need / 1e9:.1f}"
    is_slow = told["bytes_per_second"] < need
    return Row(check, node, "unknown" if is_slow else "ok", text, todo if is_slow else "")
