"""Profiles and plans as Kubernetes objects."""
