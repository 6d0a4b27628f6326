"""A repository of the Hugging Face hub: a version is a tag, and the hub makes each tag once.

Whatever stands on `main` is the newest; a commit without a tag is no version. HF_ENDPOINT and HF_TOKEN mean what
`huggingface_hub` says. A repository that is made here is private: whether it may be seen is its owner's to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from aim_trainer.errors import StoreError
from aim_trainer.publish.versions import COMMIT, Commit, name_of, number_of
from aim_trainer.scratch import scratch

_TAKEN = 409


class Hub:
    """hf://ORG/NAME."""

    def __init__(self, repository: str) -> None:
        self._repository, self._api = repository, HfApi()

    def uri(self, number: int) -> str:
        return f"hf://{self._repository}@{name_of(number)}"

    def check(self) -> None:
        owner = self._repository.partition("/")[0]
        with self._errors():
            who = self._api.whoami()
            if self._api.repo_exists(self._repository):
                self._api.auth_check(self._repository, write=True)
                return
            names = [str(each["name"]) for each in (who, *who.get("orgs", ()))]
        if owner not in names:
            where = f"hf://{self._repository}"
            remedy = "set HF_TOKEN to one of somebody who may write there, or name another"
            raise StoreError(f"{where}: HF_TOKEN is of {', '.join(names)}, not of {owner}", field=where, remedy=remedy)

    def published(self) -> dict[int, str | None]:
        with self._errors(), scratch() as copies:
            self._api.create_repo(self._repository, private=True, exist_ok=True)
            tags = [tag.name for tag in self._api.list_repo_refs(self._repository).tags]
            found = {number: tag for tag in tags if (number := number_of(tag)) is not None}
            return {number: self._digest(tag, copies / tag) for number, tag in found.items()}

    def _digest(self, tag: str, into: Path) -> str | None:
        """None: a tag that somebody else made."""
        try:
            file = self._api.hf_hub_download(self._repository, COMMIT, revision=tag, local_dir=into)
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == 404:
                return None
            raise
        return str(json.loads(Path(file).read_bytes())["digest"])

    def add(self, number: int, files: Path, commit: Commit) -> bool:
        name = name_of(number)
        (files / COMMIT).write_text(commit.text(), encoding="utf-8")
        try:
            with self._errors():
                made = self._api.upload_folder(
                    repo_id=self._repository,
                    folder_path=files,
                    commit_message=f"Publish {name}",
                    delete_patterns="*",  # a version is what was published, nothing of the one before
                )
                return self._tag(name, made.oid)
        finally:
            (files / COMMIT).unlink()

    def _tag(self, name: str, commit: str) -> bool:
        try:
            self._api.create_tag(self._repository, tag=name, revision=commit)
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == _TAKEN:
                return False
            raise
        return True

    @contextmanager
    def _errors(self) -> Iterator[None]:
        where = f"hf://{self._repository}"
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else "nothing"
            remedy = "set HF_TOKEN to a token that may write there, and check the name"
            raise StoreError(f"{where}: the hub answers {status}", field=where, remedy=remedy) from error
        except LocalTokenNotFoundError as error:
            remedy = "set HF_TOKEN to a token that may write there"
            raise StoreError(f"{where}: no token", field=where, remedy=remedy) from error
        except (httpx2.HTTPError, OSError) as error:
            why = f"{where}: cannot be reached ({type(error).__name__})"
            raise StoreError(
                why, field=where, remedy="check HF_ENDPOINT and the network, then publish again"
            ) from error
        except (ValueError, KeyError, TypeError) as error:  # the library trusts what it is sent
            why = f"{where}: the hub answers what a hub does not ({error})"
            raise StoreError(why, field=where, remedy="give hf://ORG/NAME") from error
