"""Evidence as files: what `aim-runtime measure` wrote, looked for in a directory, and which profiles it speaks for.

A file holds `measurements: […]`, which may stand under `evidence:` of a profile as it is; a profile that carries some
is read too. A directory may hold the evidence of a whole fleet: what is of other hardware is passed over and said. A
file that somebody names must be of the profile it is named for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from aim_profile.files.kinds import looks_like
from aim_profile.files.read import check_as, read_parsed
from aim_profile.files.write import dump, without_empty

from .evidence import Measurement, Mismatch, Subject
from .files import profile_of
from .profile import Profile, ProfileError

_MOST_FILES = 10_000
_ENDINGS = (".yaml", ".yml", ".json")


class EvidenceFile(BaseModel):
    """What a file of evidence holds; each measurement says its version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measurements: tuple[Measurement, ...] = Field(min_length=1)


class Evidence(NamedTuple):
    """What was read from `path`. is_file: somebody named this very file, so that it must be of use."""

    path: Path
    is_file: bool
    measurements: tuple[Measurement, ...]

    def on(self, profile: Profile) -> Profile:
        """The profile with what speaks for it. Raises ProfileError where a file that was named does not."""
        found = profile.carrying(self.measurements)
        if self.is_file and not any(each in found.evidence.measurements for each in self.measurements):
            raise self.of_something_else(profile.subject, profile.reference)
        return found

    def on_all(self, profiles: Iterable[Profile]) -> list[Profile]:
        """The same of several, of which a file that was named must be of one. Raises ProfileError."""
        before = list(profiles)
        after = [profile.carrying(self.measurements) for profile in before]
        if self.is_file and before and not any(each.evidence.measured for each in after):
            raise self.of_something_else(before[0].subject, before[0].reference)
        return after

    def passed_over(self, profile: Profile) -> str | None:
        """Why none of it speaks for a profile, in one line; None where some does."""
        if profile.evidence.measured:
            return None
        why = dict.fromkeys(str(found) for _, found in self._mismatches(profile.subject))
        return f"{self.path} holds no evidence of {profile.reference}: {'; '.join(list(why)[:3])}"

    def speaks_for(self, subject: Subject) -> bool:
        """Whether some of it does."""
        return any(each.mismatch(subject) is None for each in self.measurements)

    def _mismatches(self, subject: Subject) -> list[tuple[int, Mismatch]]:
        found = ((index, each.mismatch(subject)) for index, each in enumerate(self.measurements))
        return [(index, mismatch) for index, mismatch in found if mismatch]

    def of_something_else(self, subject: Subject, named: str) -> ProfileError:
        """That none of it is of that subject, by the first thing in which it differs."""
        index, mismatch = self._mismatches(subject)[0]
        field = f"measurements[{index}].{mismatch.field}"
        return ProfileError(
            f"{self.path}: {field}: {mismatch.found}, {named} is for {mismatch.wanted}",
            field=field,
            value=mismatch.found,
            remedy="give evidence measured there, or a directory to look in",
        )


def read_evidence(path: Path) -> Evidence:
    """Every measurement in a file, or below a directory (what is no evidence there is passed over).

    Raises ProfileError: there is none, or a file of it is not well-formed, with file and line.
    """
    if path.is_dir():
        found = [measurement for file in _files(path) for measurement in _in_directory(file)]
        if not found:
            writes = "`aim-runtime measure` writes it"
            raise ProfileError(f"{path}: no evidence in it", field="evidence", value=str(path), remedy=writes)
        once = {measurement.model_dump_json(): measurement for measurement in found}  # the same as YAML and as JSON
        return Evidence(path, False, tuple(once.values()))
    file = read_parsed(path, ProfileError)
    if looks_like(file.raw) != "profile":
        return Evidence(path, True, check_as(EvidenceFile, file, ProfileError, "evidence file").measurements)
    carried = profile_of(file).evidence.measurements
    if not carried:
        remedy = "`aim-profile export … --evidence FILE` writes one that does"
        raise ProfileError(f"{path}: the profile carries no evidence", field="evidence", value=str(path), remedy=remedy)
    return Evidence(path, True, carried)


def as_text(measurements: Iterable[Measurement]) -> str:
    """A file of evidence, as YAML."""
    body = EvidenceFile(measurements=tuple(measurements)).model_dump(mode="json", exclude_none=True)
    return dump(without_empty(body))


def _files(folder: Path) -> Iterator[Path]:
    found = sorted(file for file in folder.rglob("*") if file.suffix in _ENDINGS and file.is_file())
    if len(found) > _MOST_FILES:
        raise ProfileError(f"{folder}: {len(found)} files", field="evidence", remedy=f"at most {_MOST_FILES} are read")
    yield from found


def _in_directory(file: Path) -> tuple[Measurement, ...]:
    parsed = read_parsed(file, ProfileError)
    if looks_like(parsed.raw) == "profile":
        return profile_of(parsed).evidence.measurements
    if looks_like(parsed.raw) != "evidence file":
        return ()
    return check_as(EvidenceFile, parsed, ProfileError, "evidence file").measurements
