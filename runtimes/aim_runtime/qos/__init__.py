"""Who goes first, and what can still be promised: pure over a clock, it knows no engine and no event loop."""
