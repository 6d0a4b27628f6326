"""`aim-guardrail`'s verbs: each module's ``main(argv)`` returns the exit code."""
