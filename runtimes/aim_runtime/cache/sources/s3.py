"""Models in S3 and what speaks its protocol, by fsspec's s3fs. Credentials and endpoint are found as the AWS SDK does
(``AWS_*`` variables, ``~/.aws``, a role); ``awsAnonymousCredential=true`` is KServe's word for a public bucket.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec
from fsspec.asyn import sync

from aim_runtime.cache.errors import CacheError, Changed, Transient
from aim_runtime.cache.source import CHUNK_BYTES, Algorithm, Listing, RemoteFile
from aim_runtime.cache.uri import ModelUri, safe_path

_CONNECT_S = 10
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class S3:
    """An object, or all objects below a prefix."""

    def __init__(self, uri: ModelUri, stall_s: float) -> None:
        self._uri = uri
        self._files = fsspec.filesystem(
            "s3",
            anon=os.environ.get("awsAnonymousCredential", "").lower() == "true",  # noqa: SIM112  KServe's spelling
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={"connect_timeout": _CONNECT_S, "read_timeout": stall_s, "retries": {"max_attempts": 1}},
        )
        self._files.retries = 1  # attempts are counted in one place, and go on where the last one ended

    def listing(self) -> Listing:
        with self._errors():
            found = self._files.find(self._uri.location, detail=True)
            files = [self._file(key, known) for key, known in sorted(found.items()) if known["type"] == "file"]
        if not files:
            raise CacheError(f"{self._uri.text}: no such object, and none below it")
        return Listing("", tuple(files))

    def _file(self, key: str, known: Mapping[str, Any]) -> RemoteFile:
        name = key.rpartition("/")[2] if key == self._uri.location else key.removeprefix(f"{self._uri.location}/")
        bucket, _, rest = key.partition("/")
        head = self._files.call_s3("head_object", Bucket=bucket, Key=rest, ChecksumMode="ENABLED")
        size, etag = int(head["ContentLength"]), str(head.get("ETag", ""))
        if size != int(known["size"]):
            raise Changed(f"{self._uri.text}: {name} changed while it was listed")
        return RemoteFile(safe_path(name, self._uri.text), size, key, digest=_digest(head), validator=etag)

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        bucket, _, key = file.locator.partition("/")
        with self._errors():
            answer = self._files.call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={offset}-", IfMatch=file.validator
            )
        try:
            if answer.get("ContentLength") != file.size - offset:
                raise Changed(f"{self._uri.text}: {file.path}: is not as long as it was listed")
            yield offset, self._chunks(answer["Body"])
        finally:
            answer["Body"].close()

    def _chunks(self, body: Any) -> Iterator[bytes]:
        with self._errors():
            while data := sync(self._files.loop, body.read, CHUNK_BYTES):
                yield data

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the three libraries below raise, as ours. Their words may hold a signature and are left out."""
        text = self._uri.text
        try:
            yield
        except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
            raise CacheError(f"{text}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except PermissionError as error:
            raise CacheError(f"{text}: refused: check AWS_ACCESS_KEY_ID and what it may read") from error
        except FileNotFoundError as error:
            raise CacheError(f"{text}: no such bucket or object") from error
        except (botocore.exceptions.BotoCoreError, aiohttp.ClientError, TimeoutError) as error:
            raise Transient(f"{text}: cannot be reached ({type(error).__name__})") from error
        except OSError as error:
            if "pre-condition" in str(error).lower() or "PreconditionFailed" in str(error):
                raise Changed(f"{text}: changed while it was fetched") from error
            raise Transient(f"{text}: broke off ({type(error).__name__})") from error


def _digest(head: Mapping[str, Any]) -> tuple[Algorithm, str] | None:
    """What S3 says of the whole object: a SHA-256 if it was uploaded with one; else the ETag, where it is an MD5
    (https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html: not of parts, not with KMS' or a client's key).
    """
    try:
        sha256 = base64.b64decode(str(head.get("ChecksumSHA256", "")), validate=True).hex()
    except binascii.Error:  # of parts: "…-5"
        sha256 = ""
    if len(sha256) == 64:
        return ("sha256", sha256)
    md5 = _MD5.fullmatch(str(head.get("ETag", "")))
    foreign = str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in head
    return ("md5", md5.group(1)) if md5 and not foreign else None
