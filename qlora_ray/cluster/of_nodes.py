"""Checks of what each node has for itself: packages, GPUs, compilers, the model. Pure."""

from typing import Literal

from qlora_ray.cluster.found import Found, Row

MAX_SKEW_SECONDS = 2.0
MIN_OPEN_FILES = 8192  # what Ray recommends; it raises the soft limit itself, up to the hard one
# Oldest driver of each CUDA major (docs.nvidia.com/deploy/cuda-compatibility).
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}


def versions(found: Found):
    """Python, packages and this package's code, against the driver's."""
    ours = found.driver["versions"]
    for node, facts in found.nodes.items():
        other = {name: value for name, value in facts["versions"].items() if value != ours[name]}
        if other:
            text = ", ".join(f"{name} {value} (driver {ours[name]})" for name, value in other.items())
            yield Row("versions", node, "bad", text, "Install what constraints.txt pins, on every node.")
        elif facts["code"] != found.driver["code"]:
            text = f"qlora_ray's code is {facts['code']}, the driver's {found.driver['code']}"
            yield Row(
                "versions", node, "bad", text, "Submit with --working-dir, or install the same commit everywhere."
            )
        else:
            yield Row("versions", node, "ok", f"Python {ours['python']}, torch {ours['torch']}, ray {ours['ray']}")


def gpus(found: Found):
    """The GPUs of each node, and their free memory (GiB) against what a worker needs."""
    if not found.needs.use_gpu:
        yield Row("GPU", "all", "ok", "the run is on CPUs")
        return
    kinds = set()
    for node, facts in _with_gpus(found):
        if not facts["gpus"]:
            yield Row("GPU", node, "bad", "Ray has GPUs there, nvidia-smi shows none", "Install NVIDIA's driver.")
            continue
        kinds |= {gpu["name"] for gpu in facts["gpus"]}
        free = min(gpu["free_gib"] for gpu in facts["gpus"])
        first, need = facts["gpus"][0], found.needs.worker_gib
        text = (f"{len(facts['gpus'])} x {first['name']}, {free:.1f} of {first['total_gib']:.1f} GiB free, "
                f"driver {first['driver']}, compute capability {first['compute_capability']}")  # fmt: skip
        if need is not None and free < need:
            text += f"; a worker needs about {need:.1f} GiB"
            yield Row("GPU", node, "bad", text, "End what holds the memory, or lower training.batch_size.")
        else:
            yield Row("GPU", node, "ok", text)
    if len(kinds) > 1:
        yield Row("GPU", "all", "unknown", f"mixed: {', '.join(sorted(kinds))}", "The slowest sets the pace of all.")


def cuda(found: Found):
    """Whether torch is built for CUDA, and the driver is new enough for it; no row for a run on CPUs."""
    if not found.needs.use_gpu:
        return
    for node, facts in _with_gpus(found):
        if facts["cuda"] is None:
            todo = "Install torch from PyPI, not its CPU build."
            yield Row("CUDA", node, "bad", f"torch {facts['versions']['torch']} is built without CUDA", todo)
            continue
        oldest = OLDEST_DRIVER.get(facts["cuda"].split(".")[0])
        for gpu in facts["gpus"][:1]:
            text = f"torch for CUDA {facts['cuda']}, driver {gpu['driver']}"
            if oldest and int(gpu["driver"].split(".")[0]) < oldest:
                yield Row("CUDA", node, "bad", text, f"Update the driver to {oldest} or newer.")
            else:
                yield Row("CUDA", node, "ok", text)


def bfloat16(found: Found):
    """Whether the GPUs have bfloat16, where the run computes in it."""
    if not found.needs.use_gpu or found.needs.compute_dtype not in ("auto", "bfloat16"):
        return
    for node, facts in _with_gpus(found):
        old = [gpu for gpu in facts["gpus"] if float(gpu["compute_capability"]) < 8.0]
        if old:
            text = f"{old[0]['name']} has no bfloat16 (compute capability {old[0]['compute_capability']}, needs 8.0)"
            yield Row("bf16", node, "bad", text, "Set quantization.compute_dtype=float16.")
        elif facts["gpus"]:
            yield Row("bf16", node, "ok", "yes")


def base_model(found: Found):
    """Whether each node can load the base model."""
    states: dict[bool | None, Literal["ok", "bad", "unknown"]] = {True: "ok", False: "bad", None: "unknown"}
    for node, facts in found.nodes.items():
        here, why = facts["base"]["here"], facts["base"]["why"]
        todo = "" if here else "Put the model in a folder that all nodes see, or fill each node's hub cache."
        yield Row("base model", node, states[here], why, todo)


def compilers(found: Found):
    """Whether Triton can compile its kernels; nothing compiles on CPUs, which get no row."""
    if not found.needs.use_gpu:
        return
    for node, facts in _with_gpus(found):
        missing = [name for name, is_there in facts["tools"].items() if not is_there]
        if missing:
            todo = "Install a compiler: apt-get install gcc python3-dev."
            yield Row("compiler", node, "bad", f"Triton's kernels: no {', '.join(missing)}", todo)
        else:
            yield Row("compiler", node, "ok", f"Triton's kernels: {', '.join(facts['tools'])}")


def clocks(found: Found):
    """Seconds between each node's clock and the driver's."""
    for node, facts in found.nodes.items():
        skew = facts.get("skew", 0.0)
        text = (
            f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the driver"
            if skew
            else "in step with the driver"
        )
        if abs(skew) > MAX_SKEW_SECONDS:
            yield Row("clock", node, "bad", text, "Run an NTP client there (chrony): storage and tokens need the time.")
        else:
            yield Row("clock", node, "ok", text)


def open_files(found: Found):
    """The soft and hard limits of open files; Ray raises the soft one itself."""
    for node, facts in found.nodes.items():
        soft, hard = facts["open_files"]
        text = f"{soft:,} open files, at most {hard:,}" if hard >= 0 else f"{soft:,} open files, no limit"
        if 0 <= hard < MIN_OPEN_FILES:
            yield Row("open files", node, "bad", text, f"Raise the hard limit to {MIN_OPEN_FILES:,} (ulimit -Hn).")
        else:
            yield Row("open files", node, "ok", text)


def _with_gpus(found: Found):
    held = found.resources
    return [(node, facts) for node, facts in found.nodes.items() if not held or held.get(node, {}).get("GPU")]
