"""A model and a byte-level tokenizer made from a few lines of YAML and a seed: no file, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def build(embedded: dict[str, Any], folder: Path) -> None:
    """Write model, config and tokenizer to `folder`, as `save_pretrained` would have.

    Args:
        embedded: `seed`, `config` (the fields of the transformers config, with `model_type`), and `tokenizer`
            (`special_tokens` by role, `chat_template`). The vocabulary is the 256 bytes, then the specials.
        folder: An empty folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer(embedded["tokenizer"])
    fields = dict(embedded["config"])
    config = AutoConfig.for_model(
        fields.pop("model_type"),
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(embedded["seed"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer(spec: dict[str, Any]) -> Any:
    """Return a tokenizer with one token a byte, plus the special tokens of `spec`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in spec["special_tokens"].values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=spec["chat_template"],
        clean_up_tokenization_spaces=False,
        **spec["special_tokens"],
    )
