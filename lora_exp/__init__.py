"""LoRA fine-tuning experiments composed by Hydra: small choices become one run, one trainer, one folder of results."""

__version__ = "0.1.0"
