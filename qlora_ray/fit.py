"""python -m qlora_ray.plan: what fits on N GPUs of M GiB, and how fast, in under a second and without a GPU."""

import argparse
import sys

from qlora_ray import forecast
from qlora_ray.config import Config, ConfigError, base_model_path, find_file, load_config
from qlora_ray.model.facts import read_facts
from qlora_ray.model.recompute import Choice, Keep, choose
from qlora_ray.plan import GIB, may_hold_weights, num_lora_parameters

BATCH_SIZES = (1, 2, 4, 8, 16)
SHARE_OF_MEMORY = 0.93  # the rest is the CUDA context and the allocator's


def main(argv: list[str] | None = None) -> int:
    """Print a table; returns the exit code: 0, or 2 for an impossible request."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_ray.plan", description="What fits on N GPUs of M GiB, and how fast. Needs no GPU."
    )
    parser.add_argument("-c", "--config", metavar="FILE", default="configs/quickstart.yaml", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. model.base_model=/models/llama")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="workers, one GPU each (default: 1)")
    parser.add_argument("--gib", type=float, default=80, metavar="M", help="memory of each (default: 80)")
    parser.add_argument("--gpu", default="H100", help=f"for the speed: {', '.join(forecast.PRODUCT_FLOPS)}")
    arguments = parser.parse_intermixed_args(argv)
    try:
        overrides = [*arguments.overrides, f"ray.num_workers={arguments.gpus}"]
        print(answer(load_config(find_file(arguments.config), overrides), arguments.gib, arguments.gpu))
        return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def answer(config: Config, gib: float, gpu: str) -> str:
    """The table: rows a forward pass against what is kept, peak GiB of a worker and tokens per second of all.

    Raises ConfigError where the base is not a local folder.
    """
    base = read_facts(base_model_path(config.model.base_model))
    trainable = num_lora_parameters(config, base)
    stage = 0 if config.deepspeed.zero_stage == "auto" and config.ray.max_workers == 1 else config.deepspeed.zero_stage
    known = forecast.sizes(config, base, trainable, 3 if stage == "auto" else stage, "bfloat16")
    length, workers = config.training.max_length, config.ray.max_workers
    resident = sum(forecast.resident_gib(known).values())
    lines = [
        f"{config.model.base_model}: {base.num_parameters / 1e9:.2f} B parameters, LoRA r={config.model.lora_r}, "
        f"rows of {length} tokens, ZeRO stage {known.stage}, {workers} x {gib:g} GiB ({gpu})",
        f"weights and optimizer {resident:.2f} GiB a worker, "
        f"{forecast.memory_gib(known, length, None)['while_loading']:.2f} while loading",
        f"{'rows':>4}  {'peak GiB':>8}  {'tokens/s':>9}  kept for backward",
    ]
    for rows in BATCH_SIZES:
        room = (SHARE_OF_MEMORY * gib - resident) * GIB
        for choice in _choices(known, rows * length, room, may_hold_weights(config)):
            peak = forecast.peak_gib(forecast.memory_gib(known, rows * length, choice, recompute_all=True))
            speed = forecast.tokens_per_second(known, length, choice, gpu)
            shown = f"{workers * speed:,.0f}" if speed else "-"
            fits = "" if peak <= SHARE_OF_MEMORY * gib else "  does not fit"
            lines.append(f"{rows:>4}  {peak:>8.2f}  {shown:>9}  {choice or 'layer inputs'}{fits}")
    return "\n".join(lines)


def _choices(known: forecast.Sizes, num_tokens: int, room: float, may_hold: bool) -> list[Choice | None]:
    if known.layer is None:
        return [None]
    layers, vocab = known.base.num_layers, known.base.vocab_size
    auto = choose(known.layer, layers, num_tokens, vocab, room, may_hold)
    leanest = forecast.all_layers(known, Keep.HOST)
    return [auto] if auto == leanest else [auto, leanest]
