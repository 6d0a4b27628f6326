"""`aim-profile doctor`: its options, and how its findings are shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import FACTS, AmdSmiOption, NodeOption, OutputOption, RootOption, guarded, refuse_beside
from .output import DOES_NOT_FIT, FITS, Output, print_note, show

if TYPE_CHECKING:
    from aim_profile.doctor.examine import Asked, Examination
    from aim_profile.doctor.finding import Finding


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(rich_help_panel=FACTS)(doctor)


def doctor(
    root: RootOption = None,
    amd_smi: AmdSmiOption = None,
    node: NodeOption = None,
    plan: Annotated[Path | None, typer.Option(help="A plan that the node must be as.")] = None,
    name: Annotated[str | None, typer.Option(help="With --plan: the node's name in it.")] = None,
    kube_node: Annotated[
        Path | None, typer.Option(help="What Kubernetes says of it: `kubectl get node NAME -o json`.")
    ] = None,
    resource_slices: Annotated[
        Path | None, typer.Option(help="With --kube-node, for the DRA driver: `kubectl get resourceslices -o json`.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Write a redacted .tar.gz for a bug report: findings, kernel files, versions.")
    ] = None,
    output: OutputOption = "table",
) -> None:
    """What is wrong with this node, where it was seen, and what to do about it. Changes nothing. Exit 1 at an error.

    What cannot be read is `unknown`, never `ok`.

    Example: `aim-profile doctor --kube-node node.json`
    """

    def verb() -> int:
        from aim_profile.doctor.examine import examine

        asked = _asked(root, amd_smi, node, (plan, name), (kube_node, resource_slices))
        found = examine(asked)
        if bundle is not None:
            _write(bundle, asked, found)
        _show(output, found)
        return DOES_NOT_FIT if found.counts["error"] else FITS

    guarded(verb)


def _asked(
    root: Path | None,
    amd_smi: list[Path] | None,
    node: Path | None,
    plan: tuple[Path | None, str | None],
    kubernetes: tuple[Path | None, Path | None],
) -> Asked:
    """The options as one question, their files read. Raises AimProfileError for one without use beside another."""
    from aim_profile.doctor.cluster import load_kube_node, load_slices
    from aim_profile.doctor.examine import Asked
    from aim_profile.plans.plan import load_plan

    plan_file, name = plan
    node_file, slices_file = kubernetes
    if node is not None:
        refuse_beside(f"--node {node}", {"root": root, "amd-smi": amd_smi or None})
    if plan_file is None:
        refuse_beside("no --plan", {"name": name})
    if node_file is None:
        refuse_beside("no --kube-node", {"resource-slices": slices_file})
    kube = None if node_file is None else load_kube_node(node_file)
    return Asked(
        root=root,
        emulated=node,
        amd_smi=tuple(amd_smi or ()),
        plan=None if plan_file is None else (load_plan(plan_file), str(plan_file), name),
        kube=None if kube is None else (kube, str(node_file)),
        slices=None if kube is None or slices_file is None else load_slices(slices_file, kube.metadata.name),
    )


def _write(file: Path, asked: Asked, found: Examination) -> None:
    from aim_profile.doctor.bundle import write_bundle

    written = write_bundle(file, asked, found)
    left_out = f", {len(written.left_out)} left out" if written.left_out else ""
    print_note(
        f"{file}: {written.size_bytes} bytes, {written.kernel_files} kernel files{left_out}; redacted, but look at it "
        "before you send it"
    )


def _show(output: Output, found: Examination) -> None:
    data = {
        "counts": dict(found.counts),
        "findings": [finding.model_dump() for finding in found.findings],
        "versions": found.versions,
    }
    total = ", ".join(f"{count} {severity}" for severity, count in found.counts.items())
    show(output, data, "\n".join(map(_text, found.findings)), total)


def _text(finding: Finding) -> str:
    lines = [f"{finding.severity:7}  {finding.check}: {finding.seen}"]
    if finding.remedy:
        lines += [f"         seen in  {finding.where}", f"         remedy   {finding.remedy}"]
    return "\n".join(lines)
