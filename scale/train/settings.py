"""The settings of DPOK, and the presets that people start from."""

from dataclasses import dataclass, replace

from scale.train.denoiser import ATTENTION, CONVOLUTIONS


@dataclass(frozen=True)
class Dpok:
    """Settings of a run; the defaults are the small world's, `PRESETS["paper"]` are those of the paper."""

    alpha: float = 1e-2
    """Weight of the KL to the base model: reward a nat, the KL summed over steps and dimensions (paper eq. 4)."""
    later_kl: bool = False
    """Blame a step for the KL that it causes later, as eq. 4 does and DPOK as published does not: docs/MATH.md 10."""
    rounds: int = 24
    """Rounds of sampling, scoring and updating."""
    prompts_per_round: int = 8
    samples_per_prompt: int = 8
    """Several images a prompt give it a baseline of its own: the mean of the others."""
    rollout_batch: int = 64
    """Images at a time while sampling, on each process."""
    steps: int = 10
    """DDIM steps of a trajectory, eta = 1."""
    guidance: float = 1.0
    """1 is none: half the cost, and what the theory speaks of."""
    size: int | None = None
    """Height and width of the images in pixels; the model's own if not given."""

    trace: float = 0.0
    """Of the advantage: 1 is return minus value, as in DPOK; 0 the change of the value over one step."""
    look_ahead: bool = True
    """Show the value function the reward of the model's own guess of the image at every step."""
    value_updates: int = 20
    """Least-squares steps of the value function a round."""
    value_batch: int = 256
    value_learning_rate: float = 1e-3

    buffer: int = 2560
    """Transitions that are kept, the newest; at least a round's. The value function learns from all of them."""
    replay: bool = False
    """Let the policy's updates draw from the whole buffer too, rather than from the newest round alone."""
    updates: int = 5
    """Policy updates a round."""
    batch: int = 128
    """Transitions an update, over all processes."""
    microbatch: int = 64
    """Transitions at a time on each process; gradients accumulate over them."""
    clip: float = 1e-2
    """The probability ratio per dimension is clipped to 1 +- clip."""
    learning_rate: float = 2e-3
    decay: bool = True
    """Lower the learning rate linearly to zero over the run, which averages the noise of the last rounds out."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    reward_weight: float = 1.0
    """Multiplies the whole loss: it matters to the clipping of gradients alone."""

    rank: int = 4
    targets: tuple[str, ...] = ATTENTION + CONVOLUTIONS
    """Layers that the adapter is on, by the ends of their names."""
    precision: str = "bf16"
    """Of the denoiser's arithmetic: no (float32), bf16 or fp16. The adapter is always kept in float32."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""

    max_ratio: float = 0.5
    """The run stops where a probability ratio per dimension leaves 1 +- this."""
    collapse: float = 2.0
    """The run stops where the reward has fallen by this many standard deviations of the first round's images."""
    checkpoint_every: int = 1
    """Rounds between checkpoints; a killed run resumes from the last."""
    sheet_every: int = 0
    """Rounds between sheets of sample images; 0 draws none."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, received {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, received {getattr(self, name)}")
        if self.images < 2:
            raise ValueError("a round needs two images at least: one has nothing to be compared with")
        check_numbers(self.learning_rate, self.size)
        if not 0 <= self.trace <= 1:
            raise ValueError(f"trace must lie in [0, 1], received {self.trace}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be no, bf16 or fp16, received {self.precision!r}")

    @property
    def images(self) -> int:
        """Images a round."""
        return self.prompts_per_round * self.samples_per_prompt

    @property
    def trajectories(self) -> int:
        """Trajectories that the buffer holds: at least a round's."""
        return max(self.images, self.buffer // self.steps)


def check_numbers(learning_rate: float, size: int | None) -> None:
    """ValueError for a learning rate that no optimizer takes, or a size that no image has."""
    if not learning_rate <= 1e6:
        raise ValueError(f"learning_rate must be at most 1e6, received {learning_rate}")
    if size is not None and not size > 0:
        raise ValueError(f"size must be positive, received {size}")


_POSITIVE = (
    "alpha", "rounds", "prompts_per_round", "samples_per_prompt", "rollout_batch", "steps", "value_batch",
    "value_learning_rate", "updates", "batch", "microbatch", "clip", "learning_rate", "max_grad_norm", "reward_weight",
    "rank", "max_ratio", "collapse", "checkpoint_every",
)  # fmt: skip
_NOT_NEGATIVE = ("guidance", "value_updates", "buffer", "weight_decay", "sheet_every")

MINI = Dpok()
# The paper's figures: 6 prompts a round and about 96,000 online samples; 2 x 12 transitions an update, 5 updates and 5
# steps of the value a round. KL weight 0.1 and reward weight 1000 are taken for weights of means over dimensions, so
# alpha is their ratio; copies of DPOK's code do not divide the squared difference by the step's variance as a KL does.
PAPER = replace(
    MINI, alpha=1e-4, reward_weight=1000.0, rounds=16_000, prompts_per_round=6, samples_per_prompt=1, rollout_batch=6,
    steps=50, guidance=7.5, trace=1.0, look_ahead=False, value_updates=5, value_batch=256, value_learning_rate=1e-4,
    buffer=1000, replay=True, updates=5, batch=24, microbatch=2, clip=1e-4, learning_rate=1e-5, decay=False,
    weight_decay=1e-2, max_grad_norm=0.1, rank=4, targets=ATTENTION, precision="fp16", gradient_checkpointing=True,
    checkpoint_every=50, sheet_every=250,
)  # fmt: skip
PRESETS = {"mini": MINI, "paper": PAPER}
