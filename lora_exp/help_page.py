"""The text of `--help`, made from the option files: their first comment line is their description."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = """\
  python -m lora_exp                                             SFT, embedded model, sample rows
  python -m lora_exp recipe=dpo quant=8bit                       DPO on an 8-bit base
  python -m lora_exp recipe=dpo model.adapter=outputs/<SFT run>  DPO on top of an SFT adapter
  python -m lora_exp data=splits data.splits_dir=my_rows model=qwen3_0_6b trainer.max_steps=200
  python -m lora_exp -m recipe=dpo recipe.beta=0.05,0.1,0.5      one trial for each beta
  python -m lora_exp -m experiment=beta_grid sweep.name=betas    a sweep kept as a file; again: it goes on
"""
KEYS = """\
  recipe.*    conf/recipe/*.yaml; TRL's names (trl.SFTConfig, trl.DPOConfig)
  model.*     conf/model/base.yaml
  quant.*     conf/quant/*.yaml; transformers.BitsAndBytesConfig
  lora.*      conf/lora/lora.yaml; peft.LoraConfig
  data.*      conf/data/*.yaml; rows: SCHEMA.md
  trainer.*   conf/trainer/default.yaml; transformers.TrainingArguments
  engine.*    conf/engine/*.yaml
  tracker.*   conf/tracker/*.yaml
  the rest    conf/config.yaml
"""
FLAGS = """\
  -m, --multirun        one job for each combination of comma-separated values
  --cfg job [--resolve] print the composed config and stop
  --config-dir DIR      a folder of your own YAML files, searched beside conf/
  --hydra-help          Hydra's own flags
"""


def help_page(conf: Path) -> str:
    """Return the help text: groups with their options, examples, and where each kind of key is documented.

    Args:
        conf: The folder of the configs.
    """
    groups = [folder for folder in sorted(conf.iterdir()) if folder.is_dir() and folder.name != "hydra"]
    order = ["recipe", "model", "quant", "lora", "data", "trainer", "engine", "tracker", "experiment"]
    groups.sort(key=lambda folder: order.index(folder.name) if folder.name in order else len(order))
    choices = "\n".join(_group(folder) for folder in groups)
    text = (
        "LoRA fine-tuning, composed: python -m lora_exp [group=option ...] [key=value ...]\n\n"
        f"Groups and their options:\n{choices}\n"
        f"Examples:\n{EXAMPLES}\nKeys, and where each is documented (conf lies in {conf}):\n{KEYS}\n"
        f"Flags:\n{FLAGS}\n"
        "A field that is not listed is added with a plus (+trainer.adam_beta2=0.98); null and false unset things.\n"
    )
    return text.replace("$", "$$")  # Hydra substitutes in it


def _group(folder: Path) -> str:
    lines = [f"  {folder.name}="]
    for option in sorted(folder.glob("*.yaml"), key=lambda path: path.stem):
        if option.stem != "base":
            lines.append(f"    {option.stem:<13} {_description(option)}")
    return "\n".join(lines) + "\n"


def _description(option: Path) -> str:
    """Return the first comment line that is no Hydra directive."""
    lines = option.read_text(encoding="utf-8").splitlines()
    comments = (line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return next((line for line in comments if not line.startswith("@package")), "")
