"""The job: what a person asks for, in YAML, as a Kubernetes object. Imports neither torch nor Ray."""
