"""DPOK: fine-tune an adapter for one reward by policy gradient, under a KL penalty to the base model.

Fan et al. 2023; paper eq. 4: maximise `E[r(x_0)] - alpha sum_t KL(p_t(.|x_t) || p_t^pre(.|x_t))` over DDIM's Gaussian
steps. Each round samples trajectories with the current policy, scores their images, fits the value function, and makes
a few clipped policy-gradient updates on their transitions.

Every process samples its share of the images and computes its share of every gradient; what they know (buffer, value
function, weights) is the same on all.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, reduce
from torch import Tensor

from scale.train import checkpoint
from scale.train.advantage import centred, generalized_advantages
from scale.train.buffer import Trajectories, Transitions
from scale.train.divergence import Diverged, check_history, check_states, check_update
from scale.train.policy import Policy, Reward, Rollout, kl_divergence, log_probability, step_kls
from scale.train.settings import Dpok
from scale.train.value import Value, fit_value

Record = dict[str, float]
"""Of a round: reward and spread (mean and standard deviation of its images' scores), kl (of a trajectory, in nats),
ratio (the largest |ratio - 1|), gradient (norm before clipping), value_loss, learning_rate."""


def train(
    policy: Policy, reward: Reward, prompts: Sequence[str], settings: Dpok, work: Path, *,
    observe: Callable[[int, Record], object] = lambda index, record: None,
) -> list[Record]:  # fmt: skip
    """Train the policy's adapter in place; one record a round, `observe(index, record)` after each.

    A killed run resumes from the last checkpoint in `work`, and ends as an uninterrupted one.

    Raises:
        ValueError: no prompts, shares that the processes cannot split evenly, a reward that tells no images apart, or
            a `work` folder of a run with other settings.
        Diverged: the run was stopped; the message names the checkpoint that is left.
    """
    learner = Learner(policy, reward, prompts, settings)
    history, seconds = checkpoint.resume(learner, work)
    start = monotonic() - seconds
    for index in range(len(history), settings.rounds):
        try:
            record = learner.round(index)
            history.append(record)
            check_history(history, settings)
        except Diverged as error:
            raise Diverged(f"{error}; stopped in round {index + 1}, {checkpoint.last_good(work)}") from error
        last = index + 1 == settings.rounds
        if PartialState().is_main_process and (last or (index + 1) % settings.checkpoint_every == 0):
            checkpoint.save(learner, history, monotonic() - start, work)
        observe(index, record)
    PartialState().wait_for_everyone()
    return history


class Learner:
    """A policy, its value function, their optimizers, and the newest trajectories."""

    def __init__(self, policy: Policy, reward: Reward, prompts: Sequence[str], settings: Dpok) -> None:
        processes = PartialState().num_processes
        if not prompts:
            raise ValueError("training needs prompts, received none")
        if settings.images % processes or settings.batch % processes:
            raise ValueError(
                f"{processes} processes cannot share {settings.images} images a round and updates of {settings.batch} "
                "transitions evenly; choose multiples"
            )
        self.policy, self.reward, self.prompts, self.settings = policy, reward, list(prompts), settings
        self.parameters = list(policy.trainable().values())
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=settings.precision == "fp16")  # pyright: ignore
        self.buffer: Trajectories | None = None
        self.drew: dict[str, Tensor] = {}
        """The adapter that drew the newest images."""
        self.value, self.value_optimizer = self._value()

    def _value(self) -> tuple[Value, torch.optim.Optimizer]:
        """The value function for the policy's shapes, which a trajectory of its own tells."""
        peek = self.policy.rollout(self.prompts[:1], [torch.Generator().manual_seed(0)])
        width = self.policy.features(peek.condition).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            value = Value(tuple(peek.states.shape[2:]), width, self.policy.steps).to(self.policy.device)
        return value, torch.optim.Adam(value.parameters(), lr=self.settings.value_learning_rate)

    def round(self, index: int) -> Record:
        """Sample, score, update the policy, then the value function, which so never saw what it judged."""
        settings = self.settings
        self.drew = {name: p.detach().clone() for name, p in self.policy.trainable().items()}
        new = self._sample(index)
        if not bool(new.returns.std() > 0) and index == 0:
            raise ValueError(f"{self.reward.name} gave the images of the first round one score: nothing to learn")
        self.buffer = new if self.buffer is None else self.buffer.followed_by(new, settings.trajectories)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - index / settings.rounds if settings.decay else 1.0)
        record = {"reward": float(new.returns.mean()), "spread": float(new.returns.std())}
        record |= self._improve(self.buffer if settings.replay else new, index)
        record["value_loss"] = fit_value(
            self.value, self.value_optimizer, self.buffer.value_data(), settings.value_updates, settings.value_batch,
            generator_of(settings.seed, index, 2),
        )  # fmt: skip
        if PartialState().num_processes > 1:  # kernels need not be deterministic: one function for all
            for parameter in self.value.parameters():
                broadcast(parameter.data)
        return record | {"learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _sample(self, index: int) -> Trajectories:
        """This round's trajectories of all processes, with their advantages."""
        settings, state = self.settings, PartialState()
        chosen = balanced(self.prompts, settings.prompts_per_round, index, settings.seed)
        texts = [prompt for prompt in chosen for _ in range(settings.samples_per_prompt)]
        share = len(texts) // state.num_processes
        mine = range(state.process_index * share, (state.process_index + 1) * share)
        rollouts = []
        for start in range(0, share, settings.rollout_batch):
            rows = mine[start : start + settings.rollout_batch]
            generators = [generator_of(settings.seed, index, 3 + i) for i in rows]
            rollouts.append(self.policy.rollout([texts[i] for i in rows], generators))
        check_states([rollout.states for rollout in rollouts])
        whole = Trajectories.joined([self._scored(rollout) for rollout in rollouts])
        if state.num_processes > 1:
            whole = whole.mapped(lambda value: gather(value.contiguous()))  # pyright: ignore[reportArgumentType]
        values = self._values(whole)
        advantages = generalized_advantages(values, whole.returns, settings.trace) + whole.advantages
        return whole.with_advantages(centred(advantages, settings.samples_per_prompt))

    def _scored(self, rollout: Rollout) -> Trajectories:
        """A rollout with its rewards, and those of the guesses; its advantages are yet the price of later KL alone."""
        settings, score, prompts = self.settings, self.reward.score, rollout.prompts
        hints = torch.zeros_like(rollout.log_probabilities)
        if settings.look_ahead:
            hints = torch.stack([score(self.policy.decode(guess), prompts).to(hints) for guess in rollout.guesses])
        price = torch.zeros_like(hints)
        if settings.later_kl:
            kls = step_kls(self.policy, rollout)
            price = settings.alpha * (kls.flip(0).cumsum(0).flip(0) - kls)
        return Trajectories(
            rollout.states, rollout.guesses, hints, rollout.log_probabilities, -price,
            score(rollout.images, prompts).to(hints), self.policy.features(rollout.condition), rollout.condition,
        )  # fmt: skip

    @torch.no_grad()
    def _values(self, whole: Trajectories) -> Tensor:
        data = whole.value_data()
        parts = zip(*(data[name].split(1024) for name in ("guess", "text", "k", "hint")), strict=True)
        return torch.cat([self.value(*part) for part in parts]).unflatten(0, (whole.steps, len(whole)))

    def _improve(self, pool: Trajectories, index: int) -> Record:
        """Clipped policy-gradient updates on shuffled transitions, every one of the pool before any comes twice."""
        settings, state, records = self.settings, PartialState(), []
        generator = generator_of(settings.seed, index, 1)
        for rows in shuffled(pool.steps * len(pool), settings.updates, settings.batch, generator):
            share, sums = rows[state.process_index :: state.num_processes], []
            self.optimizer.zero_grad(set_to_none=True)
            for part in share.split(settings.microbatch):
                loss, kl, ratio = self._loss(pool.transitions(part))
                self.scaler.scale(loss * (len(part) / len(share))).backward()
                sums.append(torch.stack((kl * (len(part) / len(share)), ratio)).detach())
            kls, ratios = torch.stack(sums).unbind(1)
            seen = gather(torch.stack((kls.sum(), ratios.max())).view(1, 2))
            records.append({"kl": float(seen[:, 0].mean()), "ratio": float(seen[:, 1].max()), "gradient": self._step()})
            check_update(records[-1], self.scaler, settings)
        return {
            "kl": sum(r["kl"] for r in records) / len(records),
            "ratio": max(r["ratio"] for r in records),
            "gradient": sum(r["gradient"] for r in records) / len(records),
        }

    def _loss(self, batch: Transitions) -> tuple[Tensor, Tensor, Tensor]:
        """The clipped objective with its KL penalty; the KL of a trajectory in nats; the largest |ratio - 1|."""
        settings, policy = self.settings, self.policy
        with torch.no_grad(), policy.base():
            base_mean, _ = policy.moments(batch.x, batch.k, batch.condition)
        mean, std = policy.moments(batch.x, batch.k, batch.condition)
        ratio = (log_probability(batch.x_next, mean, std) - batch.log_probability).exp()
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
        gain = torch.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
        # both per dimension, so that alpha is reward a nat
        kl = kl_divergence(mean, base_mean, std).mean()
        loss = settings.reward_weight * (settings.alpha * kl - gain)
        return loss, kl * batch.x[0].numel() * policy.steps, (ratio - 1).abs().max()

    def _step(self) -> float:
        """Average the processes' gradients, clip, update; the norm before clipping."""
        if PartialState().num_processes > 1:
            for parameter in self.parameters:
                parameter.grad = reduce(parameter.grad, "mean")  # pyright: ignore[reportAttributeAccessIssue]
        self.scaler.unscale_(self.optimizer)  # after the average, so that all processes see the same overflow
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(norm)


def generator_of(seed: int, index: int, stream: int) -> torch.Generator:
    """A CPU generator of its own for every use in every round: nothing depends on what was drawn before."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + index) * 1_000_003 + stream) % 2**63)


def balanced(prompts: Sequence[str], count: int, index: int, seed: int) -> list[str]:
    """The prompts of a round: the list is shuffled and dealt out, and shuffled again when it is used up."""
    positions = range(index * count, (index + 1) * count)
    orders: dict[int, list[int]] = {
        epoch: torch.randperm(len(prompts), generator=generator_of(seed, epoch, 0)).tolist()
        for epoch in {position // len(prompts) for position in positions}
    }
    return [prompts[orders[p // len(prompts)][p % len(prompts)]] for p in positions]


def shuffled(total: int, updates: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers for `updates` updates of `batch` each; all `total` rows before any of them again."""
    rounds = -(-updates * batch // total)
    order = torch.cat([torch.randperm(total, generator=generator) for _ in range(rounds)])
    return iter(order[: updates * batch].split(batch))
