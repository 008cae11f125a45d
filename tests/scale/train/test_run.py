"""A run around the trainer: its files, its record, its observers, and the folders that it refuses."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scale.adapters import load_adapter
from scale.rewards import load_scorer
from scale.train.denoiser import ADAPTER
from scale.train.divergence import Diverged
from scale.train.observe import Observer, sheet
from scale.train.run import CARD, WEIGHTS, as_text, check_folders, fine_tune, identity
from scale.train.settings import Dpok
from scale.train.tilted_settings import Tilted
from tests.scale import tiny
from tests.scale.train.fixtures import policy

PROMPTS = ["red", "blue", "green"]
SETTINGS = Dpok(
    rounds=3, prompts_per_round=2, samples_per_prompt=4, rollout_batch=8, steps=3, value_updates=2, updates=2, batch=8,
    microbatch=8, precision="no", sheet_every=2,
)  # fmt: skip
TILTED = Tilted(
    prompts=2, samples_per_prompt=4, steps=3, rounds=2, updates=2, batch=8, microbatch=8, alpha=10.0, precision="no"
)


def run(folder: Path, settings: Any = SETTINGS, make: Any = tiny.sd, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline, and the card of its training."""
    pipe, reward = make(), load_scorer("colorfulness")
    return pipe, fine_tune(pipe, reward, PROMPTS, settings, folder / "work", folder / "out", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    """Its folder, the pipeline afterwards, and its card."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *run(folder)


def test_the_record_says_what_was_done(finished: tuple[Path, Any, dict[str, Any]]) -> None:
    """training.json is the returned card: who, figures computed here from the history, and no path of this machine."""
    folder, _, card = finished
    text = (folder / "out" / CARD).read_text()
    assert json.loads(text) == card
    assert sum(line.startswith('  {"reward"') for line in text.splitlines()) == SETTINGS.rounds == len(card["history"])
    assert card["reward"] == "colorfulness"
    assert (card["model"], card["algorithm"], card["prompts"]) == ("the shipped small world", "dpok", 3)
    assert card["images"] == 3 * 2 * 4
    assert card["reward_first"] == card["history"][0]["reward"]
    for figure, name in (("reward_last", "reward"), ("kl", "kl")):
        assert card[figure] == pytest.approx(np.mean([record[name] for record in card["history"]]))
    assert card["seconds"] > 0
    assert len(card["version"]) >= 5
    assert card["settings"]["targets"] == list(SETTINGS.targets)
    assert str(folder) not in text


def test_a_model_is_recorded_without_its_path(tmp_path: Path) -> None:
    """A folder by its name, a hub id as it is, a reward's model likewise."""
    (tmp_path / "pick").mkdir()
    who = identity("pickscore", PROMPTS, SETTINGS, tmp_path / "pick", {"pickscore": tmp_path / "pick"})
    assert who["model"] == "pick"
    assert re.fullmatch(r"pick \([0-9a-f]{8}\)", who["reward_models"]["pickscore"])
    assert identity("jpeg", PROMPTS, SETTINGS, "owner/name")["model"] == "owner/name"


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    """The writer refuses NaN, so a record that holds one must have been cleared of it before."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_text({"history": [{"gradient": float("inf")}]})
    assert json.loads(as_text({"a": 1, "history": [{"gradient": None}]}))["history"] == [{"gradient": None}]


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_the_adapter_loads_where_users_load_it(tmp_path: Path, make: Any) -> None:
    """The file holds the trained weights rounded to half precision, and moves another pipeline's denoiser by them."""
    trained, _ = run(tmp_path, replace(SETTINGS, rounds=1, sheet_every=0), make)
    stored = load_file(tmp_path / "out" / WEIGHTS)
    learned = get_peft_model_state_dict(trained.unet, adapter_name=ADAPTER)
    assert {key.removeprefix("unet.") for key in stored} == {*learned}
    assert all(torch.equal(stored[f"unet.{key}"], value.half()) for key, value in learned.items())
    assert max(float(value.abs().max()) for key, value in learned.items() if "lora_B" in key) > 0
    fresh = make()
    load_adapter(fresh, tmp_path / "out", "mine")
    fresh.unet.set_adapter("mine")
    loaded = get_peft_model_state_dict(fresh.unet, adapter_name="mine")
    assert all(torch.equal(loaded[key], value.half().float()) for key, value in learned.items())


def test_tensorboard_has_every_round(finished: tuple[Path, Any, dict[str, Any]]) -> None:
    """The curves on disk are the history's, round by round."""
    folder, _, card = finished
    events = EventAccumulator(str(folder / "work" / "logs"))
    events.Reload()
    assert {*events.Tags()["scalars"]} == {*card["history"][0]}
    for name in card["history"][0]:
        read = {event.step: event.value for event in events.Scalars(name)}
        assert read == pytest.approx({i + 1: record[name] for i, record in enumerate(card["history"])}, rel=1e-6)


def test_the_bar_says_what_a_round_came_to(tmp_path: Path) -> None:
    """Beside it stand the newest round's reward, KL, ratio and gradient norm, and how many of the rounds are done."""
    record = {"reward": 1.25, "kl": 0.5, "ratio": 0.01, "gradient": 3.0, "value_loss": 7.0}
    with Observer(policy(SETTINGS), PROMPTS, tmp_path, total=4) as observer:
        observer(0, dict.fromkeys(record, 0.0))
        observer(1, record)
        (task,) = observer.bar.tasks
    assert (task.completed, task.total) == (2, 4)
    assert task.fields["note"] == "reward 1.25 kl 0.5 ratio 0.01 gradient 3"


def test_sheets_show_the_run_and_do_not_change_it(finished: tuple[Path, Any, dict[str, Any]], tmp_path: Path) -> None:
    """Before the first, every second and the last round; a run without sheets ends bit for bit the same."""
    folder, _, card = finished
    sheets = [Image.open(folder / "work" / f"sheet-{done:05d}.png") for done in (0, 2, 3)]
    assert len([*(folder / "work").glob("sheet*.png")]) == 3
    pixels = [np.asarray(image) for image in sheets]
    assert pixels[0].shape == (2 * 18, 4 * 18, 3)
    assert (pixels[0] != pixels[2]).any()
    _, plain = run(tmp_path, replace(SETTINGS, sheet_every=0))
    assert plain["history"] == card["history"]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (folder / "out" / WEIGHTS).read_bytes()


def test_a_sheet_is_laid_out_by_rows() -> None:
    """Image i stands in row i // columns, column i % columns, at full size."""
    images = torch.rand(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    made = sheet(images, columns=3, gap=1)
    assert made.shape == (3, 2 * 6, 3 * 5)
    for i in range(6):
        top, left = 6 * (i // 3), 5 * (i % 3)
        assert torch.equal(made[:, top : top + 5, left : left + 4], images[i])


def test_again_is_the_same_and_another_is_refused(finished: tuple[Path, Any, dict[str, Any]], tmp_path: Path) -> None:
    """A finished run's folders accept the same run, whose weights are then the same; any other is refused by name."""
    folder, _, card = finished
    before = (folder / "out" / WEIGHTS).read_bytes()
    _, again = run(folder)
    assert (again["history"], again["seconds"]) == (card["history"], card["seconds"])
    assert (folder / "out" / WEIGHTS).read_bytes() == before
    who = identity("colorfulness", PROMPTS, SETTINGS)
    check_folders(who, folder / "work", folder / "out")
    for other, what in (
        (identity("jpeg", PROMPTS, SETTINGS), "another reward"),
        (identity("colorfulness", PROMPTS[:2], SETTINGS), "another prompts, prompts_sha256"),
        (identity("colorfulness", ["a", "b", "c"], SETTINGS), "another prompts_sha256"),
        (identity("colorfulness", PROMPTS, replace(SETTINGS, clip=1e-3)), "another settings"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with {what};"):
            check_folders(other, folder / "work", tmp_path)
        with pytest.raises(ValueError, match=f"holds an adapter with {what};"):
            check_folders(other, tmp_path, folder / "out")


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"reward": "colorfulness"}', "[" * 100_000])
def test_a_stranger_s_adapter_is_not_overwritten(tmp_path: Path, text: str | None) -> None:
    """An adapter beside which no readable training.json lies is somebody's."""
    (tmp_path / WEIGHTS).touch()
    if text is not None:
        (tmp_path / CARD).write_text(text)
    with pytest.raises(ValueError, match=r"holds an adapter with no readable training\.json"):
        check_folders(identity("colorfulness", PROMPTS, SETTINGS), tmp_path / "work", tmp_path)


def test_a_diverged_run_writes_no_adapter(tmp_path: Path) -> None:
    """The trainer's stop reaches the caller, and `out` is not there."""
    with pytest.raises(Diverged, match="stopped in round"):
        run(tmp_path, replace(SETTINGS, learning_rate=1e3, max_ratio=1e-3))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("learning_rate", [1e3, 1e6])
def test_what_is_left_of_a_diverged_run_is_good(tmp_path: Path, learning_rate: float) -> None:
    """Weights that one update a round blew up are never what `best` holds: that drew images, and is a plain adapter.

    Born of a review: the ratio is 1 before the first update, so that a round's only update went unseen, and the
    checkpoint after it was called good.
    """
    settings = replace(SETTINGS, rounds=6, updates=1, batch=24, learning_rate=learning_rate, sheet_every=0)
    with pytest.raises(Diverged, match=r"the last good weights are in .*best\.pt, and as an adapter in .*best"):
        run(tmp_path, settings)
    blown = torch.load(tmp_path / "work" / "checkpoint.pt", weights_only=True)["adapter"]
    assert max(float(value.abs().max()) for value in blown.values()) > 100  # the control: it did blow up
    kept = load_file(tmp_path / "work" / "best" / WEIGHTS)
    assert max(float(value.abs().max()) for value in kept.values()) < 2


def test_a_run_killed_before_its_first_checkpoint_keeps_its_folder(tmp_path: Path) -> None:
    """`run.json` alone tells whose folder it is: scores and sheets of another run would be mixed in."""
    (tmp_path / "run.json").write_text(json.dumps(identity("jpeg", PROMPTS, SETTINGS)))
    check_folders(identity("jpeg", PROMPTS, SETTINGS), tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="holds a run with another reward"):
        check_folders(identity("symmetry", PROMPTS, SETTINGS), tmp_path, tmp_path / "out")


def test_a_run_killed_between_adapter_and_card_goes_on(tmp_path: Path) -> None:
    """An adapter without a card is the run's own where `work` says so; without such a `work` it is somebody's."""
    work, out, who = tmp_path / "work", tmp_path / "out", identity("jpeg", PROMPTS, SETTINGS)
    work.mkdir()
    out.mkdir()
    (out / WEIGHTS).touch()
    with pytest.raises(ValueError, match="holds an adapter"):
        check_folders(who, work, out)
    (work / "run.json").write_text(json.dumps(who))
    check_folders(who, work, out)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"size": 0}, "size must be positive"),
        ({"size": -16}, "size must be positive"),
        ({"learning_rate": 1e38}, "learning_rate must be at most"),
        ({"prompts_per_round": 1, "samples_per_prompt": 1}, "two images at least"),
    ],
)
def test_settings_that_torch_would_choke_on_are_refused(values: dict[str, Any], reason: str) -> None:
    """ValueError with the reason, where torch's own error would come in the middle of a run."""
    with pytest.raises(ValueError, match=reason):
        replace(SETTINGS, **values)


def test_a_size_between_latents_is_refused(tmp_path: Path) -> None:
    """Images are multiples of the autoencoder's factor: anything else would silently be less."""
    with pytest.raises(ValueError, match="multiple of"):
        run(tmp_path, replace(SETTINGS, size=17))


@pytest.mark.parametrize(("capability", "precision", "warned"), [
    ("AVX2", "bf16", True), ("AVX2", "no", False), ("AVX512", "bf16", False),
])  # fmt: skip
def test_a_cpu_that_emulates_the_precision_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, precision: str, warned: bool
) -> None:
    """An hour would become a day: a warning with the remedy, and the run goes on."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    expected = pytest.warns(RuntimeWarning, match="emulates bf16, .* set precision=no") if warned else nullcontext()
    with expected:
        _, card = run(tmp_path, replace(SETTINGS, rounds=1, precision=precision))
    assert len(card["history"]) == 1


def test_the_other_algorithm(tmp_path: Path) -> None:
    """`Tilted` settings choose reward-weighted denoising: its own figures, and base samples that two runs share."""
    _, card = run(tmp_path, TILTED, samples=tmp_path / "samples")
    assert card["algorithm"] == "tilted"
    assert card["images"] == 8
    assert card["reward_goal"] >= card["reward_first"]
    assert "reward_last" not in card
    assert (tmp_path / "out" / WEIGHTS).is_file()
    assert any((tmp_path / "samples").iterdir())
    with pytest.raises(ValueError, match="samples belong to the algorithm tilted"):
        run(tmp_path / "dpok", samples=tmp_path / "samples")
