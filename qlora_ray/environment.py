"""Which environment variables the workers of a cluster get from the driver, and which never leave it. Pure."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from qlora_ray.libraries import Patch

# Names or patterns; docs/cluster.md repeats them. What is not here stays on the driver's machine.
CARRIED = (
    "NCCL_*", "GLOO_*", "TORCH_NCCL_*", "UCX_*", "FI_*",  # how processes reach each other
    "HF_*", "TRANSFORMERS_*", "TOKENIZERS_PARALLELISM",  # where models come from, what libraries say
    "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG",
    "TORCH_DISTRIBUTED_DEBUG", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "PYTHONWARNINGS",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
)  # fmt: skip
SECRET_NAME = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|AUTH", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/\s@]*@|\bhf_[A-Za-z0-9]{16,}|\bBearer\s", re.IGNORECASE)  # user:password@host
SUBMITTED_JOB = Patch(
    "ray", "2.60.0", "reads the variable in which Ray's job manager leaves a job's runtime_env",
    gains="what a job sets for itself is not told to Ray twice, which it refuses; relative paths are those of the job",
    delete_when="ray.runtime_context names the runtime_env of a submitted job before ray.init",
)  # fmt: skip
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # where Ray's job manager leaves a job's runtime_env


def carried(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to give to every worker of a cluster: on the list, and no secret by name or by value.

    What a Ray job sets for itself reaches the workers anyway, and Ray refuses to be told it twice.
    """
    of_job = _env_vars_of_job(environ)
    names = [name for name in environ if any(fnmatchcase(name, pattern) for pattern in CARRIED)]
    return {name: environ[name] for name in sorted(names) if name not in of_job and not is_secret(name, environ[name])}


def kept_back(environ: Mapping[str, str]) -> list[str]:
    """Names on the list that are not carried since they look like secrets."""
    named = (name for name in environ if any(fnmatchcase(name, pattern) for pattern in CARRIED))
    return sorted(name for name in named if is_secret(name, environ[name]))


def network(interfaces: Iterable[str], environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What tells gloo and NCCL to use these interfaces, named as on the nodes, where the user has not chosen.

    Where nodes name theirs differently gloo is told nothing: it needs a name that is there on every node.
    """
    names = sorted(set(interfaces))
    chosen = {"NCCL_SOCKET_IFNAME": f"={','.join(names)}"} if names else {}
    if len(names) == 1:
        chosen["GLOO_SOCKET_IFNAME"] = names[0]
    return {name: value for name, value in chosen.items() if name not in (environ or {})}


def is_secret(name: str, value: str) -> bool:
    """Whether a variable looks like one that must not stand in Ray's job metadata and logs."""
    return bool(SECRET_NAME.search(name) or SECRET_VALUE.search(value))


def hide_secrets(text: str) -> str:
    """The text without what stands before the @ of a URI, which may be a password."""
    return re.sub(r"://[^/\s@]*@", "://***@", text)


def ray_address(asked: str | None) -> str | None:
    """Where the Ray cluster of a run is, "auto" for the one of this machine; None for a private Ray."""
    where = asked or os.environ.get("RAY_ADDRESS")
    return None if where == "local" else where


@contextlib.contextmanager
def changed(**variables: str) -> Iterator[None]:
    """Within, this process and those that it starts have these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def in_job(environ: Mapping[str, str]) -> bool:
    """Whether this process was started by `ray job submit`."""
    return JOB_CONFIG in environ


def _env_vars_of_job(environ: Mapping[str, str]) -> set[str]:
    if not in_job(environ):
        return set()
    given = json.loads(environ[JOB_CONFIG]).get("runtime_env", {}).get("env_vars", {})
    return set(given) | {"OMP_NUM_THREADS"}  # which Ray sets itself on whatever it starts, by the CPUs it holds
