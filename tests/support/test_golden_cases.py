"""The golden files are consistent, and `compare` finds wrong values."""

from dataclasses import replace

import pytest

from tests.support.golden_cases import GoldenName, GoldenPrompt, Measured, compare, load_golden

NAMES: tuple[GoldenName, ...] = ("smollm2-q4_1-gguf-f32", "smollm2-prompt-logprobs")


def perfect(prompt: GoldenPrompt) -> Measured:
    return Measured(
        [token.logprob for token in prompt.scored],
        [token.rank for token in prompt.scored],
        [step.token_id for step in prompt.greedy],
        [step.logprob for step in prompt.greedy],
    )


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_are_consistent(name: GoldenName) -> None:
    prompts = load_golden(name)
    for prompt in prompts:
        assert [token.token_id for token in prompt.scored] == list(prompt.token_ids[1:])
        assert len(prompt.greedy) == 32
        for token in prompt.scored:
            assert token.rank in token.ranks
            top = dict(token.top)
            assert (token.rank <= 5) == (token.token_id in top)
            assert top.get(token.token_id, token.logprob) == token.logprob
        for step in prompt.greedy:
            assert step.top[0] == (step.token_id, step.logprob)
            assert step.margin == pytest.approx(step.logprob - step.top[1][1], abs=2e-6)
    figures = compare(prompts, [perfect(prompt) for prompt in prompts])
    assert figures.max_error == figures.greedy_max_error == 0.0
    assert figures.wrong_ranks == figures.wrong_greedy == ()


def test_compare_measures_errors_and_wrong_ranks() -> None:
    prompt = load_golden("smollm2-q4_1-gguf-f32")[0]
    ours = perfect(prompt)
    first, second, *others = ours.logprobs
    assert [token.ranks for token in prompt.scored][:2] == [range(2922, 2924), range(1, 2)]
    near_tie = replace(ours, logprobs=[first + 0.5, second - 0.25, *others], ranks=[2922, 1, 2, 1])
    figures = compare([prompt], [near_tie])
    assert figures.max_error == pytest.approx(0.5)
    assert figures.mean_error == pytest.approx(0.75 / 4)
    assert figures.wrong_ranks == ()
    lines = compare([prompt], [replace(ours, ranks=[2921, 1, 1, 1])]).wrong_ranks
    assert [line.split(", ", 1)[1] for line in lines] == [
        "token 1 (id 3575): rank 2921, golden 2923",
        "token 3 (id 4649): rank 1, golden 2",
    ]


def test_compare_stops_at_the_first_other_greedy_token() -> None:
    prompt = load_golden("smollm2-q4_1-gguf-f32")[0]
    ours = perfect(prompt)
    ids = [*ours.greedy_token_ids[:2], *[0] * 30]
    logprobs = [ours.greedy_logprobs[0] - 0.5, ours.greedy_logprobs[1], *[-9.0] * 30]
    figures = compare([prompt], [replace(ours, greedy_token_ids=ids, greedy_logprobs=logprobs)])
    assert figures.greedy_max_error == pytest.approx(0.5)
    assert figures.greedy_mean_error == pytest.approx(0.25)
    (line,) = figures.wrong_greedy
    assert "step 2: 0, golden 198" in line


@pytest.mark.parametrize(("margin", "chosen", "wrong"), [(0.009, 1, 0), (0.011, 1, 1), (0.009, 2, 1)])
def test_compare_allows_the_second_token_of_a_near_tie(margin: float, chosen: int, wrong: int) -> None:
    prompt = load_golden("smollm2-q4_1-gguf-f32")[0]
    step = replace(prompt.greedy[-1], margin=margin)
    prompt = replace(prompt, greedy=(*prompt.greedy[:-1], step))
    ours = replace(perfect(prompt), greedy_token_ids=[*perfect(prompt).greedy_token_ids[:-1], step.top[chosen][0]])
    assert len(compare([prompt], [ours]).wrong_greedy) == wrong


def test_golden_files_have_all_their_values() -> None:
    counts = [(len(load_golden(name)), sum(len(p.scored) for p in load_golden(name))) for name in NAMES]
    assert counts == [(4, 86), (5, 149)]


@pytest.mark.parametrize("field", ["logprobs", "ranks", "greedy_token_ids", "greedy_logprobs"])
def test_compare_refuses_missing_values(field: str) -> None:
    prompt = load_golden("smollm2-q4_1-gguf-f32")[0]
    values = perfect(prompt)
    shorter = {field: list(getattr(values, field))[:-1]}
    with pytest.raises(ValueError, match="zip"):
        compare([prompt], [replace(values, **shorter)])
