"""Where models come from. Each library is imported by the file that needs it, when such a source is opened."""

from __future__ import annotations

from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.source import Source
from aim_runtime.cache.uri import ModelUri


def open_source(uri: ModelUri, stall_s: float) -> Source:
    """A reader of ``uri``. ``stall_s``: a connection without a byte for so long is given up.

    Raises:
        CacheError: the library for that kind of source is not installed.
    """
    try:
        if uri.scheme == "file":
            from aim_runtime.cache.sources.disk import Disk

            return Disk(uri)
        if uri.scheme in ("http", "https"):
            from aim_runtime.cache.sources.web import Web

            return Web(uri, stall_s)
        if uri.scheme == "s3":
            from aim_runtime.cache.sources.s3 import S3

            return S3(uri, stall_s)
        if uri.scheme == "hf":
            from aim_runtime.cache.sources.hub import Hub

            return Hub(uri, stall_s)
        from aim_runtime.cache.sources.oci import Oci

        return Oci(uri, stall_s)
    except ImportError as error:
        what = error.name or str(error)
        raise CacheError(
            f"{uri.scheme}:// needs {what}, which is not installed: pip install aim-kserve[cache]"
        ) from error
