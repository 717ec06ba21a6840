"""qlora-ray <door>: the same doors as python -m qlora_ray.<door>, imported only when asked for."""

import importlib
import sys

DOORS = {
    "init": "write a YAML file that trains your model on your data",
    "train": "fine-tune a 4-bit LoRA",
    "tune": "search hyperparameters: many train runs, scheduled by Ray Tune",
    "plan": "what fits on N GPUs of M GiB, and how fast",
    "doctor": "look at every node that a run would use: versions, GPUs, network, storage",
    "data": "show what the model will see: counts, lengths, rows with their mask",
    "generate": "ask a trained adapter: a prompt, a chat, or a file over many workers",
    "evaluate": "loss, exact match, F1 and lm-eval tasks, base against adapter",
    "export": "merge an adapter into its base, with proof; or hand it over as GGUF",
    "report": "make report.html of a run, or compare runs",
    "schema": "print every key of the config: a JSON schema for editors, or a page",
}


def main(argv: list[str] | None = None) -> int:
    """Open a door; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: qlora-ray <door> ...\n")
        for name, what in DOORS.items():
            print(f"  {name:10} {what}")
        return 0 if argv else 2
    if argv[0] not in DOORS:
        print(f"error: {argv[0]}: no such door. There are: {', '.join(DOORS)}.", file=sys.stderr)
        return 2
    module = {"data": "show_data"}.get(argv[0], argv[0])
    return importlib.import_module(f"qlora_ray.{module}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
