"""The Helm charts of manifests/charts, made of what the Kustomize folders are made of.

aim-runtimes holds every ClusterServingRuntime as a file and picks by its values; aim-tenant's templates are its own
objects with the values' places left open. The schemas are those of the values' models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from aim_profile.files.write import dump
from aim_profile.gpus.catalog import by_name, catalog

from .generated import MARK
from .kustomize import marked
from .overlays import RESTRICTED_HOME, affinity_of, product_variables
from .runtimes import CPU_IMAGE, SGLANG_IMAGE, base, dashed, partitions
from .serving_runtime import release
from .target import Allocation
from .tenant import OPTIONAL, Tenant, tenant

_PRODUCTS = tuple(name for name in catalog() if by_name(name).partitionable)
_RUNTIME_FILES = {
    path.rpartition("/")[2].removesuffix(".yaml"): text
    for path, text in {**base(), **partitions()}.items()
    if not path.endswith("kustomization.yaml")
}
_OPEN = re.compile(r"'@(\w+)@'")


class Image(BaseModel):
    """Where an image is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="REGISTRY/NAME.")
    tag: str = Field(default=release(), description="Not looked at where there is a digest.")
    digest: str = Field(default="", pattern=r"^(sha256:[0-9a-f]{64})?$", description="sha256:…")


class Runtimes(BaseModel):
    """The values of the chart aim-runtimes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runtimes: list[Literal[tuple(_RUNTIME_FILES)]] = Field(  # type: ignore[valid-type]
        default=["aim-llamacpp", "aim-vllm-cpu"], description="ClusterServingRuntimes to install."
    )
    product: Literal["", *_PRODUCTS] = Field(  # type: ignore[valid-type]
        default="", description="GPU runtimes run on nodes of this product only, with its variables; empty: on any."
    )
    allocation: Allocation = Field(
        default="plugin",
        description="Devices counted by AMD's device plugin, or claimed of its DRA driver\n"
        "(runtimes aim-vllm-…-dra), whose claims say the product.",
    )
    anyUserId: bool = Field(default=False, description="For OpenShift's restricted-v2: the home in a volume.")
    images: dict[str, Image] = Field(
        default={name: Image(name=name, tag=release()) for name in ("aim-runtime", CPU_IMAGE, SGLANG_IMAGE)},
        description="By our names.",
    )


def shipped_values() -> dict[str, Runtimes]:
    """The value files that stand beside the chart: an overlay's name → what makes the chart equal to it."""
    found = {"dev-cpu": Runtimes()}
    for product in ("MI300X", "MI355X"):
        labels = sorted(mode.resource_label for mode in by_name(product).modes() if mode.compute == "CPX")
        ways: tuple[tuple[str, Allocation], ...] = (("", "plugin"), ("-dra", "dra"))
        for suffix, allocation in ways:
            own = [f"aim-vllm-{dashed(label)}{suffix}" for label in labels]
            chosen = ["aim-llamacpp", "aim-sglang", "aim-vllm", *own]
            found[f"{product.lower()}-cpx{suffix}"] = Runtimes(runtimes=chosen, product=product, allocation=allocation)
    found["openshift"] = found["mi300x-cpx"].model_copy(update={"anyUserId": True})
    return found


def charts() -> dict[str, str]:
    """Each file of both charts: path below manifests/ → text."""
    return {**_runtimes_chart("charts/aim-runtimes"), **_tenant_chart("charts/aim-tenant")}


def _runtimes_chart(folder: str) -> dict[str, str]:
    values = {f"{folder}/values-{name}.yaml": _values(each) for name, each in shipped_values().items()}
    products = {
        name: {"env": product_variables(by_name(name)), "affinity": affinity_of(by_name(name))} for name in _PRODUCTS
    }
    return {
        **_about(folder, "aim-runtimes", "KServe runtimes for AMD Instinct GPUs and their partitions", Runtimes()),
        **values,
        f"{folder}/templates/runtimes.yaml": f"# {MARK}\n{_PICKED}",
        f"{folder}/files/products.yaml": marked(dump(products)),
        f"{folder}/files/home.yaml": marked(dump(RESTRICTED_HOME)),
        **{f"{folder}/files/runtimes/{name}.yaml": text for name, text in _RUNTIME_FILES.items()},
    }


def _tenant_chart(folder: str) -> dict[str, str]:
    return {
        **_about(folder, "aim-tenant", "A namespace with its quota, rules, queue, policy and keys", Tenant()),
        **{f"{folder}/templates/{name}.yaml": text for name, text in _templates().items()},
    }


def _templates() -> Mapping[str, str]:
    # No validation: every value is its own place.
    open_values = Tenant.model_construct(**{name: f"@{name}@" for name in Tenant.model_fields})  # type: ignore[arg-type]
    found: dict[str, str] = {}
    for each in tenant(open_values):
        text = _OPEN.sub(r"{{ toJson .Values.\1 }}", dump(each))
        if condition := OPTIONAL.get(each["kind"]):
            text = f"{{{{- if .Values.{condition} }}}}\n{text}{{{{- end }}}}\n"
        name = each["kind"].lower() if each["kind"] == "Namespace" else f"{each['kind']}-{each['metadata']['name']}"
        found[name.lower()] = f"# {MARK}\n{text}"
    return found


def _about(folder: str, name: str, says: str, values: BaseModel) -> dict[str, str]:
    chart = {
        "apiVersion": "v2",
        "name": name,
        "description": says,
        "type": "application",
        "version": release(),
        "appVersion": release(),
        "kubeVersion": ">=1.32.0-0",
    }
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **type(values).model_json_schema()}
    return {
        f"{folder}/Chart.yaml": marked(dump(chart)),
        f"{folder}/values.yaml": _values(values),
        f"{folder}/values.schema.json": json.dumps({"$comment": MARK, **schema}, indent=2) + "\n",
    }


def _values(values: BaseModel) -> str:
    """With what each is for above it."""
    lines = []
    for name, field in type(values).model_fields.items():
        value = values.model_dump(mode="json", include={name})
        says = "\n".join(f"# {line}" for line in str(field.description).splitlines())
        lines.append(f"{says}\n{dump(value)}")
    return marked("".join(lines))


_PICKED = """\
{{- range $name := .Values.runtimes }}
{{- $runtime := $.Files.Get (printf "files/runtimes/%s.yaml" $name) | fromYaml }}
{{- $container := first $runtime.spec.containers }}
{{- $ours := first (splitList ":" $container.image) }}
{{- $image := index $.Values.images $ours }}
{{- $_ := set $container "image" (printf "%s:%s" $image.name $image.tag) }}
{{- if $image.digest }}
{{- $_ := set $container "image" (printf "%s@%s" $image.name $image.digest) }}
{{- end }}
{{- if and $.Values.product (ne $ours "aim-runtime-cpu") }}
{{- $product := index ($.Files.Get "files/products.yaml" | fromYaml) $.Values.product }}
{{- if hasPrefix "aim-vllm" $name }}
{{- $_ := set $container "env" (concat $container.env $product.env) }}
{{- end }}
{{- if eq $.Values.allocation "plugin" }}
{{- $_ := set $runtime.spec "affinity" $product.affinity }}
{{- end }}
{{- end }}
{{- if $.Values.anyUserId }}
{{- $home := $.Files.Get "files/home.yaml" | fromYaml }}
{{- $_ := set $container "env" (append $container.env $home.env) }}
{{- $_ := set $container "volumeMounts" (append $container.volumeMounts $home.mount) }}
{{- $_ := set $runtime.spec "volumes" (append $runtime.spec.volumes $home.volume) }}
{{- end }}
---
{{ toYaml $runtime }}
{{- end }}
"""
