"""The look that an evaluation takes: the same prompts and noise every time, shown to the reward and to the judge."""

from collections.abc import Sequence

import numpy as np
import torch

from medviz.domains.base import ParsedPrompt
from medviz.errors import InputError, ModelError
from train.evaluate.fidelity import kernel_distance
from train.rl.drawing import Drawing
from train.rl.recipe import RlConfig
from train.rl.rollout import latent_seeds
from train.rl.safeguards import Evaluation, Judge, Opinion, diversity
from train.rl.scoring import Scorer


class Looks:
    """Shows a fixed set of evaluation_prompts x evaluation_images images to reward and judge."""

    def __init__(
        self,
        config: RlConfig,
        drawing: Drawing,
        scorer: Scorer,
        judge: Judge,
        validation: int,
        real: torch.Tensor | None = None,
    ) -> None:
        """validation: how many of the table's prompts, from its first on, are the domain's own. real (M, F): the
        judge's features of real images, or None. Raises InputError when they are too few to be a distance away from."""
        if real is not None and (real.ndim != 2 or len(real) < 4):
            raise InputError(f"features of real images need the shape (4 or more, F), found {tuple(real.shape)}")
        self.config, self.drawing, self.scorer, self.judge, self.real = config, drawing, scorer, judge, real
        shown = min(config.evaluation_prompts, validation)
        self.prompts = np.linspace(0, validation - 1, shown).round().astype(int)

    def evaluate(self, epoch: int) -> Evaluation:
        """The look after `epoch` epochs; epoch 0 is of the adapter-free model.

        Raises ModelError when the reward or the judge knows nothing of what the prompts ask.
        """
        config, drawing = self.config, self.drawing
        prompt_ids = np.repeat(self.prompts, config.evaluation_images)
        seeds = latent_seeds(config.seed, "rl-evaluation", 0, range(len(prompt_ids)))
        with drawing.policy.using(drawing.policy.behaviour if epoch else None):
            images = drawing.images(drawing.sample(prompt_ids, seeds, config.evaluation_steps))
        parsed = [drawing.table.parsed[i] for i in prompt_ids]
        seen, opinion = self.scorer.rewarded(images, parsed, config.rollout_batch), self._opinion(images, parsed)
        if not seen.valid.any() or not bool(opinion.score.isfinite().any()):
            raise ModelError("reward or judge knows nothing of what the evaluation prompts ask: check their heads")
        if epoch == 0:
            self.scorer.observe(seen)
        rewards = self.scorer.values(seen, at_start=True)
        return Evaluation(
            epoch=epoch,
            rewards=tuple(rewards[seen.valid].tolist()),
            judge_scores=tuple(opinion.score.double().tolist()),
            judge_accuracy=float(opinion.accuracy.double().nanmean()),
            diversity=diversity(opinion.features, prompt_ids),
            distance=self._distance(opinion.features),
        )

    def _distance(self, features: torch.Tensor) -> float | None:
        if self.real is None:
            return None
        return float(kernel_distance(features.numpy(), self.real.cpu().numpy(), seed=self.config.seed).value)

    def _opinion(self, images: torch.Tensor, parsed: Sequence[ParsedPrompt]) -> Opinion:
        batch, device = self.config.rollout_batch, self.drawing.table.cond.device
        starts = range(0, len(images), batch)
        with torch.no_grad():
            parts = [self.judge(images[s : s + batch].to(device), parsed[s : s + batch]) for s in starts]
        return Opinion(
            torch.cat([p.score for p in parts]).cpu(),
            torch.cat([p.accuracy for p in parts]).cpu(),
            torch.cat([p.features for p in parts]).cpu(),
        )
