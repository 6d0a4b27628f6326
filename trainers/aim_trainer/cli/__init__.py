"""`aim-trainer`: the verbs, and what they print."""
