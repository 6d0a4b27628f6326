"""What all parts of a job share: frozen, camelCase in YAML, unknown keys refused, no infinities."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

_QUERY = re.compile(r"(https?://[^\s?]*)\?\S*", re.IGNORECASE)
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9._-]{1,62}(/|$)")
_REPOSITORIES = {
    "hf": (re.compile(r"hf://[\w.-]+/[\w.-]+", re.ASCII), "hf://ORG/NAME"),
    "oci": (
        re.compile(r"oci://[\w.-]+(?::\d+)?/[a-z0-9]+(?:[._/-]+[a-z0-9]+)*", re.ASCII),
        "oci://HOST/REPOSITORY",
    ),
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Part(BaseModel):
    """One mapping of the job's YAML."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, protected_namespaces=(), allow_inf_nan=False
    )


def without_signature(text: str) -> str:
    """Web addresses in it without what stands behind `?`: of a signed one that is a key to the data."""
    return _QUERY.sub(r"\1?…", text)


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"a number is needed (got {str(value).lower()})")
    return value


def _of_32_bits(value: int) -> int:
    if abs(value) >= 2**31:
        raise ValueError(f"{value} is more than 32 bits hold")
    return value


def check_bucket(uri: str) -> str:
    """Raises ValueError: `s3://` without a bucket that S3 would take."""
    if uri.startswith("s3://") and not _BUCKET.match(uri):
        raise ValueError(f"{without_signature(uri)[:200]!r}: give s3://BUCKET/PREFIX")
    return uri


def check_result(uri: str) -> str:
    """Raises ValueError: a repository that nothing can be published to, or with a tag: versions are ours to number."""
    for scheme, (form, wanted) in _REPOSITORIES.items():
        if uri.startswith(f"{scheme}://") and not form.fullmatch(uri):
            raise ValueError(f"{uri[:200]!r}: give {wanted}, without a tag or revision")
    return uri


def _of_schemes(*schemes: str) -> AfterValidator:
    def check(uri: str) -> str:
        found = _SCHEME.match(uri)
        if found and found[1] not in schemes:
            raise ValueError(f"{found[1]}:// cannot be used here; a path, or one of {', '.join(schemes)}")
        return uri

    return AfterValidator(check)


# What fits an int32 is a number to every API server and a seed to torch.
# Checked apart: of two bounds of Field one is lost.
Whole = Annotated[int, Field(strict=True), AfterValidator(_of_32_bits)]
#: YAML 1.1 reads 1e-4 as text: taken as the number it is meant to be.
Number = Annotated[float, BeforeValidator(_no_flag)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
#: Of Kubernetes: `16Gi`, `500M`, `2`.
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,12}(\.[0-9]{1,9})?([KMGTPE]i|[kMGTPE])?$")]
# A path stands for itself; each kind of place has the schemes that can be read from it, or written to.
DataUri = Annotated[Text, _of_schemes("file", "s3", "http", "https", "hf")]
ModelUri = Annotated[Text, _of_schemes("file", "s3", "hf")]
StoreUri = Annotated[Text, _of_schemes("file", "s3"), AfterValidator(check_bucket)]
ResultUri = Annotated[
    Text, _of_schemes("file", "s3", "hf", "oci"), AfterValidator(check_bucket), AfterValidator(check_result)
]
WebUri = Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+$", max_length=4096)]
# The job's name becomes the names of Kubernetes objects; KubeRay appends to it.
JobName = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
Namespace = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
#: A resource of the device plugin: `amd.com/gpu`.
ResourceName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$")
]
# Of labels and annotations: an API server refuses others, and all of the object with them.
MetadataKey = Annotated[
    str,
    StringConstraints(
        pattern=r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
    ),
]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
Image = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][^\s]*$", max_length=512)]
