"""One name on several devices."""
