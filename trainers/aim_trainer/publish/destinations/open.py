"""From the job's `output.registry` to its destination."""

from __future__ import annotations

import re
from pathlib import Path

from aim_trainer.errors import StoreError
from aim_trainer.places.open import open_place
from aim_trainer.places.patience import PATIENCE_S
from aim_trainer.publish.versions import Destination

from .in_place import InPlace

_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)", re.ASCII)
_OCI = re.compile(r"oci://([\w.-]+(?::\d+)?/[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)", re.ASCII)


#: For a place that is looked at before hours of training: told in seconds.
_LOOKS_S = 10.0


def check_destination(registry: str) -> None:
    """Whether versions could be published there now. Raises StoreError: away, refused, read-only, or no such place."""
    try:
        open_destination(registry, Path(), _LOOKS_S).check()
    except StoreError as problem:
        named = "spec.output.registry"
        why = problem.problem if problem.field == named else f"{named}: {problem.problem}"
        raise StoreError(why, field=named, value=registry, remedy=problem.remedy) from problem


def open_destination(registry: str | None, own: Path, patience_s: float = PATIENCE_S) -> Destination:
    """A path, file://, s3://BUCKET/PREFIX, hf://ORG/NAME or oci://HOST/REPOSITORY; None: the directory `own`.

    Raises StoreError: another scheme, or a tag or revision in it: versions are ours to number.
    """
    if registry is None:
        return InPlace(open_place(str(own)))
    if registry.startswith("hf://"):
        from .hub import Hub

        return Hub(_named(_HUB, registry, "hf://ORG/NAME"))
    if registry.startswith("oci://"):
        from .oci import Oci

        return Oci(_named(_OCI, registry, "oci://HOST/REPOSITORY"))
    if registry.startswith(("http://", "https://")):
        raise _refused(registry, "nothing can be published over HTTP", "a directory, s3://, hf:// or oci://")
    return InPlace(open_place(registry, patience_s))


def _named(form: re.Pattern[str], registry: str, wanted: str) -> str:
    found = form.fullmatch(registry)
    if found is None:
        raise _refused(registry, "not a name that can be published to", f"{wanted}, without a tag or revision")
    return found[1]


def _refused(registry: str, why: str, give: str) -> StoreError:
    return StoreError(
        f"spec.output.registry: {registry!r}: {why}",
        field="spec.output.registry",
        value=registry,
        remedy=f"give {give}",
    )
