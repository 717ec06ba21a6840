"""Where the files lie that a config names."""

from pathlib import Path

from qlora_ray.config.model import EMBEDDED_BASE

PACKAGE = Path(__file__).resolve().parents[1]


def bundled_root() -> Path:
    """The folder that holds configs/ and data/: the checkout, or the copy inside an installed wheel."""
    return PACKAGE / "_bundled" if (PACKAGE / "_bundled").is_dir() else PACKAGE.parent


def find_file(name: str) -> Path:
    """A user's relative path: from the current folder, else from the files that come with the package."""
    path = Path(name).expanduser()
    if not path.exists() and not path.is_absolute() and (bundled_root() / path).exists():
        return bundled_root() / path
    return path


def base_model_path(base_model: str) -> str:
    """The folder of a local or embedded base; a hub id stays as it is."""
    if base_model == EMBEDDED_BASE:
        return str(PACKAGE / "assets" / "tiny_base")
    return str(Path(base_model).expanduser()) if Path(base_model).expanduser().is_dir() else base_model
