"""Every case of the support table really trains, or is refused with the message that the table shows."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_exp.errors import UserError
from tests.few import SMALL, pairs, write_rows
from tests.runs import Finished, FinishedRun
from tests.support import CASES, DTYPES, QUANTS, VARIANTS, Case

SHORT = [
    "data=splits", "data.chat_template=false", "trainer.max_steps=2", "trainer.logging_steps=1",
    "trainer.eval_strategy=no", "trainer.save_strategy=no", "samples.num_prompts=0", "engine.num_threads=1",
    "model.embedded.config.num_hidden_layers=1", *SMALL,
]  # fmt: skip


AFTER_LOADING = "parameters train"
"""In a line that a run prints once its weights are loaded."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_rows(tmp_path_factory.mktemp("rows"), pairs(13))


def run(case: Case, finished: Finished, rows: list[str]) -> FinishedRun:
    if case.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device: not run")
    return finished(*case.overrides, *SHORT, *rows)


@pytest.mark.parametrize("case", [*CASES, *VARIANTS], ids=str)
def test_a_case_does_what_the_table_says(
    case: Case, finished: Finished, rows: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if case.declined is not None:
        with pytest.raises(UserError) as caught:
            run(case, finished, rows)
        assert case.declined in str(caught.value)
        assert AFTER_LOADING not in capsys.readouterr().out
        return
    done = run(case, finished, rows)
    assert AFTER_LOADING in capsys.readouterr().out
    facts = done.results.run
    assert facts["status"] == "finished"
    # A fallback would be another engine, another dtype or another device.
    assert (facts["engine"], facts["dtype"], facts["device"]["type"]) == (case.engine, case.dtype, case.device)
    assert [line["step"] for line in done.results.steps if line.get("grad_norm", 0) > 0] == [1, 2]
    changed = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in changed.items() if "lora_B" in name)


def test_every_quantisation_and_dtype_is_another_base(finished: Finished, rows: list[str]) -> None:
    """Otherwise a case could be trained on the weights of another one."""
    cases = [Case("sft", quant, "packed", dtype, "cpu") for quant in QUANTS for dtype in DTYPES[:2]]
    digests = {str(case): run(case, finished, rows).results.run["base"]["xxh3"] for case in cases}
    assert len(set(digests.values())) == len(cases), digests


def test_every_kind_of_adapter_is_itself(finished: Finished, rows: list[str]) -> None:
    flags = {"lora": (False, False), "rslora": (False, True), "dora": (True, False), "pissa": (False, False)}
    references = {}
    for lora, expected in flags.items():
        done = run(Case("dpo", "none", "packed", "float32", "cpu", lora), finished, rows)
        saved = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
        assert (saved["use_dora"], saved["use_rslora"]) == expected
        references[lora] = done.results.run["reference"]["model"]
    # PiSSA alone writes into the base, so that its reference is the start adapter.
    assert {lora for lora, reference in references.items() if reference == "start adapter"} == {"pissa"}
