"""What is learned: each recipe declares its rows, its trainer, its need of a reference."""
