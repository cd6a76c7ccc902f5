"""Sampling: draws follow the distribution that penalties, temperature and cuts leave, and repeat with a seed."""

import json

import numpy as np
import pytest

from edge_moe._core import largest, likeliest
from edge_moe.runtime.sampling import Sampler, sampling_defaults

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.1, 0.025], np.float32))


def draws(count: int, logits=LOGITS, **options) -> np.ndarray:
    sampler = Sampler(**options)
    return np.bincount([sampler(logits) for _ in range(count)], minlength=len(logits))


def test_temperature_zero_takes_the_most_likely_token_and_of_equals_the_first():
    assert Sampler()(np.array([0.0, 3.0, 1.0, 3.0], np.float32)) == 1
    assert Sampler(0.0, top_p=0.1, seed=5)(LOGITS) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_that_temperature(temperature):
    want = np.exp(LOGITS.astype(np.float64) / temperature)
    want *= 4000 / want.sum()
    found = draws(4000, temperature=temperature, seed=1)
    # Pearson's statistic with 4 degrees of freedom passes 18.5 in one of 1,000 seeds.
    assert (np.square(found - want) / want).sum() < 18.5


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4), (1.0, 5), (1e-9, 1)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    logits = np.log2(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625]))[[3, 0, 4, 2, 1]] * np.log(2)
    order = np.argsort(-logits, kind="stable")
    found = draws(2000, logits.astype(np.float64), temperature=1.0, top_p=top_p, seed=2)
    assert set(np.flatnonzero(found)) == set(order[:kept])


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.9, 0.99999])
def test_the_likeliest_of_many_are_those_of_a_full_sort(spread, share):
    random = np.random.default_rng(4)
    probabilities = np.round(np.exp(random.standard_normal(20_000) * spread), 2)  # many are equal
    weights = (probabilities / probabilities.max()).astype(np.float32)
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order], dtype=np.float64) - weights[order]
    want = sorted(order[before < share * weights.sum(dtype=np.float64)].tolist())
    assert likeliest(weights, share).tolist() == want


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 40, 400, 19_999])
def test_the_largest_of_many_are_those_of_a_full_sort(spread, count):
    values = np.round(np.random.default_rng(5).standard_normal(20_000) * spread, 2).astype(np.float32)
    want = sorted(np.argsort(-values, kind="stable")[:count].tolist())
    assert largest(values, count).tolist() == want


def of_transformers(logits, so_far, **options) -> np.ndarray:
    """The probabilities that transformers' own processors leave, in the order in which it applies them."""
    torch, process = pytest.importorskip("torch"), pytest.importorskip("transformers").generation.logits_process
    # Biased before the penalty: transformers' class for it forbids nothing and takes sequences, so torch adds it here.
    scores = torch.tensor(logits)[None].clone()
    for token, bias in options.get("logit_bias", {}).items():
        scores[0, token] += bias
    named = {
        "repetition_penalty": (process.RepetitionPenaltyLogitsProcessor, float),
        "temperature": (process.TemperatureLogitsWarper, float),
        "top_k": (process.TopKLogitsWarper, int),
        "top_p": (process.TopPLogitsWarper, float),
        "min_p": (process.MinPLogitsWarper, float),
    }
    for name, (kind, number) in named.items():
        if name in options:
            scores = kind(number(options[name]))(torch.tensor([so_far]), scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 7},
        {"min_p": 0.3},
        {"top_p": 0.6},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"logit_bias": {3: 2.5, 11: float("-inf"), 0: -1.0}},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.2, "repetition_penalty": 1.3, "temperature": 1.4},
        {"top_k": 30, "top_p": 0.95, "temperature": 0.6, "logit_bias": {5: 4.0}},
        {"top_k": 1000, "top_p": 0.999, "min_p": 0.001, "temperature": 3.0},
    ],
)
def test_draws_follow_the_probabilities_that_transformers_leaves(options):
    options = {"temperature": 1.0, **options}
    logits = np.random.default_rng(6).standard_normal(40).astype(np.float32) * 2
    prompt = [3, 5, 8, 13, 21, 34, 3]
    want = of_transformers(logits, prompt, **options)
    found = np.zeros(40)
    for seed in range(4000):  # each draw is the first of an answer: a penalty counts what was drawn before
        found[Sampler(seed=seed, prompt=prompt, **options)(logits)] += 1
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(want))
    often = want * 4000 >= 5  # Pearson's statistic wants no rare classes
    rest = 4000 - found[often].sum(), 4000 - want[often].sum() * 4000
    classes = np.append(found[often], rest[0]), np.append(want[often] * 4000, max(rest[1], 1e-9))
    statistic = (np.square(classes[0] - classes[1]) / np.maximum(classes[1], 1)).sum()
    freedom = max(len(classes[0]) - 1, 1)
    assert statistic < freedom + 4.3 * (2 * freedom) ** 0.5 + 4  # passed in about one of 10,000 seeds


def test_a_repetition_penalty_counts_the_prompt_and_the_answer_as_in_transformers():
    random = np.random.default_rng(7)
    so_far = [4, 9, 9, 17]
    sampler = Sampler(repetition_penalty=1.6, prompt=so_far)
    for _ in range(60):
        logits = random.standard_normal(24).astype(np.float32)
        want = int(of_transformers(logits, so_far, repetition_penalty=1.6).argmax())
        assert sampler(logits) == want
        so_far = [*so_far, want]


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.25), (0.61, 0.153), (-0.31, -0.047)])
def test_presence_and_frequency_are_subtracted_for_tokens_of_the_answer(presence, frequency):
    logits = np.array([1.0, 0.9, 0.8, -2.0, 0.85], np.float32)
    counts = np.zeros(5)
    sampler = Sampler(presence_penalty=presence, frequency_penalty=frequency, prompt=[1, 2])
    for _ in range(30):
        want = int(np.argmax(logits - presence * (counts > 0) - frequency * counts))
        assert sampler(logits) == want
        counts[want] += 1
    assert logits.tolist() == np.array([1.0, 0.9, 0.8, -2.0, 0.85], np.float32).tolist()  # the caller's


def test_a_bias_can_force_and_forbid_a_token():
    assert Sampler(logit_bias={4: 100})(LOGITS) == 4
    assert Sampler(logit_bias={0: float("-inf")})(LOGITS) == 1
    with pytest.raises(ValueError) as caught:
        Sampler(logit_bias=dict.fromkeys(range(5), float("-inf")))(LOGITS)
    assert str(caught.value) == "logit_bias leaves no token possible; forbid fewer"


def test_top_p_applies_after_temperature():
    assert np.count_nonzero(draws(2000, temperature=1.0, top_p=0.8, seed=3)) == 3
    assert np.count_nonzero(draws(2000, temperature=0.3, top_p=0.8, seed=3)) == 1


def test_the_same_seed_gives_the_same_draws_and_another_others():
    logits = np.zeros(1000, np.float32)
    runs = []
    for seed in (7, 7, 8):
        sampler = Sampler(1.0, seed=seed)
        runs.append([sampler(logits) for _ in range(20)])
    assert runs[0] == runs[1] != runs[2]


def test_without_a_seed_draws_differ():
    logits = np.zeros(1000, np.float32)
    first, second = Sampler(1.0), Sampler(1.0)
    assert [first(logits) for _ in range(20)] != [second(logits) for _ in range(20)]


def test_extreme_logits_and_temperatures_stay_finite():
    logits = np.array([-3e38, 3e38, 0, 3e38], np.float32)
    assert set(np.flatnonzero(draws(50, logits, temperature=1.0, seed=0))) == {1, 3}
    assert draws(20, temperature=1e-300, seed=0)[0] == 20
    assert np.count_nonzero(draws(500, LOGITS, temperature=1e30, seed=0)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan, expected 0 or more"),
        ({"temperature": float("inf")}, "temperature is inf, expected 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5, expected above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p is nan, expected above 0 and at most 1"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"top_k": -1}, "top_k is -1, expected 0 or more"),
        ({"top_k": 1.5}, "top_k is 1.5, expected a whole number"),
        ({"min_p": 1.1}, "min_p is 1.1, expected 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected above 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan, expected a finite number"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf, expected a finite number"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"temperature": None}, "temperature is None, expected a number"),
        ({"temperature": 10**400}, f"temperature is {10**19}..., which no float can hold"),
        ({"seed": 0.5}, "seed is 0.5, expected a whole number"),
        ({"logit_bias": [1]}, "logit_bias is list, expected a mapping of token ids to numbers"),
        ({"logit_bias": {"a": 1}}, "a token id of logit_bias is 'a', expected a whole number"),
        ({"logit_bias": {7: 1}, "vocab": 7}, "a token id of logit_bias is 7, expected 0 to 6"),
        ({"logit_bias": {7: float("inf")}}, "logit_bias of token 7 is inf, expected a finite number, or -inf"),
        ({"logit_bias": {7: None}}, "logit_bias of token 7 is None, expected a number"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        Sampler(**options)
    assert str(caught.value) == message


# ---- generation_config.json


@pytest.mark.parametrize(
    ("advice", "want"),
    [
        (None, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.05, "top_p": 0.8}, {"temperature": 0.0, "repetition_penalty": 1.05}),
        ({"do_sample": True, "top_k": None}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "eos_token_id": [1]},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
        ),
    ],
)
def test_what_the_makers_advise_is_the_default(tmp_path, advice, want):
    if advice is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    assert sampling_defaults(tmp_path) == want


@pytest.mark.parametrize(
    ("advice", "fault"),
    [
        ({"do_sample": True, "top_p": 16.0}, "top_p is 16.0, expected above 0 and at most 1"),
        ({"do_sample": True, "temperature": []}, "temperature is [], expected a number"),
        ({"repetition_penalty": 10**400}, f"repetition_penalty is {10**19}..., which no float can hold"),
    ],
)
def test_advice_out_of_range_names_its_file(tmp_path, advice, fault):
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    with pytest.raises(ValueError) as caught:
        sampling_defaults(tmp_path)
    assert str(caught.value) == f"{tmp_path}/generation_config.json: {fault}"
