"""Ask the Hugging Face hub: commits, files, retries, and error messages with a remedy. Imports no torch."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from spinlm.errors import DataError, ModelError, first_line
from spinlm.utils.http import backoff, retry_after

if TYPE_CHECKING:
    from tenacity import RetryCallState

log = logging.getLogger("spinlm")

Result = TypeVar("Result")

MAX_ATTEMPTS = 4
BACKOFF_SECONDS = 1.0  # before the second attempt; doubles with each further attempt
LICENSE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "README.md", *LICENSE_FILES)
"""Config, tokenizer, code and license of a model."""


@dataclass(frozen=True)
class Repository:
    """A model or a data set of the hub."""

    name: str
    revision: str | None = None  # branch, tag or commit; None is the default branch
    kind: Literal["model", "dataset"] = "model"

    def call(self, function: Callable[[], Result]) -> Result:
        """Call a function that may read this repository from the hub; retry as `with_retries` does.

        Raises:
            ModelError, DataError: the hub caused the failure. Other exceptions are not changed.
        """
        try:
            return with_retries(function, self.name)
        except Exception as error:  # hub client and HTTP library share no class; an unknown error is raised unchanged
            if problem := self._problem(error):
                raise (ModelError if self.kind == "model" else DataError)(problem) from error
            raise

    def commit(self) -> str:
        """Return the commit that the revision points to; if the hub does not answer, the one in the cache.

        Raises:
            ModelError, DataError: there is no such repository or revision, or neither hub nor cache has it.
        """
        from huggingface_hub import HfApi

        def resolve(*, local_files_only: bool = False) -> str:
            offline = local_files_only or _is_offline()
            arguments: dict[str, Any] = {"repo_type": self.kind, "revision": self.revision}
            return HfApi().resolve_revision(self.name, local_files_only=offline, **arguments).resolved

        try:
            return self.call(resolve)
        except (ModelError, DataError) as error:
            try:
                commit = resolve(local_files_only=True)
            except Exception:  # not in the cache
                raise error from None
            log.warning("%s. The run takes commit %s from the cache", error, commit[:8])
            return commit

    def file(self, name: str, *, download: bool = True) -> Path | None:
        """Return a file of the repository, from the hub cache or else from the hub.

        Args:
            name: path of the file in the repository.
            download: whether to ask the hub for a file that the cache lacks.

        Returns:
            None if the repository has no such file, or if only the cache may be read and lacks the file.

        Raises:
            ModelError, DataError: the hub cannot be read.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError

        arguments: dict[str, Any] = {"repo_type": self.kind}
        cached = try_to_load_from_cache(self.name, name, revision=self.revision, **arguments)
        if isinstance(cached, str):
            return Path(cached)
        if not download:
            return None
        commit = self.commit()
        try:
            return Path(self.call(lambda: hf_hub_download(self.name, name, revision=commit, **arguments)))
        except EntryNotFoundError:
            return None

    def folder(self, *patterns: str, config: str = "config.json") -> Path:
        """Return the model's folder in the hub cache. Download small files that it lacks; its weights may be missing.

        transformers treats an optional file, such as the chat template, as missing if its download fails. It also asks
        the hub for some files at every start. So transformers must read these files from the folder.

        Args:
            patterns: files to download as well.
            config: the file that the repository must have.

        Raises:
            ModelError: neither hub nor cache has the files, or the repository has no `config`.
        """
        from huggingface_hub import snapshot_download

        def download() -> Path:
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=[*SMALL_FILES, *patterns]))

        folder = self.call(download)
        if not (folder / config).exists():
            raise ModelError(
                f"{self.name}: the repository has no {config}, so transformers cannot load it. If it has a .gguf "
                "file, set model.path to a copy of that file"
            )
        return folder

    def _problem(self, error: BaseException) -> str:
        """Return what went wrong and what to do; empty if the hub did not cause the error."""
        from huggingface_hub import errors

        def is_caused_by(*types: type[BaseException]) -> bool:
            return any(isinstance(cause, types) for cause in _chain(error))

        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        url = f"{endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
        what, section = ("model", "model") if self.kind == "model" else ("data set", "data")
        sign_in, again = "sign in with `hf auth login`, or set HF_TOKEN", "run the same command again"
        status, problem = http_status(error), ""
        not_cached = is_caused_by(errors.LocalEntryNotFoundError, errors.RevisionResolutionError, ConnectionError)
        if is_caused_by(errors.GatedRepoError) or "is a gated dataset" in str(error):  # `datasets` drops the cause
            problem = f"access to this {what} is restricted. Accept its terms at {url}, then {sign_in}"
        elif is_caused_by(errors.RepositoryNotFoundError):
            problem = (
                f"there is no folder and no {what} of the hub ({url}) with this name. Correct {section}.path; if the "
                f"{what} is private, {sign_in}"
            )
        elif is_caused_by(errors.RevisionNotFoundError):
            problem = f"no revision {self.revision}. Correct {section}.revision; {url}/commits/main lists the commits"
        elif status in (401, 403):
            problem = f"the hub refuses the token ({status}). Make a token that may read {url}, then {sign_in}"
        elif status == 429:
            problem = f"the hub refuses more requests for now (429). Wait some minutes, and {again}"
        elif status >= 500:
            problem = f"the hub fails ({status}) at {url}. Wait, and {again}"
        elif not_cached and _is_offline():
            options = " --repo-type dataset" if self.kind == "dataset" else ""
            options += f" --revision {self.revision}" if self.revision else ""
            remedy = f"Unset it, or run `hf download {self.name}{options}` once with a network"
            problem = f"HF_HUB_OFFLINE is set, and the cache lacks this {what}. {remedy}"
        elif not_cached or is_transport_error(error):
            problem = (
                f"the hub at {endpoint} does not answer, and the cache lacks this {what}. Check the network and "
                f"HF_ENDPOINT, and {again}"
            )
        elif is_caused_by(errors.HfHubHTTPError) and not is_caused_by(errors.EntryNotFoundError):
            problem = f"the hub answers {status} at {url}: {first_line(error)}"
        return problem and f"{self.name}: {problem}"


def with_retries(function: Callable[[], Result], name: str) -> Result:
    """Call a function that asks the hub for a repository; retry while the hub is overloaded or connections break."""
    from tenacity import Retrying, retry_if_exception, stop_after_attempt

    retrying = Retrying(
        retry=retry_if_exception(_is_transient),
        wait=_wait,
        stop=stop_after_attempt(MAX_ATTEMPTS),
        before_sleep=lambda state: log.warning("%s: the hub does not answer; trying again", name),
        reraise=True,
    )
    return retrying(function)


def http_status(error: BaseException) -> int:
    """Return the HTTP status that caused an error; 0 if there is none."""
    responses = (getattr(cause, "response", None) for cause in _chain(error))
    return next((getattr(response, "status_code", 0) for response in responses if response is not None), 0)


def is_transport_error(error: BaseException, *names: str) -> bool:
    """Return whether a transport error of httpx or httpx2 caused an error; with names, whether one of these did."""
    bases = {base.__name__ for cause in _chain(error) for base in type(cause).__mro__}
    return bool(bases & set(names or ["TransportError"]))


def _is_transient(error: BaseException) -> bool:
    status = http_status(error)
    return status == 429 or status >= 500 or is_transport_error(error, "ProtocolError", "ReadError", "ReadTimeout")


def _wait(state: "RetryCallState") -> float:
    """Return the seconds before the next attempt: BACKOFF_SECONDS, doubled each time, or more if the hub asks."""
    causes = _chain(state.outcome.exception() if state.outcome else None)
    headers = [getattr(getattr(cause, "response", None), "headers", {}) for cause in causes]
    return backoff(state.attempt_number, BACKOFF_SECONDS, max(map(retry_after, headers), default=0.0))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()
