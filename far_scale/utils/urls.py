"""URLs of shard sets and files: s3://, gs://, http(s):// and pipe:."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

from far_scale.utils.errors import UserError

_READABLE = re.compile(r"(s3|gs|http|https|pipe):")
_ANY_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://")


def is_remote(location: object) -> bool:
    """Whether the location of a shard set is a URL, and not a folder.

    Raises:
        UserError: the URL is of an unknown scheme, or a pipe: without {file}.
    """
    text = str(location)
    if not isinstance(location, str) or not (_ANY_SCHEME.match(text) or text.startswith("pipe:")):
        return False
    if not _READABLE.match(text):
        raise UserError(f"{redact_url(text)}: shard sets are read from a folder, s3://, gs://, http(s):// or pipe:")
    if text.startswith("pipe:") and "{file}" not in text:
        raise UserError(f"{text}: a pipe: needs {{file}} where the file's name goes, as in pipe:cat /sets/{{file}}")
    return True


def is_file_url(location: str) -> bool:
    """Whether the location of a single file is a URL that can be fetched, and not a path."""
    return _READABLE.match(location) is not None


def join_url(url: str, file: str) -> str:
    """The URL of a file in the shard set at `url`: before its query, or for the {file} of a pipe."""
    if url.startswith("pipe:"):
        return url.replace("{file}", file)
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{file}"))


def redact_url(url: str) -> str:
    """A URL for logs and messages: without user, password and query, which may give access. Paths stay as they are."""
    if not _ANY_SCHEME.match(url):  # a path or a pipe:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
