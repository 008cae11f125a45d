"""The command `dblend train`: flags into an experiment, checked before any long work, then one run."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import UseAppendAction

if TYPE_CHECKING:
    from scale.train.experiment import Experiment

# a flag with several words that may also be repeated: one tuple for each time it is given
Words = UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Train:
    """Fine-tune an adapter for a reward: a LoRA file that `dblend generate --adapter` takes, and how it was made."""

    reward: str | None = None
    """A sum of rewards, e.g. "0.2*alignment + 0.8*colorfulness"; a wrong name lists them all."""
    model: str | None = None
    """A diffusers folder or hub id of Stable Diffusion 1, 2 or XL; the shipped small world if not given."""
    prompt_file: Path | None = None
    """A JSON list of prompts, or a text file with one a line; the small world has its own."""
    alpha: float | None = None
    """Weight of the KL to the base model: smaller goes further from it."""
    algorithm: str | None = None
    """dpok (policy gradient) or tilted (reward-weighted denoising)."""
    preset: str | None = None
    """Settings to start from: mini (the small world's) or paper."""
    config: str | None = None
    """An experiment of the paper, e.g. sd15-imagereward (a wrong name lists them all), or a YAML file like theirs."""
    reward_model: Words = ()
    """NAME=FOLDER or NAME=HUB_ID of a reward's own weights, e.g. pickscore=models/pickscore."""
    rounds: int | None = None
    """Rounds of sampling, scoring and updating."""
    set: Words = ()
    """NAME=VALUE of any setting of the algorithm; a wrong name lists them all."""
    seed: int | None = None
    out: Path = Path("out/train")
    """Folder of the adapter and of training.json; another adapter that it holds is refused."""
    work: Path | None = None
    """Folder of checkpoints, logs and sheets of samples; OUT/work if not given. A killed run resumes from it."""
    samples: Path | None = None
    """Of tilted: folder of the base model's samples, which runs for other rewards may share; in WORK if not given."""
    json: bool = False
    """Print the figures as JSON."""

    def run(self) -> int:
        from scale.prompts import parse_pairs

        models = parse_pairs(list(chain(*self.reward_model)), "reward-model", "pickscore=models/pickscore")
        experiment = self._experiment(parse_pairs(list(chain(*self.set)), "set", "learning_rate=1e-4"))
        if not experiment.reward:
            raise ValueError('give --reward EXPRESSION, e.g. "0.2*alignment + 0.8*colorfulness", or --config NAME')
        return self._train(experiment, experiment.make_settings(), self._prompts(experiment), models)

    def _experiment(self, values: dict[str, str]) -> "Experiment":
        """The config's, with the flags over it."""
        from scale.train.experiment import Experiment, read_config

        base = read_config(self.config) if self.config else Experiment()
        flags = {name: getattr(self, name) for name in ("reward", "model", "algorithm", "preset")}
        single = {name: getattr(self, name) for name in ("alpha", "rounds", "seed")}
        if twice := [name for name in single if single[name] is not None and name in values]:
            raise ValueError(f"{twice[0]} is given twice, by its own flag and by --set")
        given = {name: value for name, value in single.items() if value is not None}
        base = replace(base, settings={**base.settings, **given, **values})
        return replace(base, **{name: value for name, value in flags.items() if value is not None})

    def _prompts(self, experiment: "Experiment") -> list[str]:
        from scale.prompts import read_prompts

        if self.prompt_file is not None:
            return read_prompts(self.prompt_file)
        if experiment.prompts:
            return list(experiment.prompts)
        if experiment.model is None:
            from scale.mini import world

            return list(world.train_prompts())
        what = f": {experiment.needs}" if experiment.needs else ""
        raise ValueError(f"no prompts to train on; give --prompt-file FILE{what}")

    def _train(self, experiment: "Experiment", settings: Any, prompts: Sequence[str], models: dict[str, str]) -> int:
        import torch
        from accelerate import PartialState

        from scale import mini
        from scale.pipeline import open_pipeline
        from scale.rewards.expression import parse_reward
        from scale.train.divergence import Diverged
        from scale.train.run import PRECISIONS, check_folders, fine_tune, identity

        state = PartialState(cpu=not torch.cuda.is_available())  # decides which GPU is this process's
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != state.num_processes:  # each would train alone, into one folder
            raise ValueError(f"{launched} processes were launched, but only {state.num_processes} know of each other")
        device = torch.device(state.device or "cpu")
        reward = parse_reward(experiment.reward, models)
        if unknown := [prompt for prompt in prompts if not reward.knows(prompt)]:
            raise ValueError(
                f"the reward {reward.name} cannot score images of {len(unknown)} of the {len(prompts)} prompts, "
                f"the first is {unknown[0]!r}; alignment knows the small world's captions alone"
            )
        work = self.work or self.out / "work"
        check_folders(identity(reward.name, prompts, settings, experiment.model, models), work, self.out)
        # frozen weights take half the memory on a GPU
        dtype = PRECISIONS[settings.precision] if device.type == "cuda" else torch.float32
        pipe: Any = open_pipeline(experiment.model or mini.MODEL, dtype)
        try:
            card = fine_tune(
                pipe.to(device), reward, prompts, settings, work, self.out,
                reward_models=models, model=experiment.model, samples=self.samples,
            )  # fmt: skip
        except Diverged as error:
            print(f"dblend: {error}", file=sys.stderr)
            return 1
        if state.is_main_process:
            print(self._shown(card, work))
        if state.num_processes > 1:
            state.destroy_process_group()
        return 0

    def _shown(self, card: dict[str, Any], work: Path) -> str:
        figures = {name: value for name, value in card.items() if name != "history"}
        figures |= {"last_round": card["history"][-1], "out": str(self.out), "work": str(work)}
        if self.json:
            return json.dumps(figures, indent=1, allow_nan=False)
        names = ("images", "reward_first", "reward_last", "reward_goal", "kl", "seconds")
        lines = [f"{card['algorithm']} on {card['model']}, reward {card['reward']}, {card['prompts']} prompts"]
        lines += [
            f"{name.replace('_', ' '):>12}  {value:.4g}" for name in names if (value := figures.get(name)) is not None
        ]
        return "\n".join([*lines, f"the adapter and its record are in {self.out}; logs and checkpoints in {work}"])
