"""``aim-runtime batch``: many requests from a file, answered into a file with what a server has left over."""
