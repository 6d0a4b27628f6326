"""`aim-profile`: verbs, options, tables and pictures."""
