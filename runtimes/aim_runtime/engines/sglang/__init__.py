"""SGLang: its own server as a child process, spoken to by HTTP."""
