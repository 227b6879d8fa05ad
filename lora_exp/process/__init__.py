"""The process that a run works in: its start, its threads."""
