"""The judge: a language model behind an OpenAI-compatible chat endpoint, its settings (judge.yaml) and its prompts."""

import string
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from spinlm.errors import DataError, SpinError
from spinlm.evals.mt_bench.questions import Row, describe_errors, read_rows, read_text
from spinlm.recipe.fields import Count, Options, Positive, Section
from spinlm.recipe.load import parse_yaml
from spinlm.rundir.records import Message
from spinlm.utils.atomic import short_digest
from spinlm.utils.http import Endpoint, ErrorContext, redact, run_async
from spinlm.utils.urls import url_fault

CHAT_PATH = "/chat/completions"
DEFAULT_PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")


class JudgeError(SpinError, RuntimeError):
    """The judge's settings are wrong, or the judge cannot be reached, refuses, or writes no verdict."""


ERROR_CONTEXT = ErrorContext(
    error=JudgeError,
    url_setting="url in judge.yaml",
    model_setting="model in judge.yaml",
    timeout_setting="timeout in judge.yaml",
    key_variables=("SPINLM_JUDGE_KEY", "OPENAI_API_KEY"),
    resume_hint="The verdicts so far are kept: run the same command again to continue",
)


def _template_fields(template: str) -> set[str]:
    """Return the names of the fields in a template. Raises ValueError if its braces do not match."""
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


class JudgePrompt(Row):
    """A prompt in the format of FastChat's judge_prompts.jsonl; the template is one of `str.format`."""

    name: str
    system_prompt: str  # empty: no system message
    prompt_template: str

    def messages(self, texts: Mapping[str, str]) -> list[Message]:
        """Return the conversation to send to the judge."""
        user = {"role": "user", "content": self.prompt_template.format_map(texts)}
        return [{"role": "system", "content": self.system_prompt}, user] if self.system_prompt else [user]


def prompt_name(*, pairwise: bool, turn: int, reference: bool) -> str:
    """Return FastChat's name of the prompt for a turn (from 1), with or without a reference answer."""
    kind = ("pair-math-v1" if reference else "pair-v2") if pairwise else "single-math-v1" if reference else "single-v1"
    return kind if turn == 1 else f"{kind}-multi-turn"


def default_prompts() -> dict[str, JudgePrompt]:
    return {prompt.name: prompt for _, prompt in read_rows(DEFAULT_PROMPTS, "default prompts", JudgePrompt)}


def read_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Read the prompts of a file by name. The default prompt is used for a name that the file does not have.

    Prompts with other names are ignored.

    Raises:
        DataError: the file cannot be read or has none of the names, or a prompt has other fields than the default.
    """
    defaults, own = default_prompts(), {}
    for where, prompt in read_rows(path, "prompts_file in judge.yaml", JudgePrompt):
        if prompt.name in defaults:
            expected = _template_fields(defaults[prompt.name].prompt_template)
            try:
                fields = _template_fields(prompt.prompt_template)
            except ValueError as error:
                raise DataError(f"{where}: prompt_template: {error}. Write a literal brace twice") from error
            if fields != expected:
                names = ", ".join(sorted(expected))
                raise DataError(f"{where}: prompt_template: needs the fields {names}. Write a literal brace twice")
            own[prompt.name] = prompt
    if not own:
        raise DataError(f"prompts_file in judge.yaml: {path} has no prompt with a name of {', '.join(defaults)}")
    return defaults | own


def _endpoint_url(url: str) -> str:
    if fault := url_fault(url):
        raise ValueError(fault)
    return url.strip().rstrip("/").removesuffix(CHAT_PATH)


def _extra_body(options: Options) -> Options:
    if reserved := options.keys() & {"model", "messages", "stream", "n"}:
        raise ValueError(f"{min(reserved)} cannot be set here")
    return options


class Judge(Section):
    """The settings in judge.yaml. The endpoint's key comes from the environment variable SPINLM_JUDGE_KEY."""

    url: Annotated[str, AfterValidator(_endpoint_url)]
    """Address of an OpenAI-compatible endpoint, for example http://127.0.0.1:8000/v1."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the judge's model at the endpoint."""
    prompts_file: str | None = None
    """File with other prompts, in the format of FastChat's judge_prompts.jsonl. The path is relative to judge.yaml."""
    max_tokens: Count = 2048
    """Maximum length of a judgment, in tokens."""
    max_concurrency: Count = 4
    """Maximum number of requests at the same time."""
    timeout: Positive = 300.0
    """Maximum time for a request, in seconds."""
    extra_body: Annotated[Options, AfterValidator(_extra_body)] = Field(default_factory=dict)
    """More fields of a request, such as a grammar; null removes a field: `{temperature: null}`."""

    @classmethod
    def load(cls, path: Path) -> "Judge":
        """Read judge.yaml.

        Raises:
            DataError: the file cannot be read.
            JudgeError: a setting is missing or wrong.
            RecipeError: the file is not YAML.
        """
        try:
            judge = cls.model_validate(parse_yaml(read_text(path, "--judge"), str(path)))
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            raise JudgeError(f"{path}: {describe_errors(error)}. The settings of a judge are {known}") from None
        prompts_file = judge.prompts_file and str(path.parent / judge.prompts_file)
        return judge.model_copy(update={"prompts_file": prompts_file})

    @cached_property
    def prompts(self) -> dict[str, JudgePrompt]:
        """The prompts by name; DataError if the file cannot be used."""
        return read_prompts(Path(self.prompts_file)) if self.prompts_file else default_prompts()

    @property
    def host(self) -> str:
        """Host and port of the endpoint."""
        return self.url.partition("://")[2].partition("/")[0]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that a verdict depends on, except the request."""
        texts = {name: [prompt.system_prompt, prompt.prompt_template] for name, prompt in self.prompts.items()}
        return {
            "endpoint": self.host,
            "judge": self.model,
            "judge_max_tokens": self.max_tokens,
            "prompts": short_digest(texts),
            "judge_extra_body": self.extra_body,
        }

    def check(self) -> None:
        """Send one short request, to check the endpoint, the key and the model.

        Raises:
            JudgeError: the request failed.
        """
        question: list[Message] = [{"role": "user", "content": "Are you there?"}]
        self.model_copy(update={"max_tokens": 16}).ask([question], lambda index, judgment: None)

    def ask(self, conversations: Sequence[list[Message]], record: Callable[[int, str], None]) -> None:
        """Get a judgment on each conversation, with `max_concurrency` requests at the same time.

        Args:
            conversations: the requests.
            record: receives the index of a conversation and the judge's text, as soon as the text arrives.

        Raises:
            JudgeError: the endpoint cannot be reached, refuses, or is not OpenAI-compatible.
            StoppedError: the user asked to stop.
        """
        endpoint = Endpoint([self.url], self.model, self.timeout, self.max_concurrency, ERROR_CONTEXT)

        async def request(messages: list[Message]) -> str:
            fields = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
            body = {name: value for name, value in (fields | self.extra_body).items() if value is not None}
            return await endpoint.request(CHAT_PATH, body, _judgment, "choices[0].message.content")

        run_async(endpoint.run(conversations, request, record))


def _judgment(reply: Any) -> str:
    text = reply["choices"][0]["message"]["content"]
    return redact(text, ERROR_CONTEXT) if isinstance(text, str) else ""
