"""What keeps alignment honest: a data anchor, a held-out judge, bounds on diversity and likeness, a reason to stop.

The judge and the reward differ in architecture and in training images; nothing in this file feeds the judge's opinion
back into a gradient. It only chooses which of the trained adapters is kept, and when to stop.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from medviz.domains.base import ParsedPrompt
from medviz.errors import InputError
from train import processes, seeding
from train.diffusion import denoising_loss


@dataclass(frozen=True)
class Opinion:
    """The judge's view of N images: score (N,) in [-1, 1]; accuracy (N,) share of asked attributes it finds as asked;
    features (N, F) in which images are compared."""

    score: torch.Tensor
    accuracy: torch.Tensor
    features: torch.Tensor

    def gathered(self, count: int) -> "Opinion":
        """The view of all `count` images, of which each process saw its share."""
        return Opinion(*(processes.gather(part, count) for part in (self.score, self.accuracy, self.features)))


Judge = Callable[[torch.Tensor, Sequence[ParsedPrompt]], Opinion]
"""(images (B, 3, H, W) in [-1, 1], their prompts) -> its opinion of them."""


@dataclass(frozen=True)
class Evaluation:
    """One look at a fixed set of N images (prompts and seeds), after `epoch` epochs (0: before any training).

    rewards: of each image, by what is trained on; judge_scores: continuous attribute reward of each in [-1, 1] by the
    held-out network; judge_accuracy: mean share of asked attributes the judge finds as asked; diversity: see
    :func:`diversity`; distance: kernel distance of the judge's features from real images', None where there are none;
    distance_error: standard error of its change since the untrained model, drawn from the same noise. A masked reward
    is left out of `rewards`; an image whose prompt asks for nothing that the judge knows has the score NaN.
    """

    epoch: int
    rewards: tuple[float, ...]
    judge_scores: tuple[float, ...]
    judge_accuracy: float
    diversity: float
    distance: float | None = None
    distance_error: float = 0.0

    @property
    def reward(self) -> float:
        """Mean reward."""
        return float(np.mean(self.rewards)) if self.rewards else float("nan")

    @property
    def judge(self) -> float:
        """Mean judge's score of the images it can judge."""
        return float(np.nanmean(self.judge_scores))

    def judge_fell(self, mark: "Evaluation", tolerance: float) -> bool:
        """Whether the judge's mean is below that of `mark` by more than `tolerance` standard errors of the difference,
        image by image (both looks are at the same prompts and seeds)."""
        difference = np.subtract(self.judge_scores, mark.judge_scores)
        difference = difference[np.isfinite(difference)]
        return bool(difference.mean() < -tolerance * difference.std() / np.sqrt(len(difference)))

    def summary(self) -> dict[str, float]:
        """The figures to log."""
        figures = {
            "reward": self.reward,
            "judge": self.judge,
            "judge_accuracy": self.judge_accuracy,
            "diversity": self.diversity,
        }
        if self.distance is None:
            return figures
        return {**figures, "distance": self.distance, "distance_error": self.distance_error}


@dataclass(frozen=True)
class Verdict:
    """best: this evaluation is the best so far of the eligible ones; stop: why training should end, or ""."""

    best: bool
    stop: str


@dataclass
class Watch:
    """Keeps the best adapter by judge and says when to stop.

    An adapter is eligible that keeps at least `floor` of the untrained model's diversity and lies at most `ceiling`
    times as far from real images as the untrained model does (where distances are looked at). patience: evaluations in
    a row without a new best that all have the reward above and the judge below the best one's, or all lack diversity,
    or all lie too far off, after which training stops. A judge's fall of up to `tolerance` standard errors counts as no
    fall.
    """

    floor: float = 0.85
    patience: int = 2
    tolerance: float = 1.0
    ceiling: float = 1.1
    history: list[Evaluation] = field(default_factory=list)
    best: Evaluation | None = None
    stopped: str = ""

    def consider(self, evaluation: Evaluation) -> Verdict:
        """Take note of `evaluation`; the first one must be of the untrained model (epoch 0).

        The untrained model is never the best: it sets what the others are measured by.
        """
        if not self.history and evaluation.epoch != 0:
            raise InputError(
                f"the first evaluation is of epoch {evaluation.epoch}; it must be of epoch 0, before training"
            )
        self.history.append(evaluation)
        if len(self.history) == 1:
            return Verdict(False, "")
        eligible = self.keeps_diversity(evaluation) and self.keeps_likeness(evaluation)
        if eligible and (self.best is None or evaluation.judge > self.best.judge):
            self.best = evaluation
            return Verdict(True, "")
        self.stopped = self._reason()
        return Verdict(False, self.stopped)

    def keeps_diversity(self, evaluation: Evaluation) -> bool:
        """Whether `evaluation` keeps the floor's share of the untrained model's diversity."""
        return evaluation.diversity >= self.floor * self.history[0].diversity

    def keeps_likeness(self, evaluation: Evaluation) -> bool:
        """Whether `evaluation` lies at most `ceiling` times as far from real images as the untrained model.

        True where distances are not looked at. An unbiased kernel distance may be below 0: the allowance is then as
        large as it would be above.
        """
        untrained = self.history[0].distance
        if untrained is None or evaluation.distance is None:
            return True
        return evaluation.distance <= untrained + (self.ceiling - 1) * abs(untrained)

    def _reason(self) -> str:
        recent = self.history[1:][-self.patience :]
        if len(recent) < self.patience or any(e is self.best for e in recent):
            return ""
        if not any(self.keeps_diversity(e) for e in recent):
            return f"diversity below {self.floor:.0%} of the untrained model's in {self.patience} evaluations in a row"
        if not any(self.keeps_likeness(e) for e in recent):
            return (
                f"more than {self.ceiling:.2f} times as far from real images as the untrained model in "
                f"{self.patience} evaluations in a row"
            )
        mark = self.best or self.history[0]
        if all(self._parted(e, mark) for e in recent):
            return f"reward rose and judge fell against epoch {mark.epoch} in {self.patience} evaluations in a row"
        return ""

    def _parted(self, evaluation: Evaluation, mark: Evaluation) -> bool:
        return evaluation.reward > mark.reward and evaluation.judge_fell(mark, self.tolerance)

    def state(self) -> dict[str, Any]:
        """JSON values that `load_state` takes back exactly."""
        best = None if self.best is None else self.best.epoch
        return {"history": [asdict(e) for e in self.history], "best_epoch": best, "stopped": self.stopped}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        looks = [
            {**e, "rewards": tuple(e["rewards"]), "judge_scores": tuple(e["judge_scores"])} for e in state["history"]
        ]
        self.history = [Evaluation(**look) for look in looks]
        self.best = next((e for e in self.history[1:] if e.epoch == state["best_epoch"]), None)
        self.stopped = state["stopped"]


def diversity(features: torch.Tensor, prompt_ids: np.ndarray) -> float:
    """Mean Euclidean distance between two images of one prompt, averaged over prompts with at least two images.

    features (N, F); prompt_ids int (N,). 0.0 when all images of every prompt are the same. Raises InputError when no
    prompt has two images.
    """
    distances = []
    for prompt_id in np.unique(prompt_ids):
        mine = features[torch.from_numpy(np.flatnonzero(prompt_ids == prompt_id))].double()
        if len(mine) >= 2:
            distances.append(torch.pdist(mine).mean().item())
    if not distances:
        raise InputError("diversity needs at least two images of one prompt; every prompt has one")
    return float(np.mean(distances))


@dataclass
class Anchor:
    """Real images that the policy must go on explaining: the diffusion loss of the first stage on its latents.

    latents (O, N, C, h, w): N images in O orientations; caption(i, rng): a caption of image i; embed: captions to
    (B, L, D); weights (N,): how often each is drawn, or None for all alike. Captions are dropped at the rate of the
    first stage, so that the unconditional half is held in place, too.
    """

    latents: torch.Tensor
    caption: Callable[[int, random.Random], str]
    embed: Callable[[Sequence[str]], torch.Tensor]
    schedule: DDPMScheduler
    seed: int = 0
    weights: np.ndarray | None = None
    caption_dropout: float = 0.1
    min_snr_gamma: float = 5.0

    def accumulate(self, unet: UNet2DConditionModel, update: int, batch: int, weight: float) -> float:
        """Add the gradient of `weight` times the mean loss of the batch of `update`; returns that mean.

        Several processes share the batch: each adds what its samples give to the gradient of the whole mean.
        """
        mine = processes.share(batch)
        mean = self._share(unet, update, batch, mine, weight * len(mine) / batch) if len(mine) else 0.0
        return processes.total({"loss": mean * len(mine) / batch})["loss"]

    def captions(self, count: int, stage: str) -> list[str]:
        """A caption each of `count` of the images, in the mix that they come in; a function of seed and stage."""
        chosen = seeding.batch_indices(self.latents.shape[1], count, 0, self.seed, stage)
        return [
            self.caption(int(i), random.Random(seeding.key(self.seed, f"{stage}-caption", j)))
            for j, i in enumerate(chosen)
        ]

    def _share(self, unet: UNet2DConditionModel, update: int, batch: int, mine: np.ndarray, weight: float) -> float:
        """The gradient of `weight` times the mean loss of the samples `mine` of a batch; returns that mean."""
        chosen = seeding.batch_indices(self.latents.shape[1], batch, update, self.seed, "rl-anchor", self.weights)
        captions, clean = [], []
        for j in mine.tolist():
            i, rng = chosen[j], random.Random(seeding.key(self.seed, "rl-anchor-caption", update, j))
            captions.append("" if rng.random() < self.caption_dropout else self.caption(int(i), rng))
            clean.append(self.latents[rng.randrange(len(self.latents)), int(i)])
        latents = torch.stack(clean).to(unet.device, torch.float32)
        noise = seeding.normal(tuple(latents.shape[1:]), self.seed, "rl-anchor-noise", update, mine.tolist()).to(
            latents
        )
        offset = seeding.numpy_generator(self.seed, "rl-anchor-timesteps", update).random()
        places = (mine + offset) / batch * self.schedule.config.num_train_timesteps
        timesteps = torch.from_numpy(places.astype(np.int64)).to(unet.device)
        with torch.no_grad():
            embeds = self.embed(captions)
        loss = denoising_loss(unet, latents, embeds, noise, timesteps, self.schedule, self.min_snr_gamma).mean()
        (weight * loss).backward()
        return loss.item()
