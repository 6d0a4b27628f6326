"""Requests wait for their turn in front of an engine, as :mod:`aim_runtime.qos` says."""
