"""The guardrail's policy that a job names, published beside the profile as it is."""

from __future__ import annotations

from pathlib import Path

from aim_profile.files.read import parsed
from aim_trainer.errors import JobError
from aim_trainer.places.open import open_file

FILE = "policy.yaml"
_FIELD = "spec.output.guardrailPolicy"


def write_policy(uri: str, into: Path) -> None:
    """Copies it. Raises as `read_policy`."""
    (into / FILE).write_bytes(read_policy(uri))


def read_policy(uri: str) -> bytes:
    """Raises JobError: not a mapping with a version; StoreError: cannot be read.

    What its rules mean is the guardrail's to say: `aim-guardrail policy` does.
    """
    place, name = open_file(uri)
    data = place.read_bytes(name)
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        raise _refused(uri, f"not UTF-8: {problem}") from problem
    raw = parsed(text, uri, JobError).raw
    if not isinstance(raw, dict) or not isinstance(raw.get("version"), int):
        raise _refused(uri, "not a policy: a mapping with a version")
    return data


def _refused(uri: str, why: str) -> JobError:
    return JobError(f"{_FIELD}: {uri}: {why}", field=_FIELD, value=uri, remedy="see `aim-guardrail policy --help`")
