"""The model card of a player: what it is, how it was made, and what was measured. No torch."""

from pathlib import Path
from typing import Any

import yaml

from spinlm import __version__
from spinlm.config import Model, Recipe
from spinlm.data.sources import names_a_file
from spinlm.errors import ModelError
from spinlm.files import read_json
from spinlm.locate import local, locate
from spinlm.order import START, player_name
from spinlm.recipe import parse_yaml
from spinlm.rundir import RunDir
from spinlm.summary import cells, rows, verdict

Licence = dict[str, Any]
"""The fields of a card's front matter that say under which licence a model is."""

LICENCE = ("license", "license_name", "license_link")
LONGEST_CARD = 1_000_000  # bytes
UNKNOWN = "Not stated by the base model's files. Fill in `license` above before you publish this."


def card(recipe: Recipe, iteration: int) -> str:
    """The card of a player in a run folder, before anything is measured. A local path is shown by its name alone."""
    model, lora = recipe.model, recipe.lora
    settings = recipe.objective.model_dump(include=set(recipe.objective.reads))
    what = "The starting player" if iteration == START else f"The player that iteration {iteration} made"
    return "\n".join(
        (
            _front_matter(recipe, adapter=lora is not None, licence={}),
            f"{what} in {_game(recipe)} with spinlm {__version__}.\n",
            f"- weights: {'the whole model' if lora is None else 'a LoRA adapter'}"
            + (", trained over the base in 4 bits (nf4)" if lora and lora.quantize else ""),
            f"- began from: {public_name(model.path)}{f' at {model.revision}' if model.revision else ''}",
            f"- data: {public_name(recipe.data.path)}",
            f"- objective: {recipe.objective.name}{''.join(f', {key} {value}' for key, value in settings.items())}\n",
        )
    )


def full_card(recipe: Recipe, run: RunDir, iteration: int, *, merged: bool, licence: str | None = None) -> str:
    """The card of a player that leaves its run: with the data, the recipe and what every iteration came to.

    Args:
        recipe: the run's.
        run: with the measurements.
        iteration: whose player.
        merged: whether the adapter has been merged into the base.
        licence: of the player, an SPDX name; None is the base model's, where its files say one.
    """
    adapter = recipe.lora is not None and not merged
    found: Licence = {"license": licence} if licence else base_licence(recipe.model)
    named = found.get("license_name") or found.get("license") or ""
    named = named if isinstance(named, str) else ", ".join(named)
    made = read_json(run.provenance) if run.provenance.exists() else {}
    version = made.get("spinlm", __version__) + (f" ({made['commit']})" if made.get("commit") else "")
    counts = run.facts("prepare", START)["counts"]
    own = f", {counts['warmup']} for the warm-up alone" if counts.get("warmup") else ""
    titles, body = cells(rows(run))
    table = [titles, ["---", *("---:" for _ in titles[1:])], *([name, *values] for name, *values in body)]
    with_base = f"over the base model {public_name(recipe.model.path)}"
    weights = f"a LoRA adapter {with_base}" if adapter else "a whole model"
    if recipe.lora is not None and merged:
        weights = f"a whole model: a LoRA adapter merged into the base model {public_name(recipe.model.path)}"
    revision = f" at revision {recipe.model.revision}" if recipe.model.revision else ""
    trained_in_4_bits = (
        " The adapter was trained over the base in 4 bits." if recipe.lora and recipe.lora.quantize else ""
    )
    return "\n".join(
        (
            _front_matter(recipe, adapter=adapter, licence=found),
            f"# {player_name(iteration).capitalize()} of {run.root.absolute().name}\n",
            f"Made in {_game(recipe)} with spinlm {version}. It is {weights}{revision}.{trained_in_4_bits}\n",
            "## Use\n",
            _use(recipe, adapter=adapter),
            "## Data\n",
            f"{public_name(recipe.data.path)}: {counts['train']} prompts for self-play{own}; the figures below are "
            f"from {counts['heldout']} held-out prompts that nothing was trained on.\n",
            "## Results\n",
            verdict(run) + "\n",
            *(f"| {' | '.join(cell)} |" for cell in table),
            "\nThis card goes with the player called " + player_name(iteration) + ".\n",
            "## Recipe\n",
            "```yaml",
            yaml.safe_dump(_public_recipe(recipe), sort_keys=False, allow_unicode=True).rstrip(),
            "```\n",
            "## Licence\n",
            (f"{named}." if licence else f"{named}, as the base model." if found else UNKNOWN)
            + " The licence of the data applies, too.\n",
        )
    )


def _use(recipe: Recipe, *, adapter: bool) -> str:
    """How a player is loaded, as a block of Python."""
    base, peft = "from transformers import AutoModelForCausalLM, AutoTokenizer", "from peft import PeftModel"
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")'
    if not adapter:
        lines = [base, "", tokenizer, 'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")']
        return "\n".join(("```python", *lines, "```\n"))
    name, revision = public_name(recipe.model.path), recipe.model.revision
    of_gguf = name.endswith(".gguf")
    where = "THE FOLDER base OF THE RUN" if of_gguf else name
    pinned = f', revision="{revision}"' if revision else ""
    lines = [peft, base, "", tokenizer, f'base = AutoModelForCausalLM.from_pretrained("{where}"{pinned})']
    lines.append('model = PeftModel.from_pretrained(base, "THIS FOLDER")')
    hint = f"\nThe base is {name}, as transformers unpacks it.\n" if of_gguf else ""
    return "\n".join(("```python", *lines, f"```\n{hint}"))


def base_licence(model: Model) -> Licence:
    """The licence that a base model's own files state: its card, here or in the hub cache, or its .gguf header. None of
    it where they state none, or are no longer there."""
    try:
        path = locate(model.path)
    except ModelError:
        return {}
    if path is None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.path, "README.md", revision=model.revision)
        return _stated(Path(found)) if isinstance(found, str) else {}
    if path.is_dir():
        return _stated(path / "README.md")
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.license")
    return {} if field is None else {"license": str(field.contents())}


def _stated(readme: Path) -> Licence:
    """The licence in the front matter of a card, which somebody else has written: text, or lists of it."""
    try:
        if readme.stat().st_size > LONGEST_CARD:
            return {}
        opening, matter, *_ = readme.read_text(encoding="utf-8").split("---\n", 2)
        values = None if opening else parse_yaml(matter, str(readme))
    except (OSError, ValueError):  # none, or not as cards are
        return {}
    fields = {name: values.get(name) for name in LICENCE} if isinstance(values, dict) else {}
    return {name: value for name, value in fields.items() if value and _is_text(value)}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _front_matter(recipe: Recipe, *, adapter: bool, licence: Licence) -> str:
    values: dict[str, Any] = dict(licence)
    if _on_hub(recipe.model.path):
        values["base_model"] = recipe.model.path
        values["base_model_relation"] = "adapter" if adapter else "finetune"
    if not names_a_file(recipe.data.path) and _on_hub(recipe.data.path):
        values["datasets"] = [recipe.data.path]
    values |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if tags := _tags(recipe):
        values["tags"] = tags
    return f"---\n{yaml.safe_dump(values, sort_keys=False, default_flow_style=None)}---\n"


def _game(recipe: Recipe) -> str:
    if recipe.objective.name == "sft":
        return "more supervised fine-tuning"
    return "training on preferences" if recipe.preferences else "self-play fine-tuning (SPIN, arXiv 2401.01335)"


def _tags(recipe: Recipe) -> list[str]:
    if recipe.objective.name == "sft":
        return []
    return ["dpo"] if recipe.preferences else ["spin", "self-play"]


def _on_hub(path: str) -> bool:
    return not _is_place(path) and path.count("/") < 2 and not path.endswith(".gguf")


def _is_place(path: str) -> bool:
    """Whether a path is of a machine, here or elsewhere."""
    return path.startswith(("/", ".", "~")) or "://" in path or local(path) is not None


def public_name(path: str) -> str:
    """A path of a recipe as others may see it: of a file or folder on a machine its name alone."""
    return path if path.startswith("package://") or not _is_place(path) else Path(path).name


def _public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what is only so on the machine that ran it: folders, addresses, commands."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    for section in ("model", "data"):
        values[section]["path"] = public_name(values[section]["path"])
    template = values["data"].get("chat_template")
    if template and local(template) is not None:
        values["data"]["chat_template"] = public_name(template)
    for name in ("server", "vllm"):
        values.get("opponent", {}).pop(name, None)
    values.pop("tracking", None)
    return values
