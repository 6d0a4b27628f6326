"""An engine in a process of its own, watched, ended and started again; ``remote.RemoteEngine`` is what others use."""
