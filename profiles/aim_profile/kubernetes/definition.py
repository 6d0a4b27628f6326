"""Kinds of our own: what every CustomResourceDefinition of ours says, around the schema that its kind has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from .structural import Schema

GROUP, VERSION = "aim.amd.com", "v1alpha1"


class Kind(NamedTuple):
    """Its names as kubectl takes them; short: one word more for it."""

    kind: str
    plural: str
    short: str
    scope: Literal["Namespaced", "Cluster"] = "Namespaced"


def custom_resource_definition(kind: Kind, schema: Schema, columns: Sequence[Schema]) -> Schema:
    """The whole object, for `kubectl apply --server-side`. schema: see object_schema."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": kind.kind.lower(),
                "shortNames": [kind.short],
            },
            "scope": kind.scope,
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [*columns],
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def object_schema(says: str, spec: Schema, status: Schema, validations: list[dict[str, str]]) -> Schema:
    """`openAPIV3Schema`: an object of spec and status. validations: see structural.validations."""
    return {
        "type": "object",
        "description": says,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": validations,
    }


#: `status.conditions`: metav1.Condition, one of each type.
CONDITIONS: Schema = {
    "type": "array",
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["type"],
    "items": {
        "type": "object",
        "required": ["type", "status", "lastTransitionTime", "reason", "message"],
        "properties": {
            "type": {"type": "string", "maxLength": 316},
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
            "lastTransitionTime": {"type": "string", "format": "date-time"},
            "reason": {"type": "string", "minLength": 1, "maxLength": 1024},
            "message": {"type": "string", "maxLength": 32768},
        },
    },
}
