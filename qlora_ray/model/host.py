"""How much host memory this process may still take: the machine's, or what its container's limit leaves. No torch."""

from pathlib import Path

SHARE = 0.9  # of it, that layers park in: the rest is for data, libraries and Ray
FILES = (("memory.max", "memory.current", "inactive_file"),  # control groups, version 2
         ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # and 1  # fmt: skip


def available_bytes(root: Path = Path("/")) -> int:
    """Free memory, files that can be dropped included. `root` is where /proc and /sys are looked for."""
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    free = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    return min([free, *(left for folder in _groups(root) if (left := _left(folder)) is not None)])


def _groups(root: Path) -> list[Path]:
    """The folders of this process's control group and of those around it."""
    mounted = root / "sys/fs/cgroup"
    own = root / "proc/self/cgroup"
    folders = [mounted, mounted / "memory"]
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)
        base = mounted if not kinds else mounted / "memory"
        if not kinds or "memory" in kinds.split(","):
            parts = Path(path).parts[1:]
            folders += [base.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    return folders


def _left(folder: Path) -> int | None:
    """Bytes that a control group has left; None where it has no limit."""
    for limit, used, droppable in FILES:
        if not (folder / limit).is_file() or not (folder / used).is_file():
            continue
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        stat = folder / "memory.stat"
        lines = (line.split() for line in stat.read_text().splitlines()) if stat.is_file() else ()
        files = next((int(words[1]) for words in lines if words[0] == droppable), 0)
        return max(0, int(most) - int((folder / used).read_text()) + files)
    return None
