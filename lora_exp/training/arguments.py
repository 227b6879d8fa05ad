"""The trainer section as the arguments of transformers.TrainingArguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_exp.config import Config
from lora_exp.models.precision import Precision


def on_one_device(args: Any, device: Any) -> Any:
    """Have a Trainer use one device, and return its arguments. Read in transformers 5.23, `training_args.py`.

    Trainer takes the first GPU, and wraps the model in `nn.DataParallel` where it counts several, which TRL refuses.

    Args:
        args: A `transformers.TrainingArguments`.
        device: The torch device that the model is on.
    """
    args._n_gpu = min(args.n_gpu, 1)
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
        args.__dict__["_setup_devices"] = device  # behind `args.device`, a cached property
    return args


def training_arguments(config: Config, precision: Precision, checkpoints: Path, on_cpu: bool) -> dict[str, Any]:
    """Return keyword arguments for a TrainingArguments or a TRL config.

    Logging, tracking and the progress bar are ours (see `lora_exp.training.callbacks`), so the library's are off; so
    is its search for a batch that fits, which changes the batch of a step and goes on with what was half learned (see
    `lora_exp.training.memory`), and its filter that logs a loss that is no number as the average of those before.

    Args:
        config: The run.
        precision: What `bf16` and `fp16` came to.
        checkpoints: The folder of checkpoints.
        on_cpu: Whether the CPU trains; Trainer accepts bf16 there only with `use_cpu`.
    """
    return {
        "dataloader_pin_memory": not on_cpu,
        **config.trainer.model_dump(exclude=config.trainer.own_keys),
        "use_cpu": on_cpu,
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "seed": config.seed,
        "full_determinism": config.deterministic,
        "output_dir": str(checkpoints),
        "report_to": "none",
        "disable_tqdm": True,
        "auto_find_batch_size": False,
        "logging_nan_inf_filter": False,
    }
