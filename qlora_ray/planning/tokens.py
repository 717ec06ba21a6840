"""The data's tokens against the base's rows, before a worker starts."""

import json

from qlora_ray.config import Config
from qlora_ray.data.prepare import Prepared, make_recipe
from qlora_ray.data.samples import fingerprint
from qlora_ray.data.vocabulary import note_untrained, refuse_without_row, token_counts
from qlora_ray.data.work import Recipe, encoder_of
from qlora_ray.model.facts import ModelFacts


def check_vocabulary(config: Config, prepared: Prepared, facts: ModelFacts) -> list[str]:
    """Notes on the data's tokens. Raises ConfigError for one that the base has no row for."""
    recipe = make_recipe(config)
    tokenizer = encoder_of(recipe).tokenizer
    counts = token_counts((*prepared.train, *prepared.validation))
    refuse_without_row(counts, facts.num_embedding_rows, tokenizer, f"model.base_model={config.model.base_model}")
    note = note_untrained(counts, _untrained(config, recipe, prepared, facts), tokenizer)
    return [note] if note else []


def _untrained(config: Config, recipe: Recipe, prepared: Prepared, facts: ModelFacts) -> frozenset[int]:
    """Ids whose rows no training has touched, and this one does not; found once for a base and its tokenizer."""
    from qlora_ray.model.hub import local_folder
    from qlora_ray.model.record import base_tensors, tokenizer_sha256
    from qlora_ray.model.untrained import untrained_tokens

    folder, tokenizer = local_folder(config.model.base_model, config.model.revision), encoder_of(recipe).tokenizer
    of_base = base_tensors(folder, f"model.base_model={folder}").sample_sha256()
    kept = prepared.entry.parent / f"untrained-{fingerprint([of_base, tokenizer_sha256(tokenizer)])}.json"
    if not kept.exists():
        kept.write_bytes(json.dumps(sorted(untrained_tokens(folder, tokenizer) or ())).encode())
    return frozenset(json.loads(kept.read_bytes())) - facts.new_tokens.keys()
