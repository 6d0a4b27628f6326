"""Policies side by side: a file, or a directory of files (a mounted ConfigMap), and which of them is whose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aim_guardrail.policy.policy import Policy, load_policy
from aim_guardrail.policy.source import PolicyError

MAX_FILES = 256
_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class PolicySet:
    """Policies that are in force together.

    Attributes:
        default: everybody's whose tenant has none of its own.
        tenants: by tenant.
        shadows: candidates, judged beside the policy of the same tenant (None: beside the default).
    """

    default: Policy
    tenants: Mapping[str, Policy] = field(default_factory=dict)
    shadows: Mapping[str | None, Policy] = field(default_factory=dict)

    def of(self, tenant: str | None) -> Policy:
        """The policy for that tenant's callers."""
        return self.default if tenant is None else self.tenants.get(tenant, self.default)

    def __iter__(self) -> Iterator[Policy]:
        """Those in force, the shadows left out."""
        return iter([self.default, *self.tenants.values()])


def policy_files(path: Path) -> list[Path]:
    """The file itself, or a directory's files ending in .yaml or .yml, hidden ones left out: a ConfigMap's mount has
    its own there.

    Raises:
        PolicyError: it cannot be listed, has no such file, or too many.
    """
    try:
        if not path.is_dir():
            return [path]
        found = sorted(p for p in path.iterdir() if p.name.endswith(_ENDINGS) and not p.name.startswith("."))
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror}): give a readable file or directory") from error
    if not found:
        raise PolicyError(f"{path}: no policy in it: put a file there whose name ends in .yaml")
    if len(found) > MAX_FILES:
        raise PolicyError(f"{path}: more than {MAX_FILES} policies: give a directory with fewer")
    return found


def load_policies(path: str | Path, shadow: Path | None = None) -> PolicySet:
    """The policies of a file or a directory.

    Args:
        shadow: a file that is a candidate, whatever it says of itself.

    Raises:
        PolicyError: one of them is not valid, two are for the same callers, or none is for everybody.
    """
    path = Path(path)
    read = [(file, load_policy(file)) for file in policy_files(path)]
    live = _by_tenant((file, policy) for file, policy in read if not policy.shadow)
    if None not in live:
        names = ", ".join(file.name for file, _ in read)
        raise PolicyError(f"{path}: no policy is everybody's ({names}): leave `tenant` out of one that is no shadow")
    candidates = [(file, policy) for file, policy in read if policy.shadow] + _candidate(shadow)
    tenants = {tenant: policy for tenant, policy in live.items() if tenant is not None}
    return PolicySet(live[None], tenants, _by_tenant(candidates))


def beside(policy: Policy, shadow: Path | None) -> PolicySet:
    """A policy for everybody, whoever wrote it, and the candidate of a file, if any. Raises PolicyError."""
    return PolicySet(policy, shadows=_by_tenant(_candidate(shadow)))


def _candidate(file: Path | None) -> list[tuple[Path, Policy]]:
    return [] if file is None else [(file, load_policy(file).model_copy(update={"shadow": True}))]


def _by_tenant(read: Iterable[tuple[Path, Policy]]) -> dict[str | None, Policy]:
    files: dict[str | None, Path] = {}
    found: dict[str | None, Policy] = {}
    for file, policy in read:
        if policy.tenant in files:
            whose = "everybody's" if policy.tenant is None else f"tenant {policy.tenant!r}'s"
            kind = "shadow" if policy.shadow else "policy"
            raise PolicyError(f"{files[policy.tenant]} and {file}: each is {whose} {kind}: remove one of them")
        files[policy.tenant], found[policy.tenant] = file, policy
    return found
