"""Before a run: what it will cost in rows, steps, memory and time, and whether it fits."""
