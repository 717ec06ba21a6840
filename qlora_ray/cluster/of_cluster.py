"""Checks of what nodes have between them: network, storage, memory for data, CPUs, who may connect. Pure."""

from qlora_ray.cluster.found import Found, Row
from qlora_ray.planning.memory import GIB
from qlora_ray.storage import SHARE_IT

SLOW_BYTES_PER_SECOND = {True: 1e9, False: 1e8}  # GPUs, CPUs: below it, ZeRO-3's gathers take most of a step
STOP_SECONDS = 60


def answers(found: Found):
    """Nodes that gave no facts."""
    for node, why in found.silent.items():
        todo = "See that the node is up and qlora_ray is installed there; look at its Ray logs."
        yield Row("answer", node, "bad", why, todo)


def network(found: Found):
    """NCCL, and the interface it and gloo will use."""
    names = set()
    for node, facts in found.nodes.items():
        held = facts["interface"]
        if held is None:
            todo = "Start Ray there with --node-ip-address set to an address that the other nodes reach."
            yield Row("network", node, "bad", "no interface has the address that Ray uses for this node", todo)
            continue
        names.add(held["name"])
        text = held["name"] + (f", {held['mbit'] / 1000:g} Gbit/s" if held["mbit"] > 0 else "")
        text += f", InfiniBand {', '.join(facts['infiniband'])}" if facts["infiniband"] else ""
        if found.needs.use_gpu and facts["cuda"] and not facts["nccl"]:
            yield Row(
                "network", node, "unknown", f"{text}; NCCL's package not found", "Expected with torch from source."
            )
        else:
            text += f", NCCL {facts['nccl']}" if found.needs.use_gpu and facts["nccl"] else ""
            yield Row("network", node, "ok", text)
    if len(names) > 1:
        todo = "Set GLOO_SOCKET_IFNAME on each node before `ray start` if the all-reduce fails."
        yield Row("network", "all", "unknown", f"interfaces are named differently: {', '.join(sorted(names))}", todo)
    if len({facts["nccl"] for facts in found.nodes.values()}) > 1 and found.needs.use_gpu:
        yield Row("network", "all", "bad", "the nodes have different NCCL", "Install the same torch everywhere.")


def all_reduce(found: Found):
    """Whether a real sum over all nodes came about, and its bus bandwidth; no row where none was tried."""
    result = found.all_reduce
    if result is None:
        return
    if result.get("skipped"):
        yield Row("all-reduce", "all", "ok", result["skipped"])
    elif result.get("why"):
        todo = "Open all ports between the nodes, and see that the interface above is the one they share."
        yield Row("all-reduce", "all", "bad", result["why"], todo)
    else:
        speed = result["bytes_per_second"]
        text = f"{result['backend']} over {len(found.nodes)} nodes: {speed / 1e9:.2f} GB/s of bus bandwidth"
        need = found.needs.gathered_per_second
        text += f"; workers that share the base gather {need / 1e9:.1f}" if need else ""
        slow = speed < (need or SLOW_BYTES_PER_SECOND[result["backend"] == "nccl"])
        todo = "Use a faster interface, or deepspeed.share_base=replicate or node." if slow else ""
        yield Row("all-reduce", "all", "unknown" if slow else "ok", text, todo)


def shared_rows(found: Found):
    """Whether the workers that hold a row together find room on one node; no row where each holds rows of its own."""
    size, kind = found.needs.row_parts, "GPU" if found.needs.use_gpu else "CPU"
    if size == 1:
        return
    text = found.needs.sharing or f"{size} workers hold each row"
    apart = [node for node, held in found.resources.items() if held.get(kind, 0) % size]
    if len(found.resources) > 1 and apart:
        todo = f"Use nodes with a multiple of {size} {kind}s, or a training.sequence_parallel that divides theirs."
        yield Row("rows", "all", "unknown", f"{text}; over the network where a group lies on two nodes", todo)
    else:
        yield Row("rows", "all", "ok", text)


def shared_storage(found: Found):
    """Whether each node reads what the driver wrote to ray.storage_path, and the driver what the node wrote."""
    for node, facts in found.nodes.items():
        probe = facts["storage"]
        if probe is None:
            continue
        if not probe["reads"]:
            why = probe["why"] or "does not see what the driver wrote to ray.storage_path"
            yield Row("storage", node, "bad", why, SHARE_IT)
        elif not probe.get("driver_reads", True):
            todo = "Mount the same folder read-write on both."
            yield Row("storage", node, "bad", "the driver does not see what this node wrote to ray.storage_path", todo)
        else:
            yield Row("storage", node, "ok", "reads what the driver writes, and the other way round")


def disk(found: Found):
    """Free bytes at a local ray.storage_path against what the run writes."""
    for node, facts in found.nodes.items():
        if facts["disk_free"] is None:
            continue
        need = found.needs.storage_bytes
        text = f"{facts['disk_free'] / GIB:,.1f} GiB free at ray.storage_path, the run writes {need / GIB:,.2f}"
        if facts["disk_free"] < need:
            yield Row("disk", node, "bad", text, "Free space, lower checkpoint.keep, or choose another folder.")
        else:
            yield Row("disk", node, "ok", text)


def shared_memory(found: Found):
    """The object store lives in /dev/shm, unless that is too small: then on disk, many times slower."""
    for node, facts in found.nodes.items():
        store = found.resources.get(node, {}).get("object_store_memory", 0)
        need = found.needs.object_store_bytes
        free = facts["shm_free"]
        text = f"object store {store / GIB:.2f} GiB, /dev/shm has {(free or 0) / GIB:.2f} free"
        if free is not None and free < min(store, need):
            todo = "Give the container more shared memory: --shm-size, or an emptyDir with medium Memory at /dev/shm."
            yield Row("/dev/shm", node, "bad", text, todo)
        elif store and store < need:
            todo = f"Start Ray there with --object-store-memory={int(1.2 * need)}, or lower training.max_length."
            yield Row("/dev/shm", node, "bad", f"{text}; rows ahead take {need / GIB:.2f}", todo)
        else:
            yield Row("/dev/shm", node, "ok", text)


def cpus(found: Found):
    """Whether the workers fit, by the plan's own arithmetic."""
    total = sum(held.get("CPU", 0) for held in found.resources.values())
    if found.needs.unfit:
        yield Row("CPUs", "all", "bad", found.needs.unfit, "See there.")
    else:
        yield Row("CPUs", "all", "ok", f"{total:g}: {found.needs.num_workers} workers, and Ray Data has some left")


def authentication(found: Found):
    """Whether the cluster asks for a token, and whether only its owner reads the token file."""
    texts = {"private": "a private Ray, with a token of this machine", "takes ours": "the cluster asks for a token"}
    if found.token_mode is not None and found.token_mode & 0o077:
        text = f"others can read the token file (mode {found.token_mode & 0o777:04o})"
        yield Row("authentication", "driver", "bad", text, "chmod 600 it.")
    elif found.authentication in texts:
        yield Row("authentication", "driver", "ok", texts[found.authentication])
    else:
        todo = "Start Ray with RAY_AUTH_MODE=token: clusters/README.md."
        yield Row("authentication", "driver", "bad", "the cluster takes commands without a token", todo)


def job_stop(found: Found):
    """Seconds that `ray job stop` leaves a run to save; no row outside of a Ray job."""
    if found.stop_seconds is None:
        return
    text = f"`ray job stop` grants {found.stop_seconds} s to save"
    if found.stop_seconds < STOP_SECONDS:
        todo = f"Start the head with RAY_JOB_STOP_WAIT_TIME_S={STOP_SECONDS} or more; else the last checkpoint counts."
        yield Row("job stop", "driver", "unknown", text, todo)
    else:
        yield Row("job stop", "driver", "ok", text)
