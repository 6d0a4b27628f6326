"""Envoy's external processing: the guardrail as a sidecar of a gateway, which keeps the connections."""
