"""The recipe's section `data`."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from spinlm.recipe.fields import Count, ModelOrPath, Options, Section, Seed, value_or_list

Paths = Annotated[
    Annotated[ModelOrPath, Tag("<value>")] | Annotated[list[ModelOrPath], Field(min_length=1), Tag("<list>")],
    Discriminator(value_or_list),
]


class Columns(Section):
    messages: str | None = None
    """Column with a list of {role, content} or {from, value} messages."""
    prompt: str | None = None
    """Column with the prompt: text, or a list of messages."""
    context: str | None = None
    """Column with text that follows the prompt after an empty line, as Alpaca's `input` does."""
    response: str | None = None
    """Column with the response: text, or a list with one assistant message."""
    rejected: str | None = None
    """Column of a preference data set with the worse response, in the same form as the better one. It replaces the
    opponent's response, so that the objective `spin` is plain DPO."""
    system: str | None = None
    """Column with a system prompt, used for conversations that do not begin with one."""
    id: str | None = None
    """Column with a unique id. A row without an id gets a hash of its content."""
    ignore: list[str] = []
    """Fields of rows and messages to drop. Otherwise spinlm uses such a field, or refuses the row."""


class Data(Section):
    path: Paths
    """A file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow; text also as .gz, .zst, .bz2), a folder of such
    files or of `save_to_disk`, a pattern such as `shards/*.parquet`, a list of these, or the hub id of a data set."""
    subset: str | None = None
    """Configuration of a hub data set that has several, such as `main` of openai/gsm8k."""
    split: str = "train"
    """Split of a hub data set, or of a folder whose file names name splits."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    columns: Columns = Columns()
    """Names of the columns. Without names, the usual layouts are recognized."""
    turns: Literal["first", "last", "all"] = "first"
    """Which assistant turns of a list of messages become examples."""
    prompts: Count | None = None
    """Number of examples drawn at random for self-play; absent means all that are left after the held-out ones."""
    heldout: Count = 512
    """Number of examples set aside for evaluation. Their prompts are never trained on."""
    seed: Seed = 0
    """Seed of the random choice of examples."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or skip it and count it."""
    chat_template: str | None = None
    """Jinja chat template, or a file with one. It replaces the tokenizer's own."""
    chat_template_kwargs: Options = {}
    """Variables of the chat template, such as `enable_thinking: false`. Players are saved with a template that sets
    them."""
    system: Literal["keep", "fold"] = "keep"
    """Render a system prompt as its own message (`keep`), or at the head of the user's first message (`fold`), for
    templates without system messages."""

    @property
    def paths(self) -> list[str]:
        """The entries of `path`."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def where(self) -> str:
        """The entries of `path`, at most three of them, for messages."""
        more = len(self.paths) - 3
        return ", ".join(self.paths[:3]) + (f" and {more} more" if more > 0 else "")
