"""model.rope_scaling on a base's config: what transformers, and any server, reads of it. Imports no torch.

The base keeps its own wavelengths and the share of each head that it turns; type, factor and the rest are given.
"""

from typing import Any

from qlora_ray.config import ModelConfig
from qlora_ray.config.rope import KINDS
from qlora_ray.errors import ConfigError

KEPT = ("rope_theta", "partial_rotary_factor")  # of the base's own
NAMES_OF_TYPE = ("rope_type", "type")
REACHES = ("yarn", "llama3")  # whose config says how far positions go: what was learned x factor


def scaled(text: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """What changes in a base's config, of its text model: `text`, as config.json has it, in the same style."""
    style = "rope_parameters" if "rope_parameters" in text else "rope_scaling"
    own, learned = text.get(style) or {}, text.get("max_position_embeddings")
    is_scaled = (own.get("rope_type") or own.get("type") or "default") != "default"
    kept = {name: value for name, value in own.items() if name in KEPT or not is_scaled and name not in NAMES_OF_TYPE}
    made = {**kept, **scaling}
    if scaling["rope_type"] in REACHES:
        made.setdefault("original_max_position_embeddings", learned)
        return {style: made, "max_position_embeddings": context_length(learned, scaling)}
    return {style: made}


def context_length(learned: int | None, scaling: dict[str, Any] | None) -> int | None:
    """Tokens that a base of `learned` positions reads with this scaling."""
    if learned is None or scaling is None:
        return learned
    return max(learned, int(scaling.get("original_max_position_embeddings", learned) * scaling["factor"]))


def put_on(config: Any, scaling: dict[str, Any] | None) -> Any:
    """The base's config (transformers'), with the scaling in it."""
    if scaling:
        text = config.get_text_config()
        own = {"rope_parameters": text.rope_parameters, "max_position_embeddings": text.max_position_embeddings}
        for name, value in scaled(own, scaling).items():
            setattr(text, name, value)
        config.validate_rope()
    return config


def check(base: Any, model: ModelConfig) -> None:
    """Raise ConfigError where a base that was built takes no such scaling."""
    if model.rope_scaling and (why := why_not(base, model.rope_scaling)):
        raise ConfigError(f"model.rope_scaling={model.rope_scaling['rope_type']}: {why}. Leave it out.")


def why_not(base: Any, scaling: dict[str, Any]) -> str:
    """Why a base does not turn its positions by one RoPE of transformers', of any type; "" where it does."""
    config = base.config.get_text_config()
    own, of = getattr(config, "rope_parameters", None) or {}, f"{config.model_type} models"
    has_rope = own and not getattr(config, "alibi", False) and any(hasattr(m, "inv_freq") for m in base.modules())
    if any(name in own for name in getattr(config, "layer_types", None) or ()):
        return f"{of} have a RoPE for each kind of layer ({', '.join(sorted(own))}), which one scaling may not fit"
    if not has_rope:
        return f"the positions of {of} are not turned by transformers' RoPE"
    if own.get("rope_type", "default") not in ("default", *KINDS):
        return f"the base has a RoPE of its own for long rows ({own['rope_type']}), whose factors were learned with it"
    return _why_not_read(config, scaling)


def _why_not_read(config: Any, scaling: dict[str, Any]) -> str:
    """Why the base's kind of config would not read it back from config.json as it is; "" where it would."""
    try:
        read = type(config).from_dict({**config.to_dict(), **scaled(config.to_dict(), scaling)})
    except (ValueError, LookupError, TypeError) as error:
        return f"{config.model_type} models do not take it: {str(error).strip().rstrip('.')}"
    kind = read.rope_parameters.get("rope_type")
    return "" if kind == scaling["rope_type"] else f"{config.model_type} models would read {kind} in its place"


def own_kind(text: dict[str, Any]) -> str | None:
    """The scaling that a base brings; None without one."""
    own = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = own.get("rope_type") or own.get("type")
    return None if kind == "default" else kind
