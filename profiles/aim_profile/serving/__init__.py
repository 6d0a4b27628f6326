"""Profiles: how one model is served on one kind of device."""
