"""Writes requirements-hashed.txt and requirements-torch-hashed.txt: every pinned package with the hash of each file.

    pip install uv && python -m tools.lock

torch stands apart, with what it brings for CUDA: it is the one package that machines take from different places (PyPI
for GPUs, PyTorch's index or a local folder for CPUs), under other hashes.
"""

import re
import subprocess

COMMAND = [
    "uv", "pip", "compile", "pyproject.toml", "-", "--extra", "cluster", "-c", "constraints.txt", "--generate-hashes",
    "--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28", "--no-header", "--no-annotate", "--quiet",
]  # fmt: skip
OF_TORCH = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")


def main() -> None:
    text = subprocess.run(COMMAND, input="hatchling\n", capture_output=True, text=True, check=True).stdout
    blocks = re.findall(r"(?m)^[\w.-]+==[^\n]*(?:\n +--hash[^\n]*)+", text)
    with_torch = [block for block in blocks if OF_TORCH.match(block)]
    write("requirements-torch-hashed.txt", "torch for CUDA and what it brings, with the hash of every file", with_torch)
    others = [block for block in blocks if block not in with_torch]
    write("requirements-hashed.txt", "Everything but torch, with the hash of every file", others)


def write(name: str, what: str, blocks: list[str]) -> None:
    with open(name, "w", encoding="utf-8") as file:
        file.write(f"# {what}. Made from constraints.txt by: python -m tools.lock\n" + "\n".join(blocks) + "\n")


if __name__ == "__main__":
    main()
