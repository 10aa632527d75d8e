"""Syntax of URLs, without an HTTP client."""

import re

from pydantic import AnyHttpUrl, TypeAdapter, ValidationError

_HTTP = re.compile(r"https?://[^/\s]\S*", re.IGNORECASE)
_PYDANTIC = TypeAdapter(AnyHttpUrl)


def url_fault(url: str) -> str | None:
    """Return what is wrong with the URL of an HTTP endpoint, or None."""
    if any(mark in url for mark in "@?#"):  # the message omits the URL: it may contain a password or a key
        return "write the URL without a password, ? or #. A key belongs in the environment"
    if not _HTTP.fullmatch(url.strip()):
        return f"{url} is not a URL that begins with http:// or https:// and a host"
    try:
        _PYDANTIC.validate_python(url.strip())
    except ValidationError as error:
        return f"{url} is not a URL: {error.errors()[0]['msg'].rpartition(', ')[2]}"
    return None
