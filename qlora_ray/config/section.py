"""What every section of the YAML file is made of."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the YAML file: no unknown keys, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
