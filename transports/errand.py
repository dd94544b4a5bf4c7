"""Errors on their way to other ranks: the name of the class in abccl's tree, and the text."""

from __future__ import annotations

import json

from .. import errors

TEXT_BYTES = 2000
"""Longer texts are cut: what carries an error should never wait for its receiver."""


def error_to_words(error: Exception) -> list[str]:
    """What to send, for instance as JSON. Of an error that is not of abccl's tree the text begins with its class."""
    name = type(error).__name__
    known = name in errors.__all__
    text = str(error) if known else f"{name}: {error}"
    return [name if known else "", text.encode()[:TEXT_BYTES].decode(errors="ignore")]


def error_from_words(words: object, otherwise: type[Exception] = errors.Aborted) -> Exception:
    """The error that was sent; of the class `otherwise` if it was not of abccl's tree, or is no error at all."""
    if not isinstance(words, list) or len(words) != 2 or not all(isinstance(word, str) for word in words):
        return otherwise("a rank sent an error that can not be read: do all ranks run the same version of abccl?")
    name, text = words
    kind: type[Exception] = getattr(errors, name) if name in errors.__all__ else otherwise
    return kind(text)


def error_from_json(data: bytes, otherwise: type[Exception] = errors.Aborted) -> Exception:
    """The error whose words came as JSON, over a network; see `error_from_words`."""
    try:
        return error_from_words(json.loads(data), otherwise)
    except (ValueError, RecursionError):
        return error_from_words(None, otherwise)
