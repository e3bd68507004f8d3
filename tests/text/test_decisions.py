"""Prompts and labels of decisions: transformers' prompt ids, and the parts that prompts share."""

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.decision import DecisionConfig
from transformers.decision.template_utils import DECISION_PROMPT, parse_questions
from transformers.utils.chat_template_utils import _compile_jinja_template

from model.weights.source import default_model_path
from serve.server.model_files import local_tokenizer
from serve.text.chat import ChatFormat, PromptError
from serve.text.decisions import encoder as encoder_module
from serve.text.decisions import plan as plan_module
from serve.text.decisions.encoder import MARK, SPLIT, PromptEncoder
from serve.text.decisions.plan import DecisionFormat, option_orders
from serve.text.decisions.prompts import DecisionSettings, QuestionView, SettingsError, default_prompt, read_settings
from serve.text.decisions.questions import ScoringOptions, decision_request, typesafe_questions
from serve.text.gguf_tokenizer import tokenizer_from_gguf
from serve.text.tokenizer import Tokenizer
from tests.support.decisions import golden_cases, golden_request
from tests.support.texts import texts
from tests.text.test_gguf_families import GOLDEN, metadata_of

ROOM = 4096  # tokens of a prompt
# Templates in the form of each family's own, and the tokens that start and end a text.
TEMPLATES = {
    "gemma3": (
        (
            "{{ bos_token }}{% for m in messages %}<start_of_turn>"
            "{{ m.role }}\n{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
        ),
        "<bos>",
    ),
    "llama3_1": (
        (
            "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
            "+ '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        "",
    ),
    "qwen3": (
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
        ),
        "",
    ),
    "mistral": (
        (
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
        ),
        "<s>",
    ),
}
FAMILIES = ("default", *TEMPLATES)


@cache
def tokenizer_of(family: str) -> Tokenizer:
    """The default model's tokenizer, or the part of a family's that its golden texts need, with a chat template."""
    if family == "default":
        return local_tokenizer(default_model_path())
    template, bos = TEMPLATES[family]
    tokenizer = tokenizer_from_gguf(metadata_of(GOLDEN[family]))
    tokenizer.chat_template = template
    tokenizer.special_tokens = {"bos_token": bos} if bos else {}
    return tokenizer


def format_of(family: str = "default", settings: DecisionSettings | None = None) -> DecisionFormat:
    return DecisionFormat(ChatFormat(tokenizer_of(family)), settings)


@cache
def transformers_tokenizer(family: str) -> Any:
    """The same tokenizer in transformers, with the tokens that its decision pipeline adds.

    Not to a family's, whose ids they would share, as only a part of its vocabulary is there.
    """
    tokenizer = tokenizer_of(family)
    backend = Backend.from_str(tokenizer._backend.to_str())
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=tokenizer.chat_template, **tokenizer.special_tokens
    )
    if family == "default":
        theirs.add_tokens([AddedToken(token, special=True, normalized=False) for token in (MARK, SPLIT)])
    return theirs


def transformers_ids(family: str, state: Any, questions: dict[str, Any]) -> list[list[int]]:
    """Prompt ids as `prepare_inputs` of transformers makes them, which needs torch."""
    tokenizer, template = transformers_tokenizer(family), _compile_jinja_template(DECISION_PROMPT)
    dropped = tokenizer.convert_tokens_to_ids([MARK, SPLIT]) if family == "default" else []
    prompts = []
    for question in parse_questions(questions, DecisionConfig()):
        chat = [{"role": "user", "content": template.render(state=state, question=question)}]
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        ids = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, **options)
        prompts.append([token_id for token_id in ids if token_id not in dropped])
    return prompts


def prompt_ids(family: str, state: Any, questions: dict[str, Any]) -> tuple[list[list[int]], int]:
    """Our prompt ids, whatever the labels' tokens are, and the number of ids that all prompts share."""
    tokenizer = tokenizer_of(family)
    encoder = PromptEncoder(tokenizer, tokenizer.chat_template)
    prompts = format_of(family)
    prompts._encoder = encoder
    items = [item for question in typesafe_questions(questions) for item in prompts._views(question, ScoringOptions())]
    request = decision_request({"state": state, "questions": questions})
    encoded = prompts._encode(request, [(item, default_prompt(item)) for item in items], ROOM)
    return [prompt.token_ids for prompt in encoded], min(len(prompt.shared) for prompt in encoded)


@pytest.mark.parametrize("case", golden_cases("smollm2-decisions-f32"))
def test_prompt_ids_are_those_of_transformers(case: dict[str, Any]) -> None:
    plan = format_of().plan(golden_request(case), ScoringOptions(), ROOM)
    ids = [readout.prompt.token_ids for question in plan.questions for readout in question.readouts]
    assert ids == case["prompt_token_ids"]


def random_questions(draw: random.Random, controls: list[str]) -> dict[str, Any]:
    questions = dict[str, Any]()
    for i in range(draw.randint(1, 4)):
        pieces = (
            "What is it?",
            "  lead",
            "\nline",
            f'Is "{draw.choice(controls)}" ok?',
            draw.choice(texts()),
            {"a": 1},
        )
        asked = {"instructions": draw.choice(pieces)}
        criteria: tuple[dict[str, Any], ...] = (
            {"type": "noul", "criteria": draw.choice((None, {"true": "spam"}, {"true": {"z": 1}, "false": "not"}))},
            {"type": "choice", "criteria": {"a b": None, f"x{draw.choice(texts())}": "d", "True": ["z", None]}},
            {"type": "score", "criteria": ["low", {"m": "é"}, "high"]},
        )
        questions[f"q{i}"] = asked | draw.choice(criteria)
    return questions


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_do_not_change_prompt_ids(family: str) -> None:
    """States of random texts, with control tokens in strings and keys, next to questions of all types."""
    draw = random.Random(7)
    controls = [*tokenizer_of(family).added_tokens()][:300]
    if family == "default":
        controls += [MARK, SPLIT]
    seams = ("   ", "\n", "\n\n\n", "123456789", "😊", "a" * 40, "\t", " x", "}", ".")
    num_shared = 0
    for _ in range(60):
        pieces = [draw.choice((*draw.sample(texts(), 3), draw.choice(seams))) for _ in range(draw.randint(1, 10))]
        pieces += draw.choice(([], [draw.choice(controls), "later"], [draw.choice(seams)]))
        state: Any = draw.choice((" ", "")).join(pieces) or "x"
        if draw.random() < 0.2:
            state = {f"key {draw.choice(controls)}": state, "n": [1, None, {"x": state[:30]}]}
        questions = random_questions(draw, controls)
        if isinstance(state, str) and not state.strip():
            continue
        try:
            expected = transformers_ids(family, state, questions)
        except ValueError:  # a control token that is made from plain text, too
            with pytest.raises(PromptError, match="cannot be encoded as text"):
                prompt_ids(family, state, questions)
            continue
        ids, shared = prompt_ids(family, state, questions)
        assert ids == expected, (state, questions)
        num_shared += len(questions) > 1 and shared > 0
    assert num_shared > 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", ["", " ", "   ", "\n", "\n\n", "7", "12345", "😊", "👩‍🚀", "é", "\t", "}", "{mark}"])
def test_state_of_any_end_is_encoded_once(family: str, end: str) -> None:
    control = next(iter(tokenizer_of(family).added_tokens()))
    state = "The lamp works, though the box was wet. " * 8 + "Fine" + end.replace("{mark}", control)
    questions = {
        f"q{i}": {"type": "noul", "instructions": text} for i, text in enumerate(("Is it?", " Is it?", "\n1?"))
    }
    ids, shared = prompt_ids(family, state, questions)
    assert ids == transformers_ids(family, state, questions)
    assert shared > len(ids[0]) / 2


@pytest.mark.parametrize("case", golden_cases("smollm2-decisions-f32"))
def test_default_prompt_is_that_of_transformers(case: dict[str, Any]) -> None:
    template = _compile_jinja_template(DECISION_PROMPT)
    draw = random.Random(len(str(case)))
    for values in (case["request"]["questions"], *(random_questions(draw, ["x"]) for _ in range(20))):
        questions = typesafe_questions(values)
        for labels in (None, [chr(ord("Q") + i) for i in range(5)]):
            config = DecisionConfig(labels={} if labels is None else dict.fromkeys(("noul", "choice", "score"), labels))
            for question, theirs in zip(questions, parse_questions(values, config), strict=True):
                view = QuestionView(question, tuple(range(len(question.options))), tuple(theirs.labels))
                assert default_prompt(view) == template.render(state="", question=theirs)


def test_options_of_equal_text_are_shown_as_json() -> None:
    body = {
        "input": "x",
        "questions": [{"type": "choice", "instructions": "", "choices": [{"value": v} for v in VALUES]}],
    }
    [question] = decision_request(body).questions
    assert QuestionView(question, (0, 1, 2), None).option_texts == ['"true"', "true", "false"]
    assert [option.value for option in question.options] == VALUES


VALUES: list[str | bool] = ["true", True, False]


def labels_of(prompts: DecisionFormat, question: dict[str, Any]) -> list[tuple[str, ...]]:
    plan = prompts.plan(decision_request({"state": "Hi", "questions": {"q": question}}), ScoringOptions(), ROOM)
    return [*plan.questions[0].readouts[0].labels]


def choice(count: int, **labels: Any) -> dict[str, Any]:
    return {"type": "choice", "criteria": {f"option {i}": None for i in range(count)}, "labels": labels or None}


def test_labels() -> None:
    prompts = format_of()
    assert labels_of(prompts, choice(3)) == [("A",), ("B",), ("C",)]
    many = labels_of(prompts, choice(255))
    assert many[:3] == [("AA",), ("AB",), ("AC",)]
    assert len({*many}) == 255
    groups = choice(2, **{"option 0": ["yes", "Yes", " Yes"], "option 1": "no"})
    assert labels_of(prompts, groups) == [("yes", "Yes", " Yes"), ("no",)]


def test_labels_show_the_first_of_a_group() -> None:
    request = decision_request({"state": "Hi", "questions": {"q": choice(2, **{"option 0": [" yes", "Yes"]})}})
    [question] = format_of().plan(request, ScoringOptions(), ROOM).questions
    text = tokenizer_of("default").decode(question.readouts[0].prompt.token_ids, skip_special_tokens=False)
    assert "\nyes. option 0\nB. option 1\nAnswer with the label of the option" in text


def test_prompts_that_share_nothing_are_encoded_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of one pre-token cannot be cut, so each order encodes it again."""
    encoded: list[int] = []
    encode_batch = Tokenizer.encode_batch

    def counted(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        encoded.append(sum(map(len, texts)))
        return encode_batch(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    monkeypatch.setattr(encoder_module, "_BATCH", 20_000)
    monkeypatch.setattr(plan_module, "_MAX_UNSHARED_TOKENS", 30_000)
    five = {"type": "choice", "criteria": dict.fromkeys("abcde")}
    options = ScoringOptions(scoring="permutations")
    body = {"state": "xyz" * 1000, "questions": {f"q{i}": five for i in range(20)}}
    with pytest.raises(PromptError, match=r"have more than 30000 tokens that they do not share") as caught:
        format_of().plan(decision_request(body, "requests[0]"), options, ROOM)
    assert (caught.value.param, caught.value.code) == ("requests[0].questions", "array_above_max_length")
    assert max(encoded) < 30_000  # characters at a time
    assert sum(encoded) < 300_000  # of 7 million
    words = {"state": "xyz " * 500, "questions": {"q": five}}
    [plan] = format_of().plan(decision_request(words), options, ROOM).questions  # 120 orders share this state
    assert sum(len(readout.prompt.tail) for readout in plan.readouts) < 120 * 60


@pytest.mark.parametrize("text", ["It works, though the box was wet. " * 20, "x" * 300])
def test_batches_do_not_change_prompts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = {
        f"q{i}": {"type": "choice", "instructions": f"{i % 3}?", "criteria": dict.fromkeys("abcdefghijklmn"[: i + 2])}
        for i in range(12)
    }
    ids, _ = prompt_ids("default", text, questions)
    monkeypatch.setattr(encoder_module, "_BATCH", 1000)
    assert prompt_ids("default", text, questions)[0] == ids == transformers_ids("default", text, questions)


@pytest.mark.parametrize("normalize", ["sum", "token", "byte", "pmi"])
@pytest.mark.parametrize(
    "question",
    [
        {"type": "choice", "criteria": {"": "nothing", "a": None}},
        {"type": "choice", "criteria": {"": None, "a": None}},
        {"type": "choice", "criteria": {"\U000f0000": None, "a": None}},
        {"type": "score", "criteria": ["", "a"]},
    ],
)
def test_option_without_text_is_no_sequence(question: Any, normalize: Any) -> None:
    plain = local_tokenizer(default_model_path())
    plain.chat_template = None
    request = decision_request({"state": "x", "questions": {"q": question}})
    for prompts in (format_of(), DecisionFormat(ChatFormat(plain))):
        with pytest.raises(PromptError, match=r"Question 'q' .* an option without text") as caught:
            prompts.plan(request, ScoringOptions(scoring="sequences", normalize=normalize), ROOM)
        assert caught.value.param == "questions.q"


@pytest.mark.parametrize(
    "question", [choice(2, **{"option 0": "x"}), {"type": "noul", "instructions": "?", "labels": {"true": "Y"}}]
)
def test_labels_have_no_place_in_sequences(question: Any) -> None:
    request = decision_request({"state": "x", "questions": {"q": question}})
    with pytest.raises(PromptError, match="labels or permutations, not sequences") as caught:
        format_of().plan(request, ScoringOptions(scoring="sequences"), ROOM)
    assert caught.value.param == "questions.q.labels"


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ({"option 0": "A", "option 1": "A"}, "'A', 'A'"),  # not distinct
        ({"option 0": "nonsensical"}, "'nonsensical'"),  # several tokens
        ({"option 0": "<|im_end|>"}, "'<|im_end|>'"),  # a control token
        ({"option 0": "B"}, "'B', 'B'"),  # the default label of the other option
        ({"option 0": ["yes", "no!"]}, "'no!'"),
    ],
)
def test_labels_that_are_not_one_distinct_token_are_refused(labels: dict[str, Any], wrong: str) -> None:
    with pytest.raises(PromptError, match=r"Question 'q' .* the labels ") as caught:
        labels_of(format_of(), choice(2, **labels))
    assert str(caught.value).endswith(f"the labels {wrong} are not one distinct token each after this prompt.")
    assert caught.value.param == "questions.q"


def test_labels_in_context() -> None:
    """A label that would merge with the end of the prompt is no token of its own there."""
    encoder = PromptEncoder(tokenizer_of("default"), None)
    assert encoder.label_id("\nAnswer:", " A") is not None
    assert encoder.label_id("\nAnswer: ", "A") is None  # the space would belong to it


def test_answer_in_harmony_follows_its_header() -> None:
    tokenizer = local_tokenizer(default_model_path())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    body = {"state": "x", "questions": {"q": choice(2)}}
    prompts = DecisionFormat(ChatFormat(tokenizer))
    [question] = prompts.plan(decision_request(body), ScoringOptions(), ROOM).questions
    text = tokenizer.decode(question.readouts[0].prompt.token_ids, skip_special_tokens=False)
    assert text.endswith("<|im_end|>assistant<|channel|>final<|message|>")


def test_model_without_chat_template() -> None:
    tokenizer = local_tokenizer(default_model_path())
    tokenizer.chat_template = None
    prompts = DecisionFormat(ChatFormat(tokenizer))
    body = {"state": "It works.", "questions": {"q": choice(2)}}
    [question] = prompts.plan(decision_request(body), ScoringOptions(), ROOM).questions
    [readout] = question.readouts
    assert tokenizer.decode(readout.prompt.token_ids, skip_special_tokens=False) == (
        "It works.\n\nA. option 0\nB. option 1\n"
        "Answer with the letter of the option that fits best (A to B) only.\n\nAnswer:"
    )
    assert readout.labels == ((" A",), (" B",))
    [question] = prompts.plan(decision_request(body), ScoringOptions(scoring="sequences"), ROOM).questions
    assert question.sequences is not None
    assert question.sequences.end_of_turn is None
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in question.sequences.sequences] == [
        " option 0",
        " option 1",
    ]


def test_sequences_end_with_the_turn() -> None:
    body = {"state": "It works.", "questions": {"q": choice(2), "n": {"type": "noul", "instructions": "Good?"}}}
    plans = format_of().plan(decision_request(body), ScoringOptions(scoring="sequences"), ROOM).questions
    tokenizer = tokenizer_of("default")
    readouts = [plan.sequences for plan in plans if plan.sequences is not None]
    decoded = [[tokenizer.decode(ids, skip_special_tokens=False) for ids in r.sequences] for r in readouts]
    assert decoded == [["option 0<|im_end|>", "option 1<|im_end|>"], ["Yes<|im_end|>", "No<|im_end|>"]]
    prompts = [tokenizer.decode(r.prompt.token_ids, skip_special_tokens=False) for r in readouts]
    assert "\n\n- option 0\n- option 1\nAnswer with the text of the option that fits best only.<|im_end|>" in prompts[0]
    assert "\n\nGood?\nAnswer Yes or No only.<|im_end|>" in prompts[1]
    assert [r.encoded_apart for r in readouts] == [(False, False)] * 2


def test_option_that_changes_the_prompt_is_encoded_apart() -> None:
    tokenizer = local_tokenizer(default_model_path())
    tokenizer.chat_template = "{{ messages[0].content }}\nThe answer is: {{ '' }}"  # ends with a space
    body = {"state": "x", "questions": {"q": {"type": "choice", "criteria": {"yes": None, "!": None}}}}
    [plan] = (
        DecisionFormat(ChatFormat(tokenizer))
        .plan(decision_request(body), ScoringOptions(scoring="sequences"), ROOM)
        .questions
    )
    assert plan.sequences is not None
    assert plan.sequences.encoded_apart == (True, True)
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in plan.sequences.sequences] == ["yes", "!"]


def test_control_token_in_an_option_is_text() -> None:
    body = {"state": "x", "questions": {"q": {"type": "choice", "criteria": {"a<|im_end|>b": None, "c": None}}}}
    [plan] = format_of().plan(decision_request(body), ScoringOptions(scoring="sequences"), ROOM).questions
    assert plan.sequences is not None
    end = tokenizer_of("default").encode("<|im_end|>", add_special_tokens=False)
    assert [plan.sequences.sequences[i].count(end[0]) for i in range(2)] == [1, 1]
    assert plan.sequences.prompt.token_ids.count(end[0]) == 2  # of the template


def test_option_orders() -> None:
    assert option_orders(3, 6)[:3] == ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    assert sorted(option_orders(3, 99)) == sorted({*option_orders(3, 99)})
    assert len(option_orders(3, 99)) == 6
    assert option_orders(7, 9) == option_orders(7, 12)[:9]
    assert option_orders(7, 9)[7:] == ((3, 5, 2, 4, 1, 6, 0), (5, 0, 1, 4, 2, 6, 3))  # the seed is fixed
    assert option_orders(2, 1) == ((0, 1),)


def test_permutations_move_options_under_the_labels() -> None:
    options = ScoringOptions(scoring="permutations", permutations=2)
    body = {"state": "x", "questions": {"c": choice(2), "n": {"type": "noul", "instructions": "Good?"}}}
    plans = format_of().plan(decision_request(body), options, ROOM).questions
    decoded = [
        [tokenizer_of("default").decode(r.prompt.token_ids, skip_special_tokens=False) for r in plan.readouts]
        for plan in plans
    ]
    assert "\nA. option 1\nB. option 0\n" in decoded[0][1]
    assert [readout.labels for readout in plans[0].readouts] == [(("A",), ("B",)), (("B",), ("A",))]
    assert "Answer No or Yes only." in decoded[1][1]  # these labels belong to their options
    assert [readout.labels for readout in plans[1].readouts] == [(("Yes",), ("No",))] * 2


def settings_folder(folder: Path, config: Any = None, template: str | None = None) -> Path:
    if config is not None:
        (folder / "decision.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "decision_template.jinja").write_text(template)
    return folder


def test_settings_of_a_folder(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == DecisionSettings()
    values = {"labels": {"choice": ["1", "2"]}, "temperature": {"noul": 2}, "noul_options": ["false", "true"]}
    folder = settings_folder(tmp_path, {**values, "sanitize_control_tokens": False, "later": 1}, "{{ state }}")
    assert read_settings(folder) == DecisionSettings(
        labels={"choice": ["1", "2"]},
        temperature={"noul": 2.0},
        template="{{ state }}",
        noul_order=(1, 0),
        sanitize=False,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adapter": "lora"}, "decision.json: `adapter`"),
        ({"temperature": {"noul": 0}}, "decision.json: `temperature`"),
        ({"labels": {"noul": "Yes"}}, "decision.json: "),
        ({"noul_options": ["yes", "no"]}, "decision.json: "),
        ([], "decision.json: "),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(settings_folder(tmp_path, config))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for q in questions %}{{ q.name }}{% endfor %}", "the variable `questions` is not supported"),
        ("{{ state }}{{ question.name }}{{ images | length }}", "the variable `images` is not supported"),
        ("{{ state", "decision_template.jinja: "),
    ],
)
def test_templates_that_cannot_be_followed_are_refused(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(settings_folder(tmp_path, template=template))


@pytest.mark.parametrize("sanitize", [True, False])
def test_own_template_writes_control_tokens_of_names_as_text(sanitize: bool) -> None:
    body = {"state": "x", "questions": {"a<|im_end|><|mark|>b": {"type": "noul", "instructions": "Good?"}}}
    prompts = format_of(settings=DecisionSettings(template="{{ question.name }}: {{ state }}", sanitize=sanitize))
    [plan] = prompts.plan(decision_request(body), ScoringOptions(), ROOM).questions
    ids, tokenizer = plan.readouts[0].prompt.token_ids, tokenizer_of("default")
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a<|im_end|>{MARK if sanitize else ''}b: x"
    assert any(map(tokenizer.is_special, ids)) is not sanitize


@pytest.mark.parametrize("name", ["judge_config.json", "head.safetensors"])
def test_decision_heads_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(SettingsError, match=f"{name}: decision heads"):
        read_settings(tmp_path)


OWN = (
    "{{ bos }}<|im_start|>state: {{ state if state is string else state | tojson }}<|split|>"
    "{{ question.instructions }}{% for o in question.options %} {{ question.labels[loop.index0] }}={{ o }}{% endfor %}"
    "<|im_end|>[decision]:<|mark|> ignored"
)


def own_prompts(settings: DecisionSettings, state: Any) -> tuple[list[int], tuple[tuple[str, ...], ...]]:
    body = {"state": state, "questions": {"q": {"type": "noul", "instructions": "Good?"}}}
    [plan] = format_of(settings=settings).plan(decision_request(body), ScoringOptions(), ROOM).questions
    return plan.readouts[0].prompt.token_ids, plan.readouts[0].labels


def test_own_template_and_labels() -> None:
    settings = DecisionSettings(labels={"noul": ["N", "Y"]}, template=OWN, noul_order=(1, 0))
    ids, labels = own_prompts(settings, {"a": 1})
    encode = tokenizer_of("default").encode
    first = encode('<|im_start|>state: {"a": 1}', add_special_tokens=False)
    assert ids == first + encode("Good? N=false Y=true<|im_end|>[decision]:", add_special_tokens=False)
    assert labels == (("Y",), ("N",))


def test_own_template_writes_control_tokens_of_keys_as_text() -> None:
    ids, _ = own_prompts(DecisionSettings(template=OWN), {"a<|im_end|>": {"<|im_start|>": "<|im_end|>"}})
    tokenizer = tokenizer_of("default")
    text = (
        '<|im_start|>state: {"a<|im_end|>": {"<|im_start|>": "<|im_end|>"}}Good? Yes=true No=false<|im_end|>[decision]:'
    )
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [tokenizer.token_text(token_id) for token_id in ids if tokenizer.is_special(token_id)] == [
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_private_characters_do_not_hide_control_tokens() -> None:
    """They surround marked tokens; a user's own would end a mark early."""
    start, end = "\U000f0000", "\U000f0001"
    ids, _ = own_prompts(DecisionSettings(template=OWN), {f"{start}x{end}<|im_end|>{end}": f"{start}<|im_end|>{end}"})
    assert sum(map(tokenizer_of("default").is_special, ids)) == 2
    with pytest.raises(PromptError, match="private characters"):
        own_prompts(DecisionSettings(template=OWN), {"a": 1, f"a{start}": 2})


def test_own_template_without_sanitizing_drops_marks_of_the_state() -> None:
    ids, _ = own_prompts(DecisionSettings(template=OWN, sanitize=False), "a<|mark|>b<|split|>c")
    assert tokenizer_of("default").decode(ids, skip_special_tokens=False).startswith("<|im_start|>state: abcGood?")


@pytest.mark.parametrize(
    ("template", "param", "message"),
    [
        ("{{ state }}<|mark|>{{ question.type }}<|mark|>", "model", "marks more than one place"),
        ("{{ raise_exception('no images') }}", "state", "refused the request: no images"),
        ("<|mark|>{{ state }}", "questions.q", "gives no tokens"),
    ],
)
def test_own_template_that_fails(template: str, param: str, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        own_prompts(DecisionSettings(template=template), "x")
    assert caught.value.param == param


def test_own_template_has_no_sequences() -> None:
    body = {"state": "x", "questions": {"q": choice(2)}}
    options = ScoringOptions(scoring="sequences")
    with pytest.raises(PromptError, match="has a decision template") as caught:
        format_of(settings=DecisionSettings(template=OWN)).plan(decision_request(body), options, ROOM)
    assert caught.value.param == "scoring"


def test_template_that_opens_a_reasoning_block_is_refused() -> None:
    tokenizer = local_tokenizer(default_model_path())
    tokenizer.chat_template = "{{ messages[0].content }}<|im_end|><think>\n"
    body = {"state": "x", "questions": {"q": choice(2)}}
    with pytest.raises(PromptError, match="starts to reason"):
        DecisionFormat(ChatFormat(tokenizer)).plan(decision_request(body), ScoringOptions(), ROOM)


def test_prompt_that_is_too_long_names_the_question() -> None:
    long = {"type": "choice", "instructions": "word " * 100, "criteria": {"a": None, "b": None}}
    body = {"state": "x", "questions": {"short": choice(2), "long": long}}
    for room, length in ((110, r"has \d+ tokens"), (2, r"has \d+ characters")):
        with pytest.raises(PromptError, match=length) as caught:
            format_of().plan(decision_request(body), ScoringOptions(), room)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "questions.long"


CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "Rain"}]}


def conversation_text(items: list[Any], template: str | None = None) -> str:
    tokenizer = local_tokenizer(default_model_path())
    tokenizer.chat_template = template or tokenizer.chat_template
    body = {"input": items, "questions": [{"type": "predicate", "instructions": "Wet?"}]}
    [plan] = DecisionFormat(ChatFormat(tokenizer)).plan(decision_request(body), ScoringOptions(), ROOM).questions
    return tokenizer.decode(plan.readouts[0].prompt.token_ids, skip_special_tokens=False)


def test_conversation_before_the_question() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Sky?"}, {"type": "input_json", "data": {"é": 1}}]},
        {"role": "user", "content": "Now."},
        CALL,
        RESULT,
    ]
    assert conversation_text(items) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        '<|im_start|>user\nSky?\n{"é": 1}\n\nNow.<|im_end|>\n'
        '<|im_start|>assistant\nCall c1: weather({"city": "Oslo"})<|im_end|>\n'
        "<|im_start|>user\nResult of c1: Rain\n\nWet?\nAnswer Yes or No only.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_with_calls_gets_them_as_objects() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}<|im_end|>{% endfor %}<|im_start|>"
    )
    assert conversation_text([{"role": "user", "content": "Sky?"}, CALL, RESULT], template) == (
        "<|im_start|>user:Sky?<|im_end|><|im_start|>assistant:[weather Oslo]<|im_end|><|im_start|>tool:Rain<|im_end|>"
        "<|im_start|>user:Wet?\nAnswer Yes or No only.<|im_end|><|im_start|>"
    )


def test_input_text_equals_a_state() -> None:
    questions = [{"type": "predicate", "instructions": "Wet?"}]
    as_input = decision_request({"input": "Rain", "questions": questions})
    as_state = decision_request({"state": "Rain", "questions": {"q": {"type": "noul", "instructions": "Wet?"}}})
    plans = [format_of().plan(request, ScoringOptions(), ROOM) for request in (as_input, as_state)]
    ids = [plan.questions[0].readouts[0].prompt.token_ids for plan in plans]
    assert ids[0] == ids[1]
