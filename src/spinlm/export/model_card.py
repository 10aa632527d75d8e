"""The model card of a player: what it is, how it was made, and what was measured. No torch."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from spinlm.data.sources import names_a_file
from spinlm.errors import ModelError
from spinlm.recipe.load import parse_yaml
from spinlm.recipe.schema import Model, Recipe
from spinlm.report.run_data import run_data
from spinlm.report.summary import player_rows, table_cells, verdict
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import read_json
from spinlm.utils.model_path import existing_path, install_command, parse_package_uri, resolve_model

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
            _front_matter(recipe, iteration, adapter=lora is not None, licence={}),
            f"{what} in {_game(recipe)} with spinlm {metadata.version('spinlm')}.\n",
            f"- weights: {'the whole model' if lora is None else 'a LoRA adapter'}"
            + (", trained over the base in 4 bits (nf4)" if model.load_in_4bit else ""),
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
    version = made.get("spinlm", metadata.version("spinlm")) + (f" ({made['commit']})" if made.get("commit") else "")
    commit = made.get("inputs", {}).get("model", {}).get("commit")
    counts = run.metadata("prepare", START)["counts"]
    own = f", {counts['warmup']} for the warm-up alone" if counts.get("sft") else ""
    titles, body = table_cells(player_rows(run))
    table = [titles, ["---", *("---:" for _ in titles[1:])], *([name, *values] for name, *values in body)]
    with_base = f"over the base model {public_name(recipe.model.path)}"
    weights = f"a LoRA adapter {with_base}" if adapter else "a whole model"
    if recipe.lora is not None and merged:
        weights = f"a whole model: a LoRA adapter merged into the base model {public_name(recipe.model.path)}"
    revision = f" at revision {recipe.model.revision}" if recipe.model.revision else ""
    in_4_bits = recipe.model.load_in_4bit
    trained_in_4_bits = " The adapter was trained over the base in 4 bits." if in_4_bits else ""
    measured = " It was measured over the base in 4 bits, before it was merged." if in_4_bits and merged else ""
    return "\n".join(
        (
            _front_matter(recipe, iteration, adapter=adapter, licence=found),
            f"# {player_name(iteration).capitalize()} of {run.root.absolute().name}\n",
            f"{_origin(recipe, iteration)}, with spinlm {version}. It is {weights}{revision}.{trained_in_4_bits}\n",
            "## How to use\n",
            "```python",
            *_load(recipe.model, commit, adapter=adapter, in_4_bits=in_4_bits),
            *_ask(recipe, _stop_ids(run, iteration), with_system=run_data(run).system_prompt is not None),
            "```\n",
            "## Data\n",
            f"{public_name(recipe.data.path)}: {counts['train']} prompts for self-play{own}, and "
            f"{counts['heldout']} held-out prompts, which nothing was trained on, for the results.\n",
            "## Results\n",
            verdict(run) + "\n",
            *(f"| {' | '.join(cell)} |" for cell in (table if body else ())),
            f"\nThis card goes with the player called {player_name(iteration)}.{measured}\n",
            "## Recipe\n",
            "```yaml",
            yaml.safe_dump(_public_recipe(recipe), sort_keys=False, allow_unicode=True).rstrip(),
            "```\n",
            f"What is not written there is as it is by default in spinlm {metadata.version('spinlm')}; servers, vLLM and trackers are "
            "left out.\n",
            "## Licence\n",
            (f"{named}." if licence else f"{named}, as the base model." if found else UNKNOWN)
            + " The licence of the data applies, too.\n",
        )
    )


def _load(model: Model, commit: str | None, *, adapter: bool, in_4_bits: bool) -> list[str]:
    """How a player is loaded, in Python. What only the reader knows stands in capitals."""
    trusted = ["trust_remote_code=True"] if model.trust_remote_code else []
    names, imports, here = ["AutoModelForCausalLM", "AutoTokenizer"], [], _quoted("THIS FOLDER")
    base, options, on_top = here, [], []
    if adapter:
        imports = ["from peft import PeftModel"]
        on_top = [f"model = PeftModel.from_pretrained(model, {here})"]
        base, revision = _quoted(model.path), model.revision or commit
        if model.path.startswith("package://"):
            package, file = parse_package_uri(model.path)
            inside = file.rpartition("/")[0]
            folder = f" + {_quoted('/' + inside)}" if inside else ""
            imports = [f"from importlib.util import find_spec  # the base: {install_command(package)}", "", *imports]
            base = f"find_spec({_quoted(package)}).submodule_search_locations[0]{folder}"
        elif _is_place(model.path):
            base = _quoted(f"FOLDER OF {Path(model.path).name}")
        elif revision:
            options.append(f"revision={_quoted(revision)}")
        if model.path.endswith(".gguf"):
            names.append("GgufConfig")
            options = [
                f"gguf_file={_quoted(Path(model.path).name)}",
                "quantization_config=GgufConfig(dequantize=True)",
            ]
        elif in_4_bits:
            names.append("BitsAndBytesConfig")
            options.append(
                "quantization_config=BitsAndBytesConfig(load_in_4bit=True, "
                'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
            )
    return [
        *imports,
        f"from transformers import {', '.join(sorted(names))}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({', '.join((here, *trusted))})",
        f"model = AutoModelForCausalLM.from_pretrained({', '.join((base, *options, *trusted))})",
        *on_top,
    ]


def _stop_ids(run: RunDir, iteration: int) -> list[int]:
    """What ends an answer of a player."""
    path = run.player(iteration) / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    return [found] if isinstance(found, int) else list(found or ())


def _ask(recipe: Recipe, stop_ids: list[int], *, with_system: bool) -> list[str]:
    """How it is asked, in Python: greedily, and to an end as in the run."""
    system = [f'    {{"role": "system", "content": {_quoted("THE SYSTEM PROMPT OF YOUR TASK")}}},']
    longest = recipe.evaluate.max_new_tokens or recipe.opponent.max_new_tokens
    ends = f", eos_token_id={stop_ids}" if stop_ids else ""  # not known of a player that an older version has made
    return [
        "",
        "messages = [",
        *(system if with_system else []),
        f'    {{"role": "user", "content": {_quoted("YOUR PROMPT")}}},',
        "]",
        "prompt = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ").to(model.device)",
        f"answer = model.generate(**prompt, max_new_tokens={longest}, do_sample=False{ends})",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def base_licence(model: Model) -> Licence:
    """The licence that a base model's own files state: its card, here or in the hub cache, or its .gguf header. None of
    it where they state none, or are no longer there."""
    try:
        path = resolve_model(model.path)
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


def _front_matter(recipe: Recipe, iteration: int, *, adapter: bool, licence: Licence) -> str:
    values: dict[str, Any] = dict(licence)
    if _on_hub(recipe.model.path):
        values["base_model"] = recipe.model.path
        values["base_model_relation"] = "adapter" if adapter else "finetune"
    trained = iteration != START or recipe.sft is not None
    if trained and not names_a_file(recipe.data.path) and _on_hub(recipe.data.path):
        values["datasets"] = [recipe.data.path]
    values |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if iteration != START and (tags := _tags(recipe)):
        values["tags"] = tags
    return f"---\n{yaml.safe_dump(values, sort_keys=False, default_flow_style=None)}---\n"


def _origin(recipe: Recipe, iteration: int) -> str:
    if iteration != START:
        return f"Made in {_game(recipe)}"
    if recipe.sft:
        return f"Made by supervised fine-tuning, the warm-up before {_game(recipe)}"
    return f"The model as it came, from which {_game(recipe)} began"


def _game(recipe: Recipe) -> str:
    if recipe.is_control:
        return "more supervised fine-tuning"
    return "training on preferences" if recipe.preferences else "self-play fine-tuning (SPIN, arXiv 2401.01335)"


def _tags(recipe: Recipe) -> list[str]:
    if recipe.is_control:
        return []
    return ["dpo"] if recipe.preferences else ["spin", "self-play"]


def _on_hub(path: str) -> bool:
    return not _is_place(path) and path.count("/") < 2 and not path.endswith(".gguf")


def _is_place(path: str) -> bool:
    """Whether a path is of a machine, here or elsewhere."""
    return path.startswith(("/", ".", "~")) or "://" in path or existing_path(path) is not None


def public_name(path: str) -> str:
    """A path of a recipe as others may see it: of a file or folder on a machine its name alone."""
    return path if path.startswith("package://") or not _is_place(path) else Path(path).name


def _public_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what is only so on the machine that ran it: folders, addresses, commands."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    for section in ("model", "data"):
        values[section]["path"] = public_name(values[section]["path"])
    template = values["data"].get("chat_template")
    if template and existing_path(template) is not None:
        values["data"]["chat_template"] = public_name(template)
    for name in ("server", "vllm"):
        values.get("opponent", {}).pop(name, None)
    values.pop("report_to", None)
    return values
