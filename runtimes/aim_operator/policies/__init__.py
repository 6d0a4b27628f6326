"""GuardrailPolicies: a guardrail's policy as an object of the cluster."""
