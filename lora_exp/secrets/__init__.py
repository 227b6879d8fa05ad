"""Keys, tokens and passwords: refused in the config, masked in every text that leaves the process."""
