"""What one node knows about itself. Runs on every node as a Ray task, so it imports neither torch nor Ray."""

import contextlib
import csv
import hashlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import sysconfig
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import qlora_ray
from qlora_ray.config import ModelConfig, base_model_path
from qlora_ray.errors import ConfigError
from qlora_ray.libraries import TESTED
from qlora_ray.storage import Folder

PACKAGES = (*TESTED, "numpy", "pyarrow", "tokenizers")
COMMAND_SECONDS = 10
SEEN_WITHIN_SECONDS = 3.0  # NFS shows a new file late


@dataclass(frozen=True)
class Question:
    """What a node is asked."""

    model: ModelConfig
    storage: Folder | None  # where to look for the probe and to leave one; None: not asked
    probe: str  # name and content of the file that the driver wrote there
    address: str  # of the node, as Ray knows it
    ask_hub: bool


def gather(question: Question) -> dict[str, Any]:
    """The facts of this node: JSON-like. Never raises for what is missing; that is a fact too."""
    return {
        "versions": versions(),
        "code": code_fingerprint(),
        "gpus": gpus(),
        "cuda": _cuda_of_torch(),
        "nccl": _version("nvidia-nccl-cu13") or _version("nvidia-nccl-cu12"),
        "interface": interface_of(question.address),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "shm_free": _free("/dev/shm"),
        "disk_free": _free(_nearest(question.storage)) if question.storage and question.storage.is_local else None,
        "base": _base(question),
        "tools": tools(),
        "storage": _probe(question),
        "time": time.time(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers; of missing ones "-"."""
    known = {name: _version(name) or "-" for name in PACKAGES}
    return {"qlora_ray": qlora_ray.__version__, "python": platform.python_version(), **known}


def code_fingerprint() -> str:
    """Of this package's Python files: nodes may have the same version of other code."""
    root, digest = Path(qlora_ray.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def gpus() -> list[dict[str, Any]]:
    """Name, UUID, total and free memory (GiB), driver and compute capability of each GPU, by nvidia-smi."""
    query = "name,uuid,memory.total,memory.free,driver_version,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMMAND_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        {"name": name, "uuid": uuid, "total_gib": float(total) / 1024, "free_gib": float(free) / 1024, "driver": driver,
         "compute_capability": capability}
        for name, uuid, total, free, driver, capability in csv.reader(said.splitlines(), skipinitialspace=True)
    ]  # fmt: skip


def interface_of(address: str) -> dict[str, Any] | None:
    """Name and speed (Mbit/s, 0 unknown) of the network interface that has this address; None if none has."""
    import psutil

    for name, held in psutil.net_if_addrs().items():
        if any(one.family in (socket.AF_INET, socket.AF_INET6) and one.address == address for one in held):
            return {"name": name, "mbit": psutil.net_if_stats()[name].speed}
    return None


def tools() -> dict[str, bool]:
    """What Triton needs to compile its kernels, on GPUs alone, and whether it is there."""
    return {
        "cc": any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")),
        "Python.h": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    }


def _cuda_of_torch() -> str | None:
    """The CUDA version that torch was built for, read without importing it; None for a CPU build."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    values: dict[str, str] = {}
    for line in (Path(spec.origin).parent / "version.py").read_text().splitlines():
        name, _, value = line.partition("=")
        values[name.split(":")[0].strip()] = value.strip().strip("'\"")
    return None if values.get("cuda", "None") == "None" else values["cuda"]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _free(path: str) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _nearest(folder: Folder) -> str:
    parent = Path(folder.path)
    while not parent.exists():
        parent = parent.parent
    return str(parent)


def _base(question: Question) -> dict[str, Any]:
    """Whether this node can load the base model, and why not."""
    from qlora_ray.model.facts import check_folder, is_pickled
    from qlora_ray.model.hub import folder_at_hand
    from qlora_ray.model.own_code import refuse_unread_code

    model = question.model
    base = base_model_path(model.base_model)
    folder = folder_at_hand(model.base_model, model.revision)
    if folder is None:
        is_path = os.path.isabs(base) or base.startswith(".")
        return {"here": False, "why": f"no folder {base}"} if is_path else _on_the_hub(question)
    try:
        check_folder(folder)
        refuse_unread_code(folder, model, f"model.base_model={model.base_model}")
    except ConfigError as error:
        return {"here": False, "why": str(error)}
    where = "in the hub's cache" if folder != base else base if model.base_model != "embedded" else "embedded"
    more = "; its pickled weights are converted once, when they are first read" if is_pickled(folder) else ""
    return {"here": True, "why": f"{where}{more}"}


def _on_the_hub(question: Question) -> dict[str, Any]:
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        if is_offline_mode():
            return {"here": False, "why": "not in the hub's cache, and HF_HUB_OFFLINE is set"}
        if not question.ask_hub:
            return {"here": None, "why": "not in the hub's cache; the hub was not asked"}
        HfApi().model_info(question.model.base_model, revision=question.model.revision, timeout=5)
    except (OSError, HTTPError, HFValidationError) as error:
        return {"here": False, "why": f"the hub does not give it: {(str(error).splitlines() or [''])[0]}"}
    return {"here": True, "why": "on the hub"}


def _probe(question: Question) -> dict[str, Any] | None:
    """Whether this node reads what the driver wrote to the storage path; leaves a file of its own for the driver."""
    if question.storage is None:
        return None
    try:
        sees = _reads(question.storage / question.probe, question.probe.encode())
        mine = f"{question.probe}-{os.getpid()}-{socket.gethostname()}"
        if sees:  # else the path means another folder here: leave nothing in it
            (question.storage / mine).write_bytes(mine.encode())
    except OSError as error:
        return {"reads": False, "wrote": None, "why": str(error)}
    return {"reads": sees, "wrote": mine if sees else None, "why": ""}


def _reads(file: Folder, content: bytes) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if file.read_bytes() == content:
                return True
        time.sleep(0.1)
    return False
