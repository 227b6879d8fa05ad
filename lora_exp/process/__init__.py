"""This process and this machine: its start, its device, its threads."""
