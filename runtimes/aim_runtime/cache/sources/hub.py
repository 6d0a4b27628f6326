"""Models of the Hugging Face hub: its library lists, at one commit; the bytes come by range requests of our own.

The library's own download begins a new temporary file with each attempt (huggingface_hub 2.4: a fetch killed at half is
fetched whole again). ``HF_ENDPOINT``, ``HF_TOKEN`` and its token file mean what the library says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx2
import requests
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from aim_runtime.cache.errors import CacheError, Transient
from aim_runtime.cache.source import Listing, RemoteFile
from aim_runtime.cache.sources.web import ranged, session, transport_errors
from aim_runtime.cache.uri import ModelUri, safe_path

_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_CREDENTIALS = "set HF_TOKEN to a token that may read it"


class Hub:
    """A repository at a revision; ``main`` where none is said."""

    def __init__(self, uri: ModelUri, stall_s: float) -> None:
        self._uri, self._stall_s = uri, stall_s
        self._session = session(stall_s)

    def listing(self) -> Listing:
        """Everything of the commit that the revision stands for now: later reads are of this very commit."""
        api, repository = HfApi(), self._uri.location
        with self._errors():
            commit = api.model_info(repository, revision=self._uri.revision or "main", timeout=self._stall_s).sha
            if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
                raise CacheError(f"{self._uri.text}: the hub names no commit")
            tree = list(api.list_repo_tree(repository, recursive=True, revision=commit))
        return Listing(commit, tuple(self._file(item, commit) for item in tree if isinstance(item, RepoFile)))

    def _file(self, item: RepoFile, commit: str) -> RemoteFile:
        path = safe_path(item.path, self._uri.text)
        url = hf_hub_url(self._uri.location, path, revision=commit)
        if item.lfs is not None:
            return RemoteFile(path, int(item.lfs.size), url, digest=("sha256", item.lfs.sha256))
        return RemoteFile(path, int(item.size), url, digest=("git-sha1", item.blob_id))

    def _get(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        with transport_errors(self._uri.text):
            return self._session.get(url, headers={**build_hf_headers(), **headers}, stream=True)

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        whose = f"{self._uri.text}: {file.path}"
        with ranged(lambda headers: self._get(file.locator, headers), file, offset, whose, _CREDENTIALS) as found:
            yield found

    @contextmanager
    def _errors(self) -> Iterator[None]:
        text = self._uri.text
        try:
            yield
        except GatedRepoError as error:
            raise CacheError(f"{text}: gated: ask for access on its page, and {_CREDENTIALS}") from error
        except RevisionNotFoundError as error:
            raise CacheError(f"{text}: no such revision") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403, 404):
                raise CacheError(f"{text}: no such repository, or a private one: {_CREDENTIALS}") from error
            kind = Transient if status == 429 or status >= 500 else CacheError
            raise kind(f"{text}: the hub answers {status}") from error
        except (httpx2.HTTPError, OSError) as error:
            raise Transient(f"{text}: cannot be reached ({type(error).__name__})") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # the library trusts what it is sent
            raise CacheError(f"{text}: the hub answers what a hub does not ({type(error).__name__})") from error
