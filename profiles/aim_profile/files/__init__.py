"""YAML in and out: read with limits, written as a person would."""
