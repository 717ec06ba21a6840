"""python -m qlora_ray.export: ship an adapter, merged into dense weights with proof, or as GGUF for llama.cpp."""

import argparse
import json
import shutil
import sys
from pathlib import Path

from qlora_ray import door
from qlora_ray.console import quiet
from qlora_ray.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run the door; returns the exit code: 1 also where the merged model drifts too far."""
    return door.run(_parser(), _export, argv)


def _parser() -> argparse.ArgumentParser:
    parser = door.make_parser("export", "Ship a trained adapter.")
    door.add_adapter_arguments(parser)
    parser.add_argument("--to", required=True, choices=("merged", "gguf"), help="a dense model, or llama.cpp's LoRA")
    parser.add_argument("--output", required=True, metavar="PATH", help="new folder (merged) or file (gguf)")
    parser.add_argument(
        "--into", choices=("training", "original"), default="training",
        help="merge into the 4-bit weights of training, unpacked (default), or into the original ones: those give "
        "other answers than the adapter was trained to give",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the output")
    parser.add_argument("--verify", action="store_true", help="run both, report the drift, refuse above the limits")
    parser.add_argument("--file", metavar="FILE", help="records to verify on; default: the run's held-out ones")
    parser.add_argument("--num-rows", type=int, default=32, help="of them (default: 32)")
    parser.add_argument("--max-kl", type=float, default=0.01, help="limit of the mean KL, nats a token (default: 0.01)")
    parser.add_argument(
        "--max-changed", type=float, default=0.005, help="limit of the share of changed greedy tokens (default: 0.005)"
    )
    parser.add_argument("--llama-cpp", metavar="DIR", help="a checkout of llama.cpp, for --to gguf")
    return parser


def _export(arguments: argparse.Namespace) -> int:
    _check(arguments)
    return _to_gguf(arguments) if arguments.to == "gguf" else _to_merged(arguments)


def _check(arguments: argparse.Namespace) -> None:
    output = Path(arguments.output)
    if output.exists():
        raise ConfigError(f"--output {output}: is there already. Delete it, or name another.")
    if arguments.num_rows < 1:
        raise ConfigError(f"--num-rows {arguments.num_rows}: must be at least 1.")


def _to_gguf(arguments: argparse.Namespace) -> int:
    from qlora_ray.inference.gguf import convert, find_converter
    from qlora_ray.model.record import open_adapter

    find_converter(arguments.llama_cpp)
    adapter = open_adapter(arguments.adapter, arguments.base)
    convert(adapter, Path(arguments.output), arguments.dtype, arguments.llama_cpp)
    print(f"gguf  {arguments.output}")
    return 0


def _to_merged(arguments: argparse.Namespace) -> int:
    from qlora_ray.model.record import open_adapter

    quiet(arguments.debug)
    adapter = open_adapter(arguments.adapter, arguments.base)
    from qlora_ray.inference import judge
    from qlora_ray.inference.load import load, open_tokenizer, pick_device
    from qlora_ray.inference.merge import merge
    from qlora_ray.inference.verify import load_merged, measure

    device = pick_device()
    tokenizer = open_tokenizer(adapter)
    examples = judge.read_examples(adapter, tokenizer, arguments.file) if arguments.verify else None
    output = Path(arguments.output)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        merge(adapter, unfinished, arguments.into, arguments.dtype, device)
        if examples is not None:
            loaded = load(adapter, device)
            merged = load_merged(
                unfinished, adapter.compute_dtype, device, adapter.model.trust_remote_code, adapter.model.factory
            )
            max_new_tokens = judge.run_options(adapter)["max_new_tokens"]
            drift = measure(loaded, merged, examples, arguments.num_rows, max_new_tokens).as_dict()
            _show(drift)
            reason = _too_far(drift, arguments)
            if reason:
                print(f"error: {reason} Nothing was written to {output}.", file=sys.stderr)
                return 1
            proof = {"into": arguments.into, "dtype": arguments.dtype, "computed_in": adapter.compute_dtype, **drift}
            (unfinished / "verification.json").write_text(json.dumps(proof, indent=1), "utf-8")
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"merged  {output}")
    return 0


def _too_far(drift: dict, arguments: argparse.Namespace) -> str | None:
    if not drift["mean_kl"] <= arguments.max_kl:
        return f"the merged model's mean KL is {drift['mean_kl']:.2e} nats a token, --max-kl allows {arguments.max_kl}."
    if not drift["changed_greedy_tokens"] <= arguments.max_changed:
        share, limit = drift["changed_greedy_tokens"], arguments.max_changed
        return f"the merged model changes {share:.2%} of the greedy tokens, --max-changed allows {limit:.2%}."
    return None


def _show(drift: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("adapter against merged", "")
    for name, value in drift.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.3g}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
