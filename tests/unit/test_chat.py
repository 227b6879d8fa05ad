"""The loss of a conversation is on every message of the assistant, and a template that cannot show which is refused.

The templates are those of well-known models, as their tokenizers have them; the masks are made by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.data.conversations import CompletionMessagesRow, MessagesRow
from lora_exp.data.kinds import COMPLETION, PREFERENCE, RowKind
from lora_exp.data.split import Split
from lora_exp.data.template import trl_version, use_template
from lora_exp.data.tokenize import Limits, SplitReport, tokenize_split, tokenize_splits
from lora_exp.errors import UserError
from lora_exp.models.embedded import build_tokenizer
from lora_exp.recipes.sft import with_labels
from tests.rows import answers, assistant, call, openings, says, system, texts, tool, user

Json = dict[str, Any]
ENOUGH = Limits(1_000_000, None, "left")
TRL = Path(trl.__file__).parent / "chat_templates"

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's: ChatML with a system message of its own."""

LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for message in rest %}"
    "{% if message['role'] == 'user' %}{% if loop.last and told is defined %}"
    "{{ '[INST] ' + told + '\n\n' + message['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
"""The instruct models' without tools: what the system says stands in the last message where that is the user's."""

QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% set thought = message.reasoning_content if message.reasoning_content is string else '' %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{% endif %}{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The part that matters here: a thought, if only an empty one, stands in the last answer and in no earlier one."""

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
    "</tool_response>",
)  # fmt: skip

Segments = list[tuple[str, bool]]
"""Pieces of a conversation as a template shows it, and whether they carry the loss."""

TURNS = [user("Where is it?"), assistant("On its way."), user("When?\n"), assistant(" At noon.\nOr later. ")]
CHATML_TURNS: Segments = [
    ("<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n", False),
    ("<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n", False),
    ("On its way.<|im_end|>\n", True),
    ("<|im_start|>user\nWhen?\n<|im_end|>\n<|im_start|>assistant\n", False),
    (" At noon.\nOr later. <|im_end|>\n", True),
]
BY_HAND: dict[str, tuple[str, list[Json], Segments]] = {
    "ChatML": (CHATML, TURNS, CHATML_TURNS),
    "ChatML with a system message": (
        CHATML,
        [system("Be short."), *TURNS[:2]],
        [
            ("<|im_start|>system\nBe short.<|im_end|>\n", False),
            ("<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n", False),
            ("On its way.<|im_end|>\n", True),
        ],
    ),
    "ChatML where the assistant greets and speaks twice": (
        CHATML,
        [system("Greet."), assistant("Hello!"), user("Well?"), assistant("Well,"), assistant("yes.")],
        [
            ("<|im_start|>system\nGreet.<|im_end|>\n<|im_start|>assistant\n", False),
            ("Hello!<|im_end|>\n", True),
            ("<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n", False),
            ("Well,<|im_end|>\n", True),
            ("<|im_start|>assistant\n", False),
            ("yes.<|im_end|>\n", True),
        ],
    ),
    "Llama 3": (
        LLAMA3,
        TURNS,
        [
            ("<s><|start_header_id|>user<|end_header_id|>\n\nWhere is it?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("On its way.<|eot_id|>", True),
            ("<|start_header_id|>user<|end_header_id|>\n\nWhen?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("At noon.\nOr later.<|eot_id|>", True),
        ],
    ),
    "Gemma": (
        GEMMA,
        TURNS,
        [
            ("<s><start_of_turn>user\nWhere is it?<end_of_turn>\n<start_of_turn>model\n", False),
            ("On its way.<end_of_turn>\n", True),
            ("<start_of_turn>user\nWhen?<end_of_turn>\n<start_of_turn>model\n", False),
            ("At noon.\nOr later.<end_of_turn>\n", True),
        ],
    ),
    "Mistral": (
        MISTRAL,
        TURNS,
        [
            ("<s>[INST] Where is it?[/INST]", False),
            (" On its way.</s>", True),
            ("[INST] When?\n[/INST]", False),
            (" At noon.\nOr later.</s>", True),
        ],
    ),
    "Qwen3, one turn": (
        QWEN3,
        TURNS[:2],
        [
            ("<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n", False),
            ("<think>\n\n</think>\n\nOn its way.<|im_end|>\n", True),
        ],
    ),
}
by_hand = pytest.mark.parametrize(("template", "messages", "segments"), BY_HAND.values(), ids=BY_HAND)


def pieces(tokenizer_object: Any) -> Any:
    """Wrap a tokenizer of the tokenizers library, with the special tokens of all templates here."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_object,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL),
        clean_up_tokenization_spaces=False,
    )


def by_byte() -> Any:
    spec = {"special_tokens": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}, "chat_template": None}
    return pieces(build_tokenizer(spec).backend_tokenizer)


LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Llama 3's, Qwen's
BLANKS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's: the last blank before a word stands alone


def by_word(pattern: str) -> Any:
    """Make a tokenizer whose tokens are words and runs of blanks, as byte-pair vocabularies have them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    words = [f"{message['content']}\n\n" for message in TURNS] * 3 + ["user\n\n assistant\n\n\n"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    return pieces(tokenizer)


TOKENIZERS = {"bytes": by_byte, "lines": lambda: by_word(LINES), "blanks": lambda: by_word(BLANKS)}


@pytest.fixture(scope="session", params=["bytes", "lines"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="session", params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def words() -> Any:
    return by_word(LINES)


def encoded(
    row: Json, tokenizer: Any, template: str, kind: RowKind = COMPLETION, limits: Limits = ENOUGH
) -> tuple[Json, SplitReport]:
    """Tokenise one row; return it as the dataset has it."""
    tokenizer.chat_template = template
    dataset, report = tokenize_split([row], kind.answers, tokenizer, limits, True, "a source")
    return (dataset[0] if len(dataset) else {}), report


def labels(row: Json, tokenizer: Any, template: str, limits: Limits = ENOUGH) -> tuple[list[int], list[int]]:
    """Return the ids and the labels that a row is trained on."""
    tokenizer.chat_template = template
    dataset, _ = tokenize_split([row], ("completion",), tokenizer, limits, True, "a source")
    (trained,) = with_labels(dataset)
    return trained["input_ids"], trained["labels"]


def expected(segments: Segments, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Put ids and labels together from pieces, which begin and end where tokens do."""
    parts = [(tokenizer(text, add_special_tokens=False)["input_ids"], scored) for text, scored in segments]
    ids = [token for part, _ in parts for token in part]
    return ids, [token if scored else -100 for part, scored in parts for token in part]


def refusal(row: Json, tokenizer: Any, template: str, kind: RowKind = COMPLETION) -> str:
    with pytest.raises(UserError) as caught:
        encoded(row, tokenizer, template, kind)
    (problem,) = caught.value.problems
    assert problem.where == "a source"
    assert problem.mend
    return f"{problem.what} | {problem.mend}"


# Masks made by hand.


@by_hand
def test_the_loss_is_on_every_message_of_the_assistant_with_its_end(
    tokenizer: Any, template: str, messages: list[Json], segments: Segments
) -> None:
    ids, mask = labels({"messages": messages}, tokenizer, template)
    wanted_ids, wanted = expected(segments, tokenizer)
    text = tokenizer.decode(ids)
    assert text == "".join(piece for piece, _ in segments)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"], "the conversation is tokenised as a whole"
    assert (ids, mask) == (wanted_ids, wanted)


@by_hand
def test_of_a_prompt_the_assistants_messages_carry_no_loss(
    tokenizer: Any, template: str, messages: list[Json], segments: Segments
) -> None:
    row = {"prompt": messages[:-1], "completion": messages[-1:]}
    if messages[-2]["role"] == "assistant":
        return  # no prompt ends so
    last = len(segments) - 1
    only_last = [(text, scored and index == last) for index, (text, scored) in enumerate(segments)]
    assert labels(row, tokenizer, template) == expected(only_last, tokenizer)


def test_tool_calls_carry_the_loss_and_what_tools_say_does_not(tokenizer: Any) -> None:
    template = (TRL / "qwen3_instruct_2507.jinja").read_text(encoding="utf-8")
    messages = [user("Rain?"), assistant("", tool_calls=[call(city="Oslo")]), says("tool", "wet"), assistant("Yes.")]
    asked = {"messages": messages, "tools": [tool()]}
    ids, mask = labels(asked, tokenizer, template)
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1] != -100)
    said = [tokenizer.decode([token for token, _ in run]) for scored, run in runs if scored]
    called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
    assert said == [called, "Yes.<|im_end|>\n"]
    assert '"name": "weather"' in tokenizer.decode(ids[: mask.index(next(each for each in mask if each != -100))])


# Side by side with TRL's assistant_only_loss.

MARKED = (
    "qwen3_training", "llama3_training", "gemma_training", "gemma3_training", "qwen3_instruct_2507_training",
    "phi3_training", "lfm2_2_5",
)  # fmt: skip
"""Templates that mark what the assistant says."""

UNMARKED = ("llama3", "gemma", "gemma3", "qwen3_instruct_2507", "lfm2")
"""Templates for which TRL has a marked version that shows the same text."""


def read(name: str) -> str:
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8")


def trls(messages: list[Json], tokenizer: Any, template: str) -> tuple[list[int], list[int]]:
    """Return the ids and labels of `SFTConfig(assistant_only_loss=True)`."""
    done = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(done["input_ids"], done["assistant_masks"], strict=True)
    return done["input_ids"], [token if scored else -100 for token, scored in pairs]


@pytest.mark.parametrize("name", MARKED)
def test_where_a_template_marks_the_assistant_the_mask_is_trls(any_tokenizer: Any, name: str) -> None:
    assert labels({"messages": TURNS}, any_tokenizer, read(name)) == trls(TURNS, any_tokenizer, read(name))


@pytest.mark.parametrize("name", UNMARKED)
def test_what_is_proved_is_what_trls_version_of_the_template_marks(any_tokenizer: Any, name: str) -> None:
    marked = trls(TURNS, any_tokenizer, read(f"{name}_training"))
    assert labels({"messages": TURNS}, any_tokenizer, read(name)) == marked


def test_a_template_that_marks_too_little_is_refused(words: Any) -> None:
    said = "{{ message['content'] + '<|im_end|>' + '\n' }}"
    marked = f"{{% if loop.last %}}{{% generation %}}{said}{{% endgeneration %}}{{% else %}}{said}{{% endif %}}"
    template = CHATML.replace("+ message['content'] + '<|im_end|>' + '\n' }}", "}}" + marked)
    told = refusal({"messages": TURNS}, words, template)
    assert "messages.1: the chat template marks 1 place as the assistant's, who speaks 2 times" in told
    assert "{% generation %}" in told


NO_END = CHATML.replace("+ '<|im_end|>' ", "")
END_OF_THE_NEXT = (
    "{% for message in messages %}{% if not loop.first %}{{ '<|im_end|>' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|><|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "unended"),
    [(CHATML, 0), (LLAMA3, 0), (GEMMA, 0), (MISTRAL, 0), (NO_END, 1), (END_OF_THE_NEXT, 1)],
    ids=["ChatML", "Llama 3", "Gemma", "Mistral", "none", "before the next message"],
)
def test_rows_whose_answers_no_special_token_ends_are_counted(words: Any, template: str, unended: int) -> None:
    assert encoded({"messages": TURNS}, words, template)[1].unended == unended
    assert encoded({"prompt": "Where?", "completion": "There."}, words, template)[1].unended == unended


# Any conversation.


@settings(max_examples=60)
@given(asked=openings(), told=answers())
def test_every_token_is_the_assistants_or_not(words: Any, asked: list[Json], told: list[Json]) -> None:
    """What is scored, put together, is what the assistant says; the rest is all else."""
    template = read("qwen3_instruct_2507")
    row = MessagesRow.model_validate({"messages": asked + told}).columns()
    for message in row["messages"]:
        message.pop("reasoning_content", None)  # this model does not think
    ids, mask = labels(row, words, template)
    whole = words.apply_chat_template(row["messages"], tokenize=False)
    assert ids == words(whole, add_special_tokens=False)["input_ids"]
    assert (ids, mask) == trls(row["messages"], words, read("qwen3_instruct_2507_training"))


@given(asked=st.lists(texts, min_size=1, max_size=1), told=texts)
def test_a_conversation_of_one_turn_is_the_prompt_and_completion_that_it_is(
    words: Any, asked: list[str], told: str
) -> None:
    whole, _ = encoded({"messages": [user(asked[0]), assistant(told)]}, words, CHATML)
    lists, _ = encoded({"prompt": [user(asked[0])], "completion": [assistant(told)]}, words, CHATML)
    strings, _ = encoded({"prompt": asked[0], "completion": told}, words, CHATML)
    assert whole == lists == strings
    assert "completion_mask" not in whole


@given(asked=openings(), chosen=answers(), rejected=answers())
def test_pairs_of_messages_share_their_prompt_and_are_the_whole_conversations(
    words: Any, asked: list[Json], chosen: list[Json], rejected: list[Json]
) -> None:
    template = read("qwen3_instruct_2507")
    sides = {"chosen": chosen, "rejected": rejected}
    row = {"prompt": asked, **{side: [_unthinking(each) for each in told] for side, told in sides.items()}}
    found, report = encoded(row, words, template, PREFERENCE)
    if not found:
        assert report.dropped == {"with equal answers": 1}
        return
    assert set(found) == {"row", "prompt_ids", "chosen_ids", "rejected_ids"}
    for side in sides:
        whole = words.apply_chat_template(asked + row[side], tokenize=False)
        assert found["prompt_ids"] + found[f"{side}_ids"] == words(whole, add_special_tokens=False)["input_ids"]


def _unthinking(message: Json) -> Json:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


# Templates that cannot be masked exactly.


def test_a_template_that_changes_earlier_answers_is_refused_with_trls_version_of_it(words: Any) -> None:
    told = refusal({"messages": TURNS}, words, read("qwen3"))
    assert told.startswith("row 1: messages.1: the chat template changes this message once more follows")
    assert "data.chat_template_path=pkg://trl.chat_templates/qwen3_training.jinja" in told


def test_without_trls_version_the_mend_is_a_row_for_each_answer(words: Any) -> None:
    assert "give each answer a row of its own" in refusal({"messages": TURNS}, words, QWEN3)
    for turns in (TURNS[:2], TURNS):
        ids, mask = labels({"prompt": turns[:-1], "completion": turns[-1:]}, words, QWEN3)
        said = words.decode([token for token, label in zip(ids, mask, strict=True) if label != -100])
        assert said == f"<think>\n\n</think>\n\n{turns[-1]['content']}<|im_end|>\n"


def test_trls_version_that_is_named_does_what_it_is_named_for(words: Any) -> None:
    named = trl_version(read("qwen3"))
    use_template(words, named)
    assert labels({"messages": TURNS}, words, words.chat_template)[1].count(-100) > 0


@pytest.mark.parametrize("turns", [TURNS[:2], TURNS], ids=["one turn", "two turns"])
def test_a_system_message_that_goes_away_is_refused(words: Any, turns: list[Json]) -> None:
    """Mistral's template shows it before an answer is there, and not any more afterwards."""
    for row in (
        {"messages": [system("Be short."), *turns]},
        {"prompt": [system("x"), turns[0]], "completion": turns[1:2]},
    ):
        assert ".0: the chat template leaves out what the system says" in refusal(row, words, MISTRAL)


def test_what_the_template_itself_refuses_is_told_in_its_words(words: Any) -> None:
    told = refusal({"messages": [system("Be short."), *TURNS]}, words, GEMMA)
    assert "the chat template refuses it: System role not supported" in told
    told = refusal({"messages": [*TURNS, *TURNS[1:2]]}, words, GEMMA)
    assert "Conversation roles must alternate" in told


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": TURNS, "tools": [tool()]}, "tools.0: the chat template leaves out the tools"),
        (
            {"messages": [TURNS[0], assistant("", tool_calls=[call()]), says("tool", "x"), TURNS[1]]},
            "messages.1.tool_calls: the chat template leaves out the assistant's tool_calls",
        ),
        (
            {"prompt": TURNS[:1], "completion": [assistant("Yes.", reasoning_content="It said so.")]},
            "completion.0.reasoning_content: the chat template leaves out the assistant's reasoning_content",
        ),
    ],
    ids=["tools", "calls", "thoughts"],
)
def test_a_part_of_a_row_that_the_template_leaves_out_is_told(words: Any, row: Json, what: str) -> None:
    assert what in refusal(row, words, CHATML)


def test_a_thought_that_the_template_cuts_out_of_an_answer_is_told(words: Any) -> None:
    template = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
    row = {"prompt": TURNS[:1], "completion": [assistant("<think>Hm.</think>Yes.")]}
    assert "completion.0.content: the chat template leaves out the assistant's content" in refusal(row, words, template)


def test_a_system_message_that_is_a_setting_is_not_left_out(words: Any) -> None:
    template = CHATML.replace("{% for", "{{ 'brief\n' if '/brief' in messages[0]['content'] }}{% for", 1)
    template = template.replace("message['content'] +", "message['content'].replace('/brief', '') +")
    ids, _ = labels({"messages": [system("/brief"), *TURNS]}, words, template)
    assert words.decode(ids).startswith("brief\n<|im_start|>system\n<|im_end|>")


def test_a_token_across_the_end_of_a_message_is_refused(words: Any) -> None:
    """A template of plain words, in a vocabulary where the end of a message and the next one's beginning merge."""
    template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    row = {"messages": [user("a"), assistant("b"), user("\n\nc"), assistant("d")]}
    assert "messages.1: a token reaches across the end of this message" in refusal(row, words, template)


def test_rows_with_the_same_trouble_are_told_once(words: Any) -> None:
    words.chat_template = GEMMA
    bad = {"messages": [system("Be short."), *TURNS]}
    good = {"messages": TURNS}
    with pytest.raises(UserError) as caught:
        tokenize_split([good, bad, bad, good, bad], ("completion",), words, ENOUGH, True, "a source")
    (problem,) = caught.value.problems
    assert problem.what.startswith("row 2 and 2 others: messages: ")


def test_the_troubles_of_all_splits_are_told_at_once(words: Any) -> None:
    words.chat_template = GEMMA
    bad = {"messages": [system("Be short."), *TURNS]}
    splits = {name: Split([bad], name, "messages") for name in ("train", "val")}
    with pytest.raises(UserError) as caught:
        tokenize_splits(splits, ("completion",), words, dict.fromkeys(splits, ENOUGH), "auto")
    assert [problem.where for problem in caught.value.problems] == ["train", "val"]


@pytest.mark.parametrize(
    ("setting", "template", "said"),
    [("auto", None, "the tokenizer has no chat template"), (False, CHATML, "data.chat_template=false")],
    ids=["none", "off"],
)
def test_messages_without_a_template_are_refused(words: Any, setting: Any, template: str | None, said: str) -> None:
    words.chat_template = template
    with pytest.raises(UserError) as caught:
        tokenize_splits(
            {"train": Split([{"messages": TURNS}], "a source")}, ("completion",), words, {"train": ENOUGH}, setting
        )
    (problem,) = caught.value.problems
    assert said in problem.what
    assert "data.chat_template" in problem.mend


# Limits.


@given(limit=st.integers(2, 90), prompt_limit=st.none() | st.integers(1, 60), side=st.sampled_from(["left", "right"]))
def test_a_cut_conversation_is_the_beginning_of_the_whole_one(
    words: Any, limit: int, prompt_limit: int | None, side: Any
) -> None:
    whole, _ = encoded({"messages": TURNS}, words, CHATML)
    limits = Limits(limit, None if prompt_limit is None else min(prompt_limit, limit - 1), side)
    cut, report = encoded({"messages": TURNS}, words, CHATML, limits=limits)
    if not cut:
        assert report.dropped == {"answer cut away": 1}
        return
    length = len(cut["completion_ids"])
    assert len(cut["prompt_ids"]) + length <= limit
    assert cut["completion_ids"] == whole["completion_ids"][:length]
    mask = cut.get("completion_mask", [1] * length)
    assert mask == whole["completion_mask"][:length]
    assert mask[-1] == 1, "nothing follows the last token that is learned from"
    lost = sum(whole["completion_mask"]) - sum(mask)
    assert (report.cut_answers, report.cut_answer_tokens) == (lost > 0, lost)
    assert report.answer_lengths == [sum(mask)]
    room = limit - len(cut["prompt_ids"])
    assert sum(mask) == sum(whole["completion_mask"][:room]), "no more is cut than has to be"


def test_what_comes_before_the_first_answer_is_the_prompt(words: Any) -> None:
    long = {"messages": [system("Be short. " * 20), *TURNS]}
    cut, report = encoded(long, words, CHATML, limits=Limits(1000, 10, "left"))
    assert len(cut["prompt_ids"]) == 10
    assert words.decode(cut["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert report.cut_prompts == 1


# Another template.


def test_a_template_in_a_file_takes_the_place_of_the_tokenizers(words: Any, tmp_path: Path) -> None:
    words.chat_template = CHATML
    use_template(words, None)
    assert words.chat_template == CHATML
    (tmp_path / "mine.jinja").write_text(GEMMA)
    use_template(words, str(tmp_path / "mine.jinja"))
    assert words.chat_template == GEMMA
    use_template(words, "pkg://trl.chat_templates/llama3.jinja")
    assert words.chat_template == read("llama3")


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("mine.jinja", None, "mine.jinja: No such file or directory"),
        ("mine.jinja", b"\xff", "mine.jinja: it is not UTF-8"),
        ("mine.jinja", b"\n{% for %}", "mine.jinja:2: "),
        ("pkg://no_such_package/mine.jinja", None, "there is no package no_such_package"),
        ("pkg://trl.chat_templates/nobody.jinja", None, "No such file"),
    ],
    ids=["missing", "not UTF-8", "no template", "no package", "not in the package"],
)
def test_a_file_that_is_no_template_is_told(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, content: bytes | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / path).write_bytes(content)
    with pytest.raises(UserError) as caught:
        use_template(words, path)
    assert said in str(caught.value)


def test_the_column_type_is_one_for_all_messages() -> None:
    row = {"prompt": TURNS[:1], "completion": TURNS[1:2]}
    assert CompletionMessagesRow.model_validate(row).columns() == row


Make = Callable[..., Json]
