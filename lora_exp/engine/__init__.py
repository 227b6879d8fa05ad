"""How it is computed fast: packing, prefix sharing, the reference store."""
