"""Code and what is written above it: licences, marks of ownership, and code that does harm where it is run."""
