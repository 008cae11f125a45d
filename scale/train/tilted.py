"""Reward-weighted denoising: fine-tune an adapter on the base model's own samples, weighted by their rewards.

The samples `x_0 ~ p_pre` of a prompt are scored once and get weights `w = e^{r / alpha} / mean e^{r / alpha}`. With
`x_t = a x_0 + s z`, least squares are solved pointwise in x_t, and the noise is the same under every law of x_0:

    argmin E_pre[w |eps(x_t) - z|^2] = E_pre[w z | x_t] / E_pre[w | x_t] = E_tar[z | x_t] = -s grad log p_tar,t(x_t),

the score of `p_tar ∝ p_pre e^{r / alpha}` (paper eq. 6) itself, for every prompt (its normaliser cancels), and not the
step-wise optimum of DPOK. That loss alone mostly teaches a model to fit its own samples, which no real base does
exactly; so its gradient gets a control variate, which an exact base leaves at mean zero whatever c is:

    w |eps - z|^2 + 2 c(x_t) <eps - eps_pre, z - eps_pre>,    E_pre[z | x_t] = eps_pre(x_t),

with `c(x_t) = e^{r(guess(x_t)) / alpha}` over the same mean: what the base's own guess of the image promises. An
inexact base moves the minimiser, by `-c E[z - eps_pre | x_t] / E[w | x_t]`: its error is learned no more, where c is
right.

Three things part a run from p_tar. `p_pre` is the law of the samples, so of DDIM at `steps` steps. A mean over n
samples stands for the normaliser, so weights never exceed n, a bias of order 1 / n. And the samples are finitely many:
of n, `n e^{-Var(r) / alpha^2}` count for Gaussian rewards, as long as that is far above 1. Where it is below 2 or so,
which is alpha below sd(r) / sqrt(log(n / 2)), only an online method such as DPOK gets on.
"""

from collections.abc import Callable, Sequence
from math import isfinite, log
from pathlib import Path
from time import monotonic

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor

from dbtheory.files import write_atomically
from scale.train.checkpoint import LAST, plain, put
from scale.train.divergence import Diverged
from scale.train.dpok import balanced, generator_of
from scale.train.policy import Reward, State, rows_of
from scale.train.tilted_samples import NoisePolicy, base_samples, scores
from scale.train.tilted_settings import Tilted

FEWEST = 1.5  # mean effective samples a prompt below which nearly all weight sits on single samples
Record = dict[str, float]
"""Of a round: loss (weighted mean squared error of the noise, per dimension), gradient (norm before clipping),
learning_rate; and of the whole run: reward (the samples' mean), goal (their weighted mean, what the target promises),
effective (mean effective sample size of a prompt), starved (share of prompts where it is below 2)."""


def log_normalizers(rewards: Float[Tensor, " n"], group: int, alpha: float) -> Float[Tensor, " groups"]:
    """Log of the mean of `e^{r / alpha}` in every group; groups of `group` lie together."""
    return (rewards.unflatten(0, (-1, group)) / alpha).logsumexp(1) - log(group)


def tilted_weights(rewards: Float[Tensor, " n"], group: int, alpha: float) -> Float[Tensor, " n"]:
    """`e^{r / alpha}` over its mean in the sample's group; groups of `group` lie together."""
    return (rewards / alpha - log_normalizers(rewards, group, alpha).repeat_interleave(group)).exp()


def effective_sizes(weights: Float[Tensor, " n"], group: int) -> Float[Tensor, " groups"]:
    """Effective sample size of every group, `(sum w)^2 / sum w^2`, from 1 to `group`."""
    groups = weights.unflatten(0, (-1, group))
    return groups.sum(1).square() / groups.square().sum(1)


def weighted_loss(prediction: State, noise: State, weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """`mean w |eps - z|^2`, per dimension."""
    return (weights * (prediction - noise).square().flatten(1).mean(1)).mean()


def control_variate(
    prediction: State, base: State, noise: State,
    promise: Float[Tensor, " n"],
) -> Float[Tensor, ""]:  # fmt: skip
    """`2 mean c <eps - eps_pre, z - eps_pre>`, per dimension, for any `promise` c that x_t alone decides.

    Added to `weighted_loss` it takes from the gradient's noise what the weights' mean given x_t put there.
    """
    return 2 * (promise * ((prediction - base) * (noise - base)).flatten(1).mean(1)).mean()


def train(
    policy: NoisePolicy, reward: Reward, prompts: Sequence[str], settings: Tilted, work: Path, *,
    samples: Path | None = None, observe: Callable[[int, Record], object] = lambda index, record: None,
) -> list[Record]:  # fmt: skip
    """Train the policy's adapter in place; one record a round, `observe(index, record)` after each.

    `samples` is a folder of base samples, which experts of other rewards may share: made if it is not there, by
    default inside `work`. A killed run resumes from the last checkpoint in `work`, and ends as an uninterrupted one.

    Raises:
        ValueError: no prompts, a batch that the processes cannot split evenly, a reward that tells no images of a
            prompt apart, nearly all weight on single samples, or a folder of other settings.
        Diverged: the loss is no longer finite.
    """
    if not prompts:
        raise ValueError("training needs prompts, received none")
    if settings.batch % PartialState().num_processes:
        raise ValueError(
            f"{PartialState().num_processes} processes cannot share updates of {settings.batch} samples evenly; "
            "choose a multiple"
        )
    chosen = balanced(prompts, min(settings.prompts, len(prompts)), 0, settings.seed)
    texts = [prompt for prompt in chosen for _ in range(settings.samples_per_prompt)]
    data = base_samples(policy, texts, settings, samples or work / "samples")
    rewards = scores(policy, reward, data, texts, settings, work / "scores")
    facts = summary(rewards, settings, reward.name)
    student = Student(policy, reward, chosen, data, rewards, settings)
    history, seconds = _resume(student, work)
    start = monotonic() - seconds
    for index in range(len(history), settings.rounds):
        try:
            record = student.round(index) | facts
        except Diverged as error:
            kept = f"the last good weights are in {work / LAST}" if (work / LAST).exists() else "before any checkpoint"
            raise Diverged(f"{error}; stopped in round {index + 1}, {kept}") from error
        history.append(record)
        last = index + 1 == settings.rounds
        if PartialState().is_main_process and (last or (index + 1) % settings.checkpoint_every == 0):
            _save(student, history, monotonic() - start, work)
        observe(index, record)
    PartialState().wait_for_everyone()
    return history


def summary(rewards: Float[Tensor, " n"], settings: Tilted, name: str) -> Record:
    """What the samples' rewards tell of the run: reward, goal, effective, starved.

    Raises:
        ValueError: the rewards tell no samples of a prompt apart, or leave fewer than 1.5 effective ones.
    """
    group = settings.samples_per_prompt
    spread = float(rewards.unflatten(0, (-1, group)).var(1).mean().sqrt())
    if not spread > 0:
        raise ValueError(f"{name} gave the images of every prompt one score: nothing to learn")
    weights = tilted_weights(rewards, group, settings.alpha)
    sizes = effective_sizes(weights, group)
    if not sizes.mean() >= FEWEST:  # NaN too, where alpha is next to nothing
        enough = settings.alpha
        while not effective_sizes(tilted_weights(rewards, group, enough), group).mean() >= FEWEST:
            enough *= 1.1
        raise ValueError(
            f"{sizes.mean():.2f} of {group} samples a prompt are effective: alpha {settings.alpha:g} is small beside "
            f"the reward's spread of {spread:.3g} within a prompt; raise alpha to {enough:.2g} at least, or draw more "
            "samples_per_prompt"
        )
    return {
        "reward": float(rewards.mean()), "goal": float((weights * rewards).mean()),
        "effective": float(sizes.mean()), "starved": float((sizes < 2).float().mean()),
    }  # fmt: skip


class Student:
    """A policy that learns to denoise weighted samples, and its optimizer."""

    def __init__(
        self, policy: NoisePolicy, reward: Reward, prompts: Sequence[str], samples: State,
        rewards: Float[Tensor, " n"], settings: Tilted,
    ) -> None:  # fmt: skip
        group, alpha = settings.samples_per_prompt, settings.alpha
        self.policy, self.reward, self.prompts, self.settings = policy, reward, list(prompts), settings
        self.samples, self.weights = samples, tilted_weights(rewards, group, alpha)
        self.log_normalizers = log_normalizers(rewards, group, alpha)
        self.condition = policy.encode(prompts)  # a row a prompt
        self.parameters = list(policy.trainable().values())
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay)
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=settings.precision == "fp16")  # pyright: ignore

    def round(self, index: int) -> Record:
        """A round's updates; the means of their records."""
        updates = self.settings.updates
        records = [self._update(update) for update in range(index * updates, (index + 1) * updates)]
        return {name: sum(record[name] for record in records) / updates for name in records[0]}

    def _update(self, update: int) -> Record:
        """One step of the optimizer, on this process's share of an update's samples, steps and noise."""
        settings, state = self.settings, PartialState()
        generator = generator_of(settings.seed, update, 2)
        rows = torch.randint(len(self.samples), (settings.batch,), generator=generator)
        k = torch.randint(self.policy.steps, (settings.batch,), generator=generator)
        noise = torch.randn(self.samples[rows].shape, generator=generator)
        share = torch.arange(state.process_index, settings.batch, state.num_processes)
        rate = settings.learning_rate * (1 - update / (settings.rounds * settings.updates) if settings.decay else 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in share.split(settings.microbatch):
            loss = self._loss(rows[part], k[part], noise[part]) * (len(part) / len(share))
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        loss = float(reduce(torch.stack(losses).sum(), "mean"))  # pyright: ignore[reportArgumentType]
        return {"loss": loss, "gradient": self._step(loss), "learning_rate": rate}

    def _loss(self, rows: Tensor, k: Tensor, noise: Tensor) -> Tensor:
        policy, device, prompt = self.policy, self.policy.device, rows // self.settings.samples_per_prompt
        k, noise, samples = k.to(device), noise.to(device), self.samples[rows].to(device)
        alpha = policy.alphas[k].view(-1, *[1] * (noise.ndim - 1))
        x = alpha.sqrt() * samples + (1 - alpha).sqrt() * noise
        condition = rows_of(self.condition, prompt.to(device))
        weights = self.weights[rows].to(device)
        if not self.settings.look_ahead:
            return weighted_loss(policy.noise(x, k, condition), noise, weights)
        # before the student's prediction, whose graph would lie in memory meanwhile
        with torch.no_grad(), policy.base():
            base = policy.noise(x, k, condition)
        promise = self._promise((x - (1 - alpha).sqrt() * base) / alpha.sqrt(), prompt)
        eps = policy.noise(x, k, condition)
        return weighted_loss(eps, noise, weights) + control_variate(eps, base, noise, promise)

    @torch.no_grad()
    def _promise(self, guess: Tensor, prompt: Tensor) -> Tensor:
        """The weight that the guess of the data would have as a sample."""
        rewards = self.reward.score(self.policy.decode(guess), [self.prompts[i] for i in prompt.tolist()])
        log_weights = rewards.to(guess) / self.settings.alpha - self.log_normalizers[prompt].to(guess)
        return log_weights.exp().clamp(max=self.settings.samples_per_prompt)

    def _step(self, loss: float) -> float:
        """Average the processes' gradients, clip, update; the norm before clipping."""
        if PartialState().num_processes > 1:
            for parameter in self.parameters:
                parameter.grad = reduce(parameter.grad, "mean")  # pyright: ignore[reportAttributeAccessIssue]
        self.scaler.unscale_(self.optimizer)  # after the mean, or an overflow on one process would be seen by that one
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        # under fp16 an overflow now and then is the scaler's business, unless it has nowhere left to go
        if not isfinite(loss) or not (isfinite(norm) or (self.scaler.is_enabled() and self.scaler.get_scale() > 1)):
            raise Diverged(f"the loss is not finite: {loss:g}, gradient norm {norm:g}; lower the learning rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm


def _save(student: Student, history: list[Record], seconds: float, work: Path) -> None:
    state = {
        "settings": plain(student.settings),
        "weights": student.weights,
        "adapter": {name: p.detach() for name, p in student.policy.trainable().items()},
        "optimizer": student.optimizer.state_dict(),
        "scaler": student.scaler.state_dict(),
        "history": history,
        "seconds": seconds,
    }
    write_atomically(work / LAST, lambda path: torch.save(state, path))


def _resume(student: Student, work: Path) -> tuple[list[Record], float]:
    """Put the last checkpoint into the student; its records and seconds, empty and 0 where there is none."""
    path = work / LAST
    if not path.exists():
        return [], 0.0
    state = torch.load(path, weights_only=True, map_location="cpu")  # the optimizer keeps its step counters there
    if state["settings"] != plain(student.settings):
        changed = [name for name, value in plain(student.settings).items() if state["settings"].get(name) != value]
        raise ValueError(f"{path} is of a run with another {', '.join(changed)}; choose another folder, or delete it")
    if not torch.equal(state["weights"].to(student.weights), student.weights):
        raise ValueError(f"{path} is of a run on other samples or rewards; choose another folder, or delete it")
    put(student.policy.trainable(), state["adapter"])
    student.optimizer.load_state_dict(state["optimizer"])
    student.scaler.load_state_dict(state["scaler"])
    return state["history"], state["seconds"]
