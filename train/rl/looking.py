"""The look that an evaluation takes: the same prompts and noise every time, shown to the reward and to the judge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medviz.domains.base import ParsedPrompt
from medviz.errors import InputError, ModelError
from train import processes
from train.evaluate.fidelity import kernel_distance, kernel_distance_change
from train.rl.drawing import Drawing
from train.rl.prompts import PromptTable
from train.rl.recipe import RlConfig
from train.rl.rollout import latent_seeds
from train.rl.safeguards import Evaluation, Judge, Opinion, diversity
from train.rl.scoring import Scorer
from train.tracking import Tracker

SHOWN = 8  # prompts on a tracker's sheet, a row each


@dataclass(frozen=True)
class RealImages:
    """What likeness is measured against: the judge's features (M, F) of real images, and the captions of others that
    came from the same draw. One image of each caption is drawn, so that real and drawn images show one mix of things.
    """

    features: torch.Tensor
    captions: tuple[str, ...]


class Looks:
    """Shows a fixed set of evaluation_prompts x evaluation_images images to reward and judge, and an image of each of
    the real images' captions to the judge."""

    def __init__(
        self,
        config: RlConfig,
        drawing: Drawing,
        scorer: Scorer,
        judge: Judge,
        validation: int,
        real: torch.Tensor | None = None,
        captions: PromptTable | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        """validation: how many of the table's prompts, from its first on, are the domain's own. real (M, F) and
        captions: see :class:`RealImages`; both or neither. tracker: is shown some of the images of each look. Raises
        InputError when there are too few of either to be a distance apart."""
        if (real is None) != (captions is None):
            raise InputError("features of real images and captions of real images go together")
        if real is not None and (real.ndim != 2 or len(real) < 4):
            raise InputError(f"features of real images need the shape (4 or more, F), found {tuple(real.shape)}")
        if captions is not None and len(captions.prompts) < 4:
            raise InputError(f"a distance needs at least 4 captions of real images, found {len(captions.prompts)}")
        self.config, self.drawing, self.scorer, self.judge = config, drawing, scorer, judge
        self.real, self.captions, self.tracker = real, captions, tracker
        self._untrained: np.ndarray | None = None
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
            latents = drawing.sample(drawing.table, prompt_ids, seeds, config.evaluation_steps)
            drawn = self._of_captions()
        distance, error = self._distance(drawn, epoch)
        if self.tracker:
            shown = latents[: SHOWN * config.evaluation_images]
            self.tracker.images(epoch, "look", drawing.images(shown), config.evaluation_images)
        count, mine = len(prompt_ids), processes.share(len(prompt_ids))
        images, parsed = drawing.images(latents[mine]), [drawing.table.parsed[i] for i in prompt_ids[mine]]
        seen = self.scorer.rewarded(images, parsed, config.rollout_batch).gathered(count)
        opinion = self._opinion(images, parsed).gathered(count)
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
            distance=distance,
            distance_error=error,
        )

    def _of_captions(self) -> np.ndarray | None:
        """The judge's features (C, F) of an image of each caption by the weights that are on; None without captions."""
        if self.captions is None:
            return None
        ids = np.arange(len(self.captions.prompts))
        seeds = latent_seeds(self.config.seed, "rl-captions", 0, ids.tolist())
        latents = self.drawing.sample(self.captions, ids, seeds, self.config.evaluation_steps)
        mine = processes.share(len(ids))
        parsed = [self.captions.parsed[i] for i in mine]
        return self._opinion(self.drawing.images(latents[mine]), parsed).gathered(len(ids)).features.numpy()

    def _distance(self, drawn: np.ndarray | None, epoch: int) -> tuple[float | None, float]:
        """How far `drawn` lies from the real images, and the standard error of its change since the untrained model."""
        if drawn is None or self.real is None:
            return None, 0.0
        real, seed = self.real.cpu().numpy(), self.config.seed
        distance = float(kernel_distance(drawn, real, seed=seed).value)
        if epoch == 0:
            self._untrained = drawn
        if self._untrained is None:
            raise InputError("the first look must be at the untrained model: there is nothing to compare with")
        return distance, kernel_distance_change(drawn, self._untrained, real, seed=seed).standard_error

    def state(self) -> dict[str, torch.Tensor]:
        """What `load_state` takes back: the features of the untrained model's images, once there are any."""
        return {} if self._untrained is None else {"untrained": torch.from_numpy(self._untrained)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
        self._untrained = state["untrained"].numpy() if "untrained" in state else None

    def _opinion(self, images: torch.Tensor, parsed: Sequence[ParsedPrompt]) -> Opinion:
        batch, device = self.config.rollout_batch, self.drawing.table.device
        starts = range(0, len(images), batch)
        with torch.no_grad():
            parts = [self.judge(images[s : s + batch].to(device), parsed[s : s + batch]) for s in starts]
        return Opinion(
            torch.cat([p.score for p in parts]).cpu(),
            torch.cat([p.accuracy for p in parts]).cpu(),
            torch.cat([p.features for p in parts]).cpu(),
        )
