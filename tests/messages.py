"""Messages of conversations."""

from typing import Any

Message = dict[str, Any]


def user(content: Any, **more: Any) -> Message:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> Message:
    return {"role": "system", "content": content}
