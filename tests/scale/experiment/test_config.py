"""A config is read strictly: what is wrong with it is one ValueError that names the config and the key."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from scale.experiment.cells import plan
from scale.experiment.config import CONFIGS, config_names, read_config
from scale.experiment.values import simplex_grid
from tests.scale.experiment.fixtures import PROMPTS, table, write_config

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"step": 3}, "unknown 'step'"),
    "no rewards": ({"rewards": None}, "nothing of rewards"),
    "unknown reward": ({"rewards": {"colorfulness": "beauty", "jpeg": "jpeg"}}, "no reward 'beauty'"),
    "also a reward": ({"also": ["jpeg"]}, "'jpeg', which is a reward already"),
    "no expression": ({"rewards": {"colorfulness": "2*", "jpeg": "jpeg"}}, "cannot read"),
    "dotted reward": ({"rewards": {"a.b": "jpeg"}}, "without dots"),
    "unused model": ({"reward_models": {"pickscore": "x"}}, "no reward uses"),
    "missing adapter": ({"adapters": {"colorfulness": "@none", "jpeg": "@jpeg"}}, "no adapter at"),
    "adapter not given": ({"adapters": {"jpeg": "@jpeg"}}, "nothing of colorfulness"),
    "adapter of no reward": ({"adapters": {"jpg": "@jpeg"}}, "'jpg', which is no reward"),
    "steps": ({"steps": 0}, "steps must be a whole number of at least 1, received 0"),
    "steps in words": ({"steps": "many"}, "steps must be a whole number"),
    "true seeds": ({"seeds": True}, "seeds must be a whole number"),
    "same seed": ({"seeds": [1, 1]}, "each seed once"),
    "eta": ({"eta": 1.5}, "eta must be a finite number of at least 0 of at most 1"),
    "guidance": ({"guidance": float("inf")}, "guidance must be a finite number"),
    "huge guidance": ({"guidance": 10**400}, "guidance must be a finite number, received 1000"),
    "scheduler": ({"scheduler": "plms"}, "scheduler must be one of ddim"),
    "prompts": ({"prompts": "@none.txt"}, "cannot read the prompt file"),
    "odd prompt": ({"prompts": ["a cat", True]}, "YAML reads as no text"),
    "table of prompts": ({"prompts": {"file": "a.txt"}}, "a file or a list, received {'file': 'a.txt'}"),
    "no prompts": ({"prompts": []}, "hold no prompt"),
    "broken lines": ({"prompts": "@broken.jsonl"}, "line 2"),
    "odd tag": ({"prompts": "@tag.jsonl"}, "need texts"),
    "grid": ({"preferences": {"grid": 0.3}}, "divides 1"),
    "fine grid": ({"preferences": {"grid": 1e-6}}, "at most 100000 preferences"),
    "finest grid": ({"preferences": {"grid": 1e-320}}, "at most 100000 preferences"),
    "w": ({"preferences": {"w": [1.5]}}, "of at most 1"),
    "weights": ({"preferences": [{"jpeg": 0.5}]}, "sum to 1"),
    "weight of none": ({"preferences": [{"jpg": 1}]}, "'jpg', which is no reward"),
    "negative lambda": ({"lambdas": [-1]}, "lambdas must be"),
    "unknown method": ({"methods": ["best"]}, "no method 'best'"),
    "no method": ({"methods": [3]}, "no method"),
    "option of another": ({"methods": [{"method": "mpa", "order": "iid"}]}, "of mpa has an unknown 'order'"),
    "option's value": ({"methods": [{"method": "mpa-ls", "order": "odd"}]}, "order must be one of"),
    "label twice": ({"methods": ["mpa", "mpa"]}, "'mpa' twice"),
    "preferences of base": ({"methods": [{"method": "base", "lambdas": [1]}]}, "unknown 'lambdas'"),
    "rgg": ({"methods": ["rgg"]}, "alpha is missing"),
    "interp": ({"methods": ["interp"]}, "midpoints are missing"),
    "edge": ({"methods": [{"method": "interp", "midpoints": {"jpeg": "@both"}}]}, "two different names"),
    "morl": ({"methods": [{"method": "morl", "experts": [{"adapter": "@both"}]}]}, "weights of each"),
}


@pytest.fixture(scope="module")
def bad(files: Path) -> Path:
    (files / "broken.jsonl").write_text('{"prompt": "a cat", "tag": "x"}\n{"text": "a dog"}\n')
    (files / "tag.jsonl").write_text('{"prompt": "a cat", "tag": 3}\n')
    return files


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(bad: Path, name: str) -> None:
    """Unknown keys, values of another type, files that are not there: ValueError with the config, key and remedy."""
    changes, reason = WRONG[name]
    changes = json.loads(json.dumps(changes).replace("@", f"{bad}/"))
    path = write_config(bad, "wrong", **changes)
    with pytest.raises(ValueError, match=r"wrong\.yaml") as caught:
        read_config(str(path))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a", "a: [", "a: &x [1]\nb: *x", "a: !!python/object/apply:os.system [ls]", ""])
def test_hostile_files_are_refused(tmp_path: Path, text: str) -> None:
    """No list, no broken text, no alias, no object of Python: one ValueError."""
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"hostile\.yaml"):
        read_config(str(path))


def test_an_unknown_config_lists_those_that_ship() -> None:
    """A wrong name is answered with the right ones."""
    with pytest.raises(ValueError, match=config_names()[0]):
        read_config("none-of-them")


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs_have_something_to_make(name: str) -> None:
    """Each reads, in full where its adapters are here, and as its twin on the small world."""
    cells, _ = plan(read_config(name, small=True))
    assert cells


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs_plan_at_full_scale(
    name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With files where it looks for them (ours stand for the paper's) each has cells; morl skips none of its own."""
    monkeypatch.chdir(tmp_path)
    table = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    experts = [
        expert for method in table["methods"] if isinstance(method, dict) for expert in method.get("experts", ())
    ]
    for place in [*(table.get("adapters") or {}).values(), *(expert["adapter"] for expert in experts)]:
        if "/" in place:
            shutil.copytree(files / "jpeg", place, dirs_exist_ok=True)
    if isinstance(table["prompts"], str) and "." in table["prompts"]:
        lines = table["prompts"].endswith(".jsonl")
        text = json.dumps({"prompt": "a bench", "tag": "single_object"}) if lines else json.dumps(PROMPTS)
        Path(table["prompts"]).parent.mkdir(exist_ok=True)
        Path(table["prompts"]).write_text(text)
    cells, skipped = plan(read_config(name))
    assert all("vila has none" in cell.reason for cell in skipped if cell.label.startswith("rgg"))
    single = sum(
        1 for cell in cells if cell.method == "morl" and max(cell.weights.values()) == 1 and cell.kl_scale == 1
    )
    assert len([cell for cell in cells if cell.method == "morl"]) - single == len(experts)


def test_defaults_and_files(files: Path) -> None:
    """Tags come from GenEval's lines, a prompt that stands twice is taken once, one reward needs no preferences."""
    lines = [{"prompt": text, "tag": "colors"} for text in (*PROMPTS, PROMPTS[0])]
    (files / "tagged.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    adapters = {"jpeg": str(files / "jpeg")}
    changes = {"prompts": str(files / "tagged.jsonl"), "prompt_limit": 2, "seeds": [5, 3], "preferences": None}
    path = write_config(files, "defaults", rewards={"jpeg": "jpeg"}, adapters=adapters, **changes)
    config = read_config(str(path))
    assert [(prompt.text, prompt.tag) for prompt in config.prompts] == [(text, "colors") for text in PROMPTS[:2]]
    assert config.seeds == (5, 3)
    assert config.preferences == ({"jpeg": 1.0},)
    assert config.lambdas == (1.0,)


def test_mini_replaces_keys(files: Path) -> None:
    """The keys of `mini` replace the others', and what belongs to the large model alone falls away."""
    given = table(files) | {"rewards": {"jpeg": "jpeg"}, "adapters": {"jpeg": str(files / "jpeg")}, "preferences": None}
    given["mini"] = {"steps": 7, "prompts": "train", "prompt_limit": 3}
    path = files / "twin.yaml"
    path.write_text(yaml.safe_dump(given))
    full, small = read_config(str(path)), read_config(str(path), small=True)
    assert (full.steps, small.steps) == (2, 7)
    assert full.model is not None
    assert small.model is None
    assert small.adapters["jpeg"].name == "jpeg" != full.adapters["jpeg"]
    with pytest.raises(ValueError, match="has no mini"):
        read_config(str(write_config(files, "alone")), small=True)


def test_grids_hold_every_multiple_once() -> None:
    """Three rewards at 1/4: all 15 triples of quarters that sum to 1, and for two rewards the first weight grows."""
    grid = simplex_grid(["a", "b", "c"], 0.25)
    quarters = {tuple(round(4 * w) for w in weights.values()) for weights in grid}
    assert quarters == {(i, j, 4 - i - j) for i in range(5) for j in range(5 - i)}
    assert len(grid) == 15
    assert [weights["a"] for weights in simplex_grid(["a", "b"], 0.1)] == [i / 10 for i in range(11)]
    assert simplex_grid(["a"], 0.1) == ({"a": 1.0},)
