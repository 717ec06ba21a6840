"""The data's tokens against the base's rows, before a worker starts."""

import json
from typing import Any

from qlora_ray.config import Config
from qlora_ray.data.prepare import Prepared, make_recipe
from qlora_ray.data.samples import fingerprint, recipe_hash
from qlora_ray.data.vocabulary import note_untrained, refuse_without_row, token_counts
from qlora_ray.data.work import Recipe, encoder_of
from qlora_ray.model.facts import ModelFacts


def check_vocabulary(config: Config, prepared: Prepared, facts: ModelFacts) -> list[str]:
    """Notes on the data's tokens. Raises ConfigError for one that the base has no row for."""
    recipe = make_recipe(config)

    def open_tokenizer() -> Any:  # takes seconds: only to name tokens
        return encoder_of(recipe).tokenizer

    counts = token_counts((*prepared.train, *prepared.validation))
    refuse_without_row(counts, facts.num_embedding_rows, open_tokenizer, f"model.base_model={config.model.base_model}")
    note = note_untrained(counts, _untrained(config, recipe, prepared, facts), open_tokenizer)
    return [note] if note else []


def _untrained(config: Config, recipe: Recipe, prepared: Prepared, facts: ModelFacts) -> frozenset[int]:
    """Ids whose rows no training has touched, and this one does not; found once for a base and a recipe."""
    from qlora_ray.model.hub import local_folder
    from qlora_ray.model.record import base_tensors
    from qlora_ray.model.untrained import untrained_tokens

    folder = local_folder(config.model.base_model, config.model.revision)
    of_base = base_tensors(folder, f"model.base_model={folder}").sample_sha256()
    kept = prepared.entry.parent / f"untrained-{fingerprint([of_base, recipe_hash(recipe)])}.json"
    if not kept.exists():
        found = untrained_tokens(folder, encoder_of(recipe).tokenizer) or ()
        kept.write_bytes(json.dumps(sorted(found)).encode())
    return frozenset(json.loads(kept.read_bytes())) - facts.new_tokens.keys()
