"""What can go wrong with a cache: each error is one line that names the thing, and the remedy where there is one."""

from __future__ import annotations


class CacheError(Exception):
    """The cache cannot do what was asked."""


class Transient(CacheError):
    """A source that did not answer, or stopped in the middle: worth another attempt."""


class Changed(CacheError):
    """What is read is not what was listed: the source has to be listed anew."""


class Corrupt(CacheError):
    """All bytes are here, and they are not those whose digest was promised."""


class Busy(CacheError):
    """Another process holds the lock, and went on holding it for as long as we waited."""


class Missing(CacheError):
    """The cache is asked for a model that is not in it, or no longer whole."""
