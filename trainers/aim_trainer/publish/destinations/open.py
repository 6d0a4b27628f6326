"""From the job's `output.registry` to its destination."""

from __future__ import annotations

from pathlib import Path

from aim_trainer.errors import StoreError
from aim_trainer.job.fields import check_result
from aim_trainer.places.open import open_place
from aim_trainer.places.patience import PATIENCE_S
from aim_trainer.publish.versions import Destination

from .in_place import InPlace


def open_destination(registry: str | None, own: Path, patience_s: float = PATIENCE_S) -> Destination:
    """A path, file://, s3://BUCKET/PREFIX, hf://ORG/NAME or oci://HOST/REPOSITORY; None: the directory `own`.

    Raises StoreError: another scheme, or a tag or revision in it: versions are ours to number.
    """
    if registry is None:
        return InPlace(open_place(str(own)))
    try:
        check_result(registry)
    except ValueError as problem:
        raise _refused(registry, str(problem)) from None
    scheme, _, name = registry.partition("://")
    if scheme == "hf":
        from .hub import Hub

        return Hub(name)
    if scheme == "oci":
        from .oci import Oci

        return Oci(name)
    if scheme in ("http", "https"):
        raise _refused(registry, "nothing can be published over HTTP: give a directory, s3://, hf:// or oci://")
    return InPlace(open_place(registry, patience_s))


def _refused(registry: str, why: str) -> StoreError:
    field = "spec.output.registry"
    return StoreError(f"{field}: {why}", field=field, value=registry, remedy="name another place")
