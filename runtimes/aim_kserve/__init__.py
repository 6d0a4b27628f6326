"""The KServe server shell that the runtime and the guardrail transformer share.

KServe gives the process, V1/V2 REST, gRPC and ``/metrics``; this package mends, in one place, what both of
our processes must not inherit from KServe 0.21 (see ``docs/adr/0001-one-kserve-shell.md``).
"""
