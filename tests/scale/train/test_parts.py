"""The trainer's small parts, each against its definition written out: advantages, value, buffer, order, divergence."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from scale.train.advantage import centred, generalized_advantages
from scale.train.buffer import Trajectories
from scale.train.divergence import WINDOW, Diverged, check_history, check_update
from scale.train.dpok import balanced, generator_of, shuffled
from scale.train.settings import Dpok
from scale.train.value import Value, fit_value
from tests.chance import FALSE_ALARM, mean_p_value

STEPS, N = 4, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("trace", [0.0, 0.3, 1.0])
def test_advantages_are_the_sum_of_discounted_differences(trace: float) -> None:
    """Step k's is `sum_l trace^l (V_{k+l+1} - V_{k+l})`, V after the last step being the return: a double sum."""
    values, returns = draw(STEPS, N), draw(N, seed=1)
    after = torch.cat((values, returns[None]))
    found = generalized_advantages(values, returns, trace)
    for k in range(STEPS):
        expected = sum(trace ** (j - k) * (after[j + 1] - after[j]) for j in range(k, STEPS))
        assert torch.allclose(found[k], torch.as_tensor(expected), atol=1e-12)


def test_the_ends_of_the_trace() -> None:
    """At 1 it is return minus value, at 0 the change of the value over one step."""
    values, returns = draw(STEPS, N), draw(N, seed=1)
    assert torch.allclose(generalized_advantages(values, returns, 1.0), returns - values)
    assert torch.equal(generalized_advantages(values, returns, 0.0)[:-1], values[1:] - values[:-1])


@pytest.mark.parametrize("trace", [0.0, 0.3, 1.0])
def test_the_exact_value_function_gives_the_exact_gradient(trace: float) -> None:
    """On a random walk with reward x_3 (1 + x_3/2), any trace's mean of advantage times score is the exact gradient.

    Steps are `N(x + theta_k, 1)` at theta = 0, from 1/2 on: the derivative of the expected reward by theta_k is
    E[1 + x_3] = 3/2. Each step's mean at a false-alarm level of 1e-5 over the three; control: with a value that lacks
    the square trace 0 is off.
    """
    n, steps = 40_000, 3
    noise = draw(steps, n)
    states = torch.cat((torch.zeros(1, n, dtype=torch.float64), noise.cumsum(0))) + 0.5

    def p_values(values: Tensor) -> list[float]:
        returns = states[-1] * (1 + states[-1] / 2)
        return [mean_p_value(row, 1.5) for row in generalized_advantages(values, returns, trace) * noise]

    left = torch.arange(steps, 0, -1, dtype=torch.float64)[:, None]
    exact = states[:-1] + (states[:-1] ** 2 + left) / 2
    assert min(p_values(exact)) > FALSE_ALARM / steps
    if trace == 0:
        assert min(p_values(states[:-1])) < FALSE_ALARM / steps


def test_centred_leaves_each_sample_out_of_its_own_baseline() -> None:
    """Each less the mean of the others of its prompt at its step; so they sum to 0, and a group of one is untouched."""
    advantages = draw(STEPS, N)
    found = centred(advantages, 3)
    for k in range(STEPS):
        for i in range(N):
            others = [j for j in range(N) if j // 3 == i // 3 and j != i]
            assert found[k, i] == pytest.approx(float(advantages[k, i] - advantages[k, others].mean()))
    assert torch.allclose(found.unflatten(1, (-1, 3)).sum(2), torch.zeros(STEPS, 2, dtype=torch.float64))
    assert torch.equal(centred(advantages, 1), advantages)


def trajectories(n: int = N, first: int = 0) -> Trajectories:
    """Every number says where it stands: trajectory i and step k read `100 i + k`."""
    i, k = torch.arange(first, first + n), torch.arange(STEPS + 1)
    grid = (100.0 * i + k[:, None])[..., None]
    return Trajectories(
        grid, grid[:-1] + 0.1, grid[:-1, :, 0] + 0.2, grid[:-1, :, 0] + 0.3, grid[:-1, :, 0] + 0.4, i + 0.5,
        i[:, None] + 0.6, {"text": i[:, None] + 0.7},
    )  # fmt: skip


def test_transitions_are_numbered_step_by_step() -> None:
    """Row `k n + i` is step k of trajectory i: its two states, its advantage, its log-probability, its condition."""
    whole = trajectories()
    batch = whole.transitions(torch.arange(STEPS * N))
    k, i = torch.arange(STEPS).repeat_interleave(N), torch.arange(N).repeat(STEPS)
    assert torch.equal(batch.k, k)
    assert torch.equal(batch.x[:, 0], 100.0 * i + k)
    assert torch.equal(batch.x_next[:, 0], 100.0 * i + k + 1)
    assert torch.equal(batch.log_probability, 100.0 * i + k + 0.3)
    assert torch.equal(batch.advantage, 100.0 * i + k + 0.4)
    assert torch.equal(batch.condition["text"][:, 0], i + 0.7)
    some = whole.transitions(torch.tensor([7, 3]))
    assert torch.equal(some.x, batch.x[[7, 3]])


def test_the_value_learns_from_the_same_rows() -> None:
    """`value_data` has the transitions' order: guess, text, step, hint, and the return of the row's trajectory."""
    data = trajectories().value_data()
    k, i = torch.arange(STEPS).repeat_interleave(N), torch.arange(N).repeat(STEPS)
    expected = {
        "guess": (100.0 * i + k + 0.1)[:, None], "hint": 100.0 * i + k + 0.2, "text": (i + 0.6)[:, None], "k": k,
        "returns": i + 0.5,
    }  # fmt: skip
    assert data.keys() == expected.keys()
    assert all(torch.equal(data[name], value) for name, value in expected.items())


def same(left: Trajectories, right: Trajectories) -> bool:
    pairs = zip(_flat(left), _flat(right), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _flat(whole: Trajectories) -> list[Tensor]:
    parts = whole.to_dict()
    return [*parts.pop("condition").values(), *parts.values()]


@pytest.mark.parametrize(("capacity", "first", "count"), [(4, 5, 4), (8, 1, 8), (100, 0, 9)])
def test_the_buffer_keeps_the_newest(capacity: int, first: int, count: int) -> None:
    """Six trajectories followed by three more, to a capacity: the newest of all nine, in order."""
    assert same(trajectories(6).followed_by(trajectories(3, 6), capacity), trajectories(count, first))


def test_mapped_sees_a_trajectory_a_row() -> None:
    """A round trip changes nothing, and a reordering of rows reorders whole trajectories."""
    whole, order = trajectories(), torch.tensor([4, 1, 5, 0, 3, 2])
    assert same(whole.mapped(lambda value: value), whole)
    turned = whole.mapped(lambda value: value[order])
    assert torch.equal(turned.states, whole.states[:, order])
    assert torch.equal(turned.returns, whole.returns[order])
    assert same(turned.mapped(lambda value: value[order.argsort()]), whole)
    assert not same(turned, whole)


def test_stored_trajectories_come_back() -> None:
    """`to_dict` is what the constructor takes; `joined` of the parts is the whole."""
    whole = trajectories(5)
    assert same(Trajectories(**whole.to_dict()), whole)
    assert same(Trajectories.joined((trajectories(2), trajectories(3, 2))), whole)


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_balanced_uses_every_prompt_once_an_epoch(count: int) -> None:
    """In rounds of any size, each run of 7 in the whole sequence is a shuffle of the 7 prompts, mostly a new one."""
    prompts = [f"prompt {i}" for i in range(7)]
    dealt = [prompt for index in range(70 // count + 1) for prompt in balanced(prompts, count, index, seed=3)]
    epochs = [tuple(dealt[start : start + 7]) for start in range(0, 70, 7)]
    assert all(Counter(epoch) == Counter(prompts) for epoch in epochs)
    assert len(set(epochs)) > 8
    assert dealt[:count] == balanced(prompts, count, 0, seed=3)
    assert dealt[:70] != [p for index in range(70 // count + 1) for p in balanced(prompts, count, index, seed=4)][:70]


def test_shuffled_uses_every_row_before_any_twice() -> None:
    """Batches of 4 out of 10 rows: each ten in a row are all rows; as many updates as asked for, of that size."""
    batches = list(shuffled(10, 10, 4, generator_of(0, 0, 1)))
    assert [len(batch) for batch in batches] == [4] * 10
    rows = torch.cat(batches)
    assert all(rows[start : start + 10].sort().values.tolist() == list(range(10)) for start in range(0, 40, 10))
    assert not torch.equal(rows[:10], rows[10:20])


def test_generators_are_apart_and_repeat() -> None:
    """The same seed, round and stream draw the same; a change of any one, or a swap of two, draws otherwise."""

    def first(*key: int) -> float:
        return float(torch.rand((), generator=generator_of(*key), dtype=torch.float64))

    keys = [(s, i, k) for s in range(5) for i in range(5) for k in range(5)]
    assert [first(*key) for key in keys] == [first(*key) for key in keys]
    assert len({first(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("event", [(3,), (4, 8, 8), (2, 5, 7)])
def test_an_untrained_value_is_its_hint(event: tuple[int, ...]) -> None:
    """Whatever the guess, the text and the step."""
    value, hint = Value(event, features=5, steps=STEPS), torch.randn(N)
    assert torch.equal(value(torch.randn(N, *event), torch.randn(N, 5), torch.arange(N) % STEPS, hint), hint)


def test_the_value_learns_what_guess_text_and_step_tell() -> None:
    """Least squares brings the error on fresh rows from about 3 to below a tenth; control: shuffled returns do not."""

    def data(seed: int) -> dict[str, Tensor]:
        guess, text, k = draw(1000, 2, seed=seed), draw(1000, 3, seed=seed + 1), torch.arange(1000) % STEPS
        returns = guess.prod(1) + text[:, 0] + k
        rows = {"guess": guess, "text": text, "hint": 0 * returns, "returns": returns - returns.mean()}
        return {name: row.float() for name, row in rows.items()} | {"k": k}

    def error(returns: Tensor, updates: int) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            value = Value((2,), features=3, steps=STEPS)
        optimizer = torch.optim.Adam(value.parameters(), lr=1e-2)
        fit_value(value, optimizer, data(0) | {"returns": returns}, updates, 128, torch.Generator().manual_seed(0))
        fresh = data(7)
        with torch.no_grad():
            found = value(fresh["guess"], fresh["text"], fresh["k"], fresh["hint"])
        return float((found - fresh["returns"]).square().mean())

    returns = data(0)["returns"]
    assert error(returns, 0) > 2
    assert error(returns, 400) < 0.1
    assert error(returns[torch.randperm(1000, generator=torch.Generator().manual_seed(1))], 400) > 2


def scaler(enabled: bool, scale: float = 2.0**16) -> torch.amp.GradScaler:
    """A GradScaler as fp16 (enabled) and the other precisions have it."""
    return torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)  # pyright: ignore[reportPrivateImportUsage]


GOOD = {"kl": 1.0, "gradient": 2.0, "ratio": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kl": float("nan")}, "not finite"), ({"gradient": float("inf")}, "not finite"), ({"ratio": 0.6}, "left 1"),
     ({"ratio": float("nan")}, "left 1")],
)  # fmt: skip
def test_an_update_that_went_astray_stops_the_run(change: dict[str, float], message: str) -> None:
    """Numbers that are none, or a ratio outside `max_ratio`, are refused; control: a good update passes."""
    check_update(GOOD, scaler(False), Dpok())
    with pytest.raises(Diverged, match=message):
        check_update(GOOD | change, scaler(False), Dpok())


def test_an_overflow_under_fp16_is_the_scalers_business() -> None:
    """An infinite gradient passes while the scaler can back off, stops the run at a scale of 1; a KL never passes."""
    active = scaler(True)
    check_update(GOOD | {"gradient": float("inf")}, active, Dpok())
    with pytest.raises(Diverged, match="not finite"):
        check_update(GOOD | {"kl": float("inf")}, active, Dpok())
    with pytest.raises(Diverged, match="not finite"):
        check_update(GOOD | {"gradient": float("inf")}, scaler(True, 1.0), Dpok())


def test_a_reward_that_falls_stops_the_run() -> None:
    """Fallen by over `collapse` spreads, or not a number; controls: a smaller fall, or too few rounds, pass."""

    def history(fall: float, rounds: int) -> list[dict[str, float]]:
        return [{"reward": -fall * (index >= WINDOW), "spread": 0.5} for index in range(rounds)]

    check_history(history(0.99, 2 * WINDOW), Dpok(collapse=2.0))
    check_history(history(1.01, 2 * WINDOW - 1), Dpok(collapse=2.0))
    with pytest.raises(Diverged, match="reward fell"):
        check_history(history(1.01, 2 * WINDOW), Dpok(collapse=2.0))
    with pytest.raises(Diverged, match="reward fell"):
        check_history(history(float("nan"), 2 * WINDOW), Dpok(collapse=2.0))
