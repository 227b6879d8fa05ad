"""TRL alone, as its own examples use it: a trainer, a PEFT config, nothing of this project but the token ids."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.case import BATCH, LORA, Case, parse
from benchmarks.measure import train_and_report
from lora_exp.recipes.sft import with_labels
from tests.runs import tokenized


class _Tokenized(DPOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def main() -> None:
    """Train one case and report."""
    case = parse()
    with tempfile.TemporaryDirectory() as folder:
        config, data, files = tokenized(case.overrides(Path(folder)))
        common: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": BATCH,
            "max_steps": case.steps + 1,
            "bf16": case.dtype == "bfloat16",
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "learning_rate": config.trainer.learning_rate,
            "lr_scheduler_type": config.trainer.lr_scheduler_type,
            "warmup_steps": config.trainer.warmup_steps,
            "max_length": case.max_length,
            "logging_steps": 1,
            "seed": config.seed,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        set_seed(config.seed)
        model = AutoModelForCausalLM.from_pretrained(
            files, dtype=case.dtype, quantization_config=_quantization(case), device_map={"": _device()}
        )
        tokenizer = AutoTokenizer.from_pretrained(files)
        lora = LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = TRAINERS[case.recipe](
            case, common, data.datasets["train"], model=model, processing_class=tokenizer, peft_config=lora
        )
        train_and_report(trainer, model.device)


def _dpo(case: Case, common: dict[str, Any], rows: Any, **parts: Any) -> Any:
    beta = {} if case.beta is None else {"beta": case.beta}
    args = DPOConfig(**common, **beta, precompute_ref_log_probs=case.reference == "precomputed")
    return _Tokenized(args=args, train_dataset=rows, **parts)


def _sft(_: Case, common: dict[str, Any], rows: Any, **parts: Any) -> Any:
    args = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(args=args, train_dataset=with_labels(rows), **parts)


TRAINERS = {"dpo": _dpo, "sft": _sft}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _quantization(case: Case) -> BitsAndBytesConfig | None:
    if case.quant == "none":
        return None
    if case.quant == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, case.dtype),
    )


if __name__ == "__main__":
    main()
