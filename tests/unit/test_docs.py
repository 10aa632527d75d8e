"""The documentation agrees with the code: references are fresh, the site builds, every setting and option exists."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

from spinlm.cli.app import app
from spinlm.recipe.fields import iterate_fields
from spinlm.recipe.load import load_recipe
from spinlm.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_references_are_fresh(generate: ModuleType) -> None:
    for name, page in generate.PAGES.items():
        assert text(ROOT / "docs" / name) == page(), f"docs/{name} is old: run `python docs/generate.py`"


def test_the_recipe_reference_has_every_setting_with_its_default(generate: ModuleType) -> None:
    page = generate.recipe_reference()
    assert "| `beta` | float > 0, or list of float | `0.1` |" in page
    assert "| `tokens_per_micro_batch` ⟳ | int ≥ 1 | `2048` |" in page
    assert "| `iterations` | int ≥ 1 | `4` |" in page  # it may change, but it changes the result
    settings = dict(iterate_fields(Recipe))
    assert len(re.findall(r"^\| `", page, flags=re.MULTILINE)) == len(settings)


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = text(tmp_path / "site" / "index.html")
    assert "spinlm" in home
    external = r'<(script|link|img)[^>]*(src|href)="https?://'
    assert not re.search(external, home)  # a page loads nothing from another host


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    """Links between files of the repository; the build of the site checks the anchors."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_exist(page: Path) -> None:
    """Code of the form `section.key`, with a section of a recipe, is a setting."""
    known = {name for name, _ in iterate_fields(Recipe)}
    sections = "|".join(name for name, field in iterate_fields(Recipe) if "." not in name and f"{name}.path" != name)
    for code in re.findall(r"`([^`\n]+)`", text(page)):
        for name in re.findall(rf"(?:^|(?<=[\s'\"]))((?:{sections})\.[a-z_][a-z0-9_.]*[a-z0-9_])", code):
            if not name.endswith((".py", ".yaml", ".jsonl", ".done", ".gguf", ".csv")):
                assert name in known, f"`{code}`"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_yaml_is_a_recipe(page: Path, tmp_path: Path) -> None:
    """A block of YAML without a title is part of a recipe, possibly without model and data."""
    for block in re.findall(r"```yaml\n(.*?)```", text(page), flags=re.DOTALL):
        if "--8<--" not in block:  # an included file has its own test
            absent = [name for name in ("model", "data") if not re.search(rf"^{name}:", block, flags=re.MULTILINE)]
            whole = block + "".join(f"{name}: {{path: mine}}\n" for name in absent)
            (tmp_path / "recipe.yaml").write_text(whole, encoding="utf-8")
            load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_and_options_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {flag for command in commands.values() for param in command.params for flag in param.opts}
    for code in re.findall(r"`(spinlm [^`\n]+)`|^ {4}(spinlm .+)$", text(page), flags=re.MULTILINE):
        words = "".join(code).split("#")[0].split()
        assert words[1] in commands or words[1] in ("COMMAND", "--version", "--help"), code
        for word in words:
            if word.startswith("--"):
                assert word in options | {"--version", "--help"}, code
