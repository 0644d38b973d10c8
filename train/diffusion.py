"""The text-conditioned generator: a UNet2DConditionModel and its text encoder on cached latents.

v-prediction (Salimans & Ho 2022, eq. 9-10), loss weighted by min-SNR-gamma (Hang et al. 2023, eq. 6; for v:
min(SNR, gamma) / (SNR + 1)), captions dropped at random for classifier-free guidance, averaged weights. The loss is
:func:`denoising_loss`, which the RL anchor shares. Of counterfactual pairs (`train.datasets.counterfactuals`) both
pictures share noise and timestep and stand in one batch, so that nothing but the addition explains its word.

How noisy a schedule is decides what is learnt and how well few steps draw it. These latents carry most of their
variance in the average colour and the coarsest shapes, so a caption says anything new only at a log-SNR below -3.7:
there the wrong caption costs 4 to 13 % of the loss, above it 2 % or less. The cosine schedule spends a tenth of the
timesteps there, two of twenty sampling steps; the "coarse" one, of Stable Diffusion's family, three times as many.
"""

import copy
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.grounding.capture import COARSEST, watch
from medviz.grounding.words import token_indices
from train import processes, seeding
from train.ahead import Ahead
from train.attention_losses import token_mask_loss
from train.compiling import compiled_forward, write_out_attention
from train.config import StageConfig, parse
from train.datasets.counterfactuals import Family, family
from train.datasets.counterfactuals.pairs import CounterfactualPairs, Pair
from train.datasets.latents import encoder, split_latents, to_pixels
from train.datasets.split import Split, open_split
from train.datasets.weights import named_shares, sample_weights
from train.loop import export_newest, fit
from train.memory import keep_freed_memory
from train.pipeline_configs import drop_unknown_options, load_in_fp32

_COARSE = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.03}
# Twice the side averages four times the pixels, so the same shapes hide at a log-SNR lower by ln 4 (Hoogeboom et al.
# 2023, arXiv 2301.11093, equation 3): this is "coarse" for 256 px.
_COARSER = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.04}
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "coarse": _COARSE,
    "coarser": _COARSER,
}
SHARD_BYTES = "14MB"

ORDINARY, TWIN, PASTED = range(3)
"""Kinds of rows of a batch, in their order in it."""


@dataclass
class DiffusionConfig(StageConfig):
    """Options of the diffusion stage."""

    domain: str = "dermatology"
    extra_folders: tuple[str, ...] = ()
    """Folders of training images beside the domain's own, with the same columns, e.g. radiology-nlm-jsrt."""
    autoencoder: str = "runs/autoencoder/model"
    contrastive: str = "runs/contrastive-dermatology/model"
    """Folder with tokenizer/ and text_encoder/: a contrastive stage's, or a pipeline's to go on from."""
    init: str = ""
    """Pipeline folder whose UNet is the start (e.g. another domain's), its layout too; empty: random weights."""
    train_text_encoder: bool = True
    """False leaves the text encoder as it is: a sixth less work a step."""
    compile: bool = False
    """torch.compile the UNet: on a CPU a step takes three fifths of the time, with `bf16` five sixths, after minutes of
    compiling."""
    bf16: bool = False
    """Both passes in bf16 by autocast, convolutions channels-last; weights, optimiser and loss stay fp32."""
    schedule: str = "coarse"
    """Noise schedule: cosine, or coarse, which spends more timesteps where noise hides all but colour and shape, or
    coarser, the same for twice the side."""
    size_px: int = 128
    latents: str = ""
    """Folder in which latents of the images are kept; empty: latents/ beside the run's own."""
    channels: tuple[int, ...] = (128, 192, 224)
    cross_attention: tuple[bool, ...] = (False, True, True)
    """Cross-attention in the encoder half at each resolution, finest first; the decoder half has it at all."""
    layers: int = 1
    heads: int = 4
    orientations: int = 1
    """Cached variants of each training image. Without `crop` they are turned and mirrored: more than 1 only where up
    and left mean nothing."""
    crop: float = 0.0
    """Share of an image's side that variants may leave out, in place of turning them. A generator that sees each of a
    few thousand images hundreds of times learns them by heart; of each a few crops are not the same picture."""
    dropout: float = 0.0
    """Of the residual blocks' features while training, against the same."""
    source_shares: tuple[str, ...] = ()
    """SOURCE=SHARE of the samples; unnamed sources share the rest by size."""
    rarity_power: float = 0.5
    """Samples are drawn in proportion to (frequency of the image's rarest label) ** -rarity_power; 0: as they come."""
    label_shares: tuple[str, ...] = ()
    """LABEL=SHARE of the samples that have it, whatever the two above say. Captions name labels, so what a caption
    stands for stays as it is; what is drawn more often is learnt sooner."""
    batch: int = 16
    """Images a step."""
    learning_rate: float = 3e-4
    text_encoder_learning_rate: float = 0.0
    """Of the text encoder where it is trained; 0: that of the UNet."""
    warmup: int = 100
    caption_dropout: float = 0.1
    min_snr_gamma: float = 5.0
    """0: every timestep keeps its weight, which fine lines need; min-SNR hardly trains the last, nearly clean ones."""
    ema_decay: float = 0.9995
    """Of the running average of the weights, which is exported, from the step on at which a rising one reaches it."""
    counterfactuals: tuple[str, ...] = ()
    """ATTRIBUTE=SHARE of the samples that get such an addition; at most 0.5 in all. As many samples again are their
    twins without it, in the same batch, with the same noise and timestep."""
    family: str = "a"
    """Which family of `train.datasets.counterfactuals` draws the additions."""
    elsewhere: float = 0.0
    """Share of those twins that show the same addition at another place, of additions that have a place."""
    mask_weight: float = 1.0
    """Weight of the loss where the addition lies, against 1 elsewhere, in both twins; its mean over an image is 1."""
    attention_loss: float = 0.0
    """Weight of `token_mask_loss` of additions to pasted images, on the layers that heat maps are made of; 0: none."""
    attention_rows: int = 2
    """Pasted images a batch and process that it is computed on with `compile`, in a pass of their own through the plain
    UNet; without, all, in the one pass."""
    export_only: bool = False
    """With `resume`: write the model of the newest checkpoint and end. A run in progress goes on undisturbed."""


def noise_schedule(name: str) -> DDPMScheduler:
    """The schedule of 1000 timesteps by its name in SCHEDULES, for v-prediction. Raises InputError for another name."""
    if name not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, found {name!r}")
    return DDPMScheduler(num_train_timesteps=1000, prediction_type="v_prediction", **SCHEDULES[name])


def denoising_error(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: DDPMScheduler,
    min_snr_gamma: float,
) -> torch.Tensor:
    """Min-SNR weighted squared error (B, h, w) at each place of one prediction on latents noised to `timesteps`.

    latents, noise: (B, C, h, w); prompt_embeds (B, L, D); timesteps (B,) int64. The target follows the schedule's
    prediction type (epsilon or v).
    """
    noisy = schedule.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample
    snr = compute_snr(schedule, timesteps)
    weight = snr.clamp(max=min_snr_gamma) if min_snr_gamma > 0 else torch.ones_like(snr)
    if schedule.config.prediction_type == "v_prediction":
        target, divisor = schedule.get_velocity(latents, noise, timesteps), snr + 1
    else:
        target, divisor = noise, snr
    weight = weight / divisor if min_snr_gamma > 0 else weight
    return weight.view(-1, 1, 1) * (prediction.float() - target.float()).square().mean(dim=1)


def denoising_loss(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: DDPMScheduler,
    min_snr_gamma: float,
) -> torch.Tensor:
    """Mean over the places (B,) of :func:`denoising_error`."""
    return denoising_error(unet, latents, prompt_embeds, noise, timesteps, schedule, min_snr_gamma).mean(dim=(1, 2))


def _check(config: DiffusionConfig) -> None:
    least = {"mask_weight": 1, "attention_loss": 0, "attention_rows": 1, "text_encoder_learning_rate": 0}
    for name, low in least.items():
        if not getattr(config, name) >= low:
            raise InputError(f"{name} must be at least {low}, found {getattr(config, name)}")
    if config.text_encoder_learning_rate and not config.train_text_encoder:
        raise InputError("text_encoder_learning_rate is given, but train_text_encoder is false: give one or the other")
    needed = [name for name, low in (("mask_weight", 1), ("attention_loss", 0)) if getattr(config, name) > low]
    if needed and not config.counterfactuals:
        raise InputError(f"{needed[0]} weighs the masks of counterfactuals, and there are none: name some")
    if config.export_only and not config.resume:
        raise InputError("export_only writes what a run has learnt so far: it needs --resume")


def new_unet(config: DiffusionConfig, channels: int, size: int, text_width: int) -> UNet2DConditionModel:
    """The UNet that a run starts from, on latents (channels, size, size) and text embeddings of `text_width`.

    Raises InputError for an `init` that is no pipeline.
    """
    if config.init:
        if not Path(config.init, "unet").is_dir():
            raise InputError(f"init names {config.init}, which holds no unet: train that stage first")
        return UNet2DConditionModel.from_pretrained(f"{config.init}/unet", dtype=torch.float32)
    torch.manual_seed(seeding.key(config.seed, "diffusion", "weights"))
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in config.cross_attention),
        up_block_types=("CrossAttnUpBlock2D",) * len(config.channels),
        layers_per_block=config.layers,
        attention_head_dim=config.heads,
        dropout=config.dropout,
        cross_attention_dim=text_width,
        norm_num_groups=16,
    )


class Batch(NamedTuple):
    """One process's rows of a batch: ordinary images, then twins, then pasted images, in the order of their twins.

    latents: fp16 (B, C, h, w). noise: fp32 (B, C, h, w). tokens: int64 (B, L). timesteps: int64 (B,). kinds: int64
    (B,), one of ORDINARY, TWIN and PASTED. differing, added: fp32 (B, h, w) in [0, 1], where a row differs from its
    twin and where it shows an addition itself; 0 in ordinary rows. words: fp32 (B, L), 1 at the tokens that name a
    pasted image's addition, where the attention loss needs them.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    tokens: torch.Tensor
    timesteps: torch.Tensor
    kinds: torch.Tensor
    differing: torch.Tensor
    added: torch.Tensor
    words: torch.Tensor


class DiffusionLearner:
    """Learns UNet and text encoder of one domain."""

    def __init__(self, config: DiffusionConfig, train: Split, validation: Split, drawn: Family | None = None) -> None:
        """drawn: what draws the additions of `config.counterfactuals`, where that is not the domain's own family.

        Raises InputError for options that contradict each other.
        """
        processes.check_enough([("images a step", config.batch)])
        _check(config)
        self.config, self.train = config, train
        self.domain = get_domain(config.domain)
        self.vae = AutoencoderTiny.from_pretrained(config.autoencoder).to(config.device).eval()
        cache = Path(config.latents) if config.latents else Path(config.out).parent / "latents"
        self.latents = split_latents(
            self.vae, train, config.size_px, config.orientations, config.seed, cache, crop=config.crop
        )
        self.validation = validation
        self.validation_latents = split_latents(self.vae, validation, config.size_px, 1, config.seed, cache)[0]
        self.weights = sample_weights(train, config.source_shares, config.rarity_power, config.label_shares)
        self.tokenizer = CLIPTokenizer.from_pretrained(f"{config.contrastive}/tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(f"{config.contrastive}/text_encoder", dtype=torch.float32)
        self.text_encoder = text_encoder.to(config.device)
        size, channels = self.latents.shape[-1], self.latents.shape[2]
        self.pairs = self._pairs(drawn)
        self.unet = new_unet(config, channels, size, text_encoder.config.hidden_size).to(config.device)
        if config.bf16:
            self.unet.to(memory_format=torch.channels_last)
            if config.device == "cpu":
                write_out_attention(self.unet)
        self.schedule = noise_schedule(config.schedule)
        self.predict = compiled_forward(self.unet) if config.compile else self.unet
        self.modules = torch.nn.ModuleDict({"unet": self.unet}).train()
        if config.train_text_encoder:
            self.modules["text_encoder"] = self.text_encoder.train()
        else:
            self.text_encoder.eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self._parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
        )
        self.rates = get_scheduler(
            "cosine",
            self.optimizer,
            num_warmup_steps=config.warmup,
            num_training_steps=config.steps,
        )
        weights = list(self.modules.parameters())
        self.ema = EMAModel(weights, decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.batches = Ahead(self.batch, config.steps, config.workers, config.device)

    def _pairs(self, drawn: Family | None) -> CounterfactualPairs | None:
        config = self.config
        if not config.counterfactuals:
            return None
        # batches are made by workers, which touch no graphics card
        self.encode = encoder(copy.deepcopy(self.vae).to("cpu"))
        return CounterfactualPairs(
            self.train,
            drawn or family(config.domain, config.family),
            named_shares("counterfactuals", config.counterfactuals),
            self.weights,
            config.size_px,
            config.seed,
            config.elsewhere,
        )

    def _parameters(self) -> list[dict[str, Any]]:
        """What the optimiser learns, in one group for each learning rate."""
        rate = self.config.text_encoder_learning_rate
        if not rate:
            return [{"params": list(self.modules.parameters())}]
        rates = {"unet": self.config.learning_rate, "text_encoder": rate}
        return [{"params": list(part.parameters()), "lr": rates[name]} for name, part in self.modules.items()]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Text embeddings (B, L, D) of tokens int64 (B, L)."""
        return self.text_encoder(tokens.to(self.config.device, non_blocking=True))[0]

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """Tokens int64 (B, L), padded to the tokenizer's length as the pipeline pads."""
        return self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def batch(self, step: int) -> Batch:
        """This process's rows of `step`."""
        config = self.config
        count = self.pairs.count(step, config.batch) if self.pairs else 0
        images = config.batch - count  # a pair is one: it has one number, noise and timestep
        chosen = seeding.batch_indices(len(self.train), config.batch, step, config.seed, "diffusion", self.weights)
        mine = processes.share(config.batch)
        drawn: dict[int, tuple[Pair, torch.Tensor, torch.Tensor]] = {}
        captions, latents, kinds, masks, words, samples = [], [], [], [], [], []
        nowhere = torch.zeros((2, *self.latents.shape[-2:]))
        for row in map(int, mine):
            kind = PASTED if row >= images else TWIN if row >= images - count else ORDINARY
            place = row - count if kind == PASTED else row
            sample = step * config.batch + place  # numbered through the run, whoever computes it
            phrases: tuple[str, ...] = ()
            if self.pairs is None or kind == ORDINARY:
                caption, latent = self._ordinary(int(chosen[row]), sample)
                mask = nowhere
            else:
                if place not in drawn:
                    drawn[place] = self._encoded(self.pairs, sample)
                pair, encoded, covered = drawn[place]
                member = int(kind == TWIN)
                latent, caption = encoded[member], pair.captions[member]
                mask = torch.stack([covered.amax(dim=0), covered[member]])
                if kind == PASTED and config.attention_loss > 0:
                    phrases = pair.words
            captions.append(caption)
            latents.append(latent)
            kinds.append(kind)
            masks.append(mask)
            words.append(self._token_mask(caption, phrases))
            samples.append(sample)
        clean = torch.stack(latents)
        noise = seeding.normal(tuple(clean.shape[1:]), config.seed, "diffusion-noise", 0, samples)
        # stratified over the batch: the same expectation as independent draws, with less variance
        rng = seeding.numpy_generator(config.seed, "timesteps", step)
        levels = (np.arange(images) + rng.random()) / images * self.schedule.config.num_train_timesteps
        levels = rng.permutation(levels) if count else levels
        timesteps = torch.from_numpy(levels.astype(np.int64)[np.array(samples) - step * config.batch])
        differing, added = torch.stack(masks, dim=1)
        return Batch(
            clean, noise, self.tokens(captions), timesteps, torch.tensor(kinds), differing, added, torch.stack(words)
        )

    def _ordinary(self, i: int, sample: int) -> tuple[str, torch.Tensor]:
        """Caption and latents of training image `i`."""
        rng = random.Random(seeding.key(self.config.seed, "caption", sample))
        dropped = rng.random() < self.config.caption_dropout
        caption = "" if dropped else self.domain.caption(self.train.records[i], rng)
        return caption, self.latents[rng.randrange(self.config.orientations), i]

    def _encoded(self, pairs: CounterfactualPairs, sample: int) -> tuple[Pair, torch.Tensor, torch.Tensor]:
        """A pair, its latents fp16 (2, C, h, w), and its masks on their grid (2, h, w).

        The twin's caption alone is dropped: additions are far more common here than in the images, and a generator
        that is told nothing should draw what the images show.
        """
        pair = pairs.draw(sample)
        with torch.inference_mode():
            latents = self.encode(to_pixels(pair.images)).half()
        # the greatest value of a cell: a thin line is all that matters in the cells that it crosses
        masks = functional.adaptive_max_pool2d(torch.from_numpy(pair.masks), latents.shape[-2:])
        rng = random.Random(seeding.key(self.config.seed, "caption", sample))
        if rng.random() < self.config.caption_dropout:
            pair = replace(pair, captions=(pair.captions[0], ""))
        return pair, latents.clone(), masks

    def _token_mask(self, caption: str, phrases: tuple[str, ...]) -> torch.Tensor:
        """fp32 (L,), 1 at the tokens of `phrases`."""
        found = torch.zeros(self.tokenizer.model_max_length)
        for phrase in phrases:
            found[list(token_indices(self.tokenizer, caption, phrase))] = 1
        return found

    def update(self, step: int) -> dict[str, float | torch.Tensor]:
        config = self.config
        batch = Batch(*(part.to(config.device, non_blocking=True) for part in self.batches(step)))
        torch.manual_seed(seeding.key(config.seed, "diffusion", "dropout", step, processes.rank()))
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
            error, attention = self._errors(batch)
        pairs = self.pairs.count(step, config.batch) if self.pairs else 0
        weights = 1 + (config.mask_weight - 1) * batch.differing
        losses = (error * weights / weights.mean(dim=(1, 2), keepdim=True)).mean(dim=(1, 2))
        loss = losses.sum() / config.batch
        figures = {"loss": processes.summed(loss.detach())}
        if config.attention_loss > 0 and pairs:
            attention = attention / pairs if attention is not None else loss.new_zeros(())
            loss = loss + config.attention_loss * attention
            figures["attention_loss"] = processes.summed(attention.detach())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        processes.sum_gradients(self.modules.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.rates.step()
        self.ema.step(self.modules.parameters())
        if self.pairs:
            figures |= self._apart(batch, error.detach(), pairs)
        return {**figures, "grad_norm": norm}

    def _errors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`denoising_error` of a batch, and this process's part of the attention loss, None where it has no weight."""
        config = self.config
        given = (batch.latents.float(), self.embed(batch.tokens), batch.noise, batch.timesteps)

        def predicted(unet: UNet2DConditionModel, rows: slice = slice(None)) -> torch.Tensor:
            latents, embeds, noise, timesteps = (part[rows] for part in given)
            return denoising_error(unet, latents, embeds, noise, timesteps, self.schedule, config.min_snr_gamma)

        pasted = int((batch.kinds == PASTED).sum()) if config.attention_loss > 0 else 0
        if not pasted:
            return predicted(self.predict), None
        maps: dict[str, torch.Tensor] = {}
        rows = min(pasted, config.attention_rows) if config.compile else pasted
        with watch(self.unet, maps.__setitem__, rows=lambda _: rows, gradient=True):
            # hooks need the plain UNet
            found = predicted(self.unet, slice(-rows, None) if config.compile else slice(None))
        if config.compile:
            found = predicted(self.predict)
        height = batch.latents.shape[-2]
        losses = [
            token_mask_loss(probs, batch.words[-rows:], batch.added[-rows:])
            for probs in maps.values()
            if COARSEST * probs.shape[1] >= height
        ]
        return found, torch.stack(losses).mean() * pasted

    def _apart(self, batch: Batch, error: torch.Tensor, pairs: int) -> dict[str, torch.Tensor]:
        """The loss of each kind of rows, without the weight of masks; of pasted rows inside and outside their masks."""
        kind = {
            name: (batch.kinds == i).float()[:, None, None] for i, name in enumerate(("ordinary", "twin", "pasted"))
        }
        within = {
            "ordinary": kind["ordinary"].expand_as(error),
            "twin": kind["twin"].expand_as(error),
            "inside": kind["pasted"] * batch.added,
            "outside": kind["pasted"] * (1 - batch.added),
        }
        sums = processes.summed(torch.stack([torch.stack([(error * w).sum(), w.sum()]) for w in within.values()]))
        there = [name for name in within if (pairs > 0 if name != "ordinary" else 2 * pairs < self.config.batch)]
        means = dict(zip(within, (sums[:, 0] / sums[:, 1].clamp_min(1e-6)).unbind(), strict=True))
        return {f"loss_{name}": means[name] for name in there}

    def state(self) -> dict[str, Any]:
        return {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        self.ema.load_state_dict(state["ema"])

    def validation_loss(self, count: int = 512, batch: int = 32) -> tuple[float, int]:
        """Mean weighted loss on validation latents at fixed noise and evenly spread timesteps; (loss, n)."""
        config, losses = self.config, []
        count = min(count, len(self.validation_latents))
        with torch.inference_mode():
            for start in range(0, count, batch):
                indices = list(range(start, min(start + batch, count)))
                tokens = self.tokens(
                    [self.domain.caption(self.validation.records[i], random.Random(i)) for i in indices]
                )
                clean = self.validation_latents[indices].float().to(config.device)
                noise = seeding.normal(tuple(clean.shape[1:]), config.seed, "validation-noise", 0, indices).to(clean)
                timesteps = torch.tensor([(i * 997) % 1000 for i in indices], device=config.device)
                losses.append(
                    denoising_loss(
                        self.unet, clean, self.embed(tokens), noise, timesteps, self.schedule, config.min_snr_gamma
                    )
                )
        return torch.cat(losses).mean().item(), count

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the averaged weights as a StableDiffusionPipeline folder in bf16, files under 15 MB."""
        self.ema.copy_to(self.modules.parameters())
        self.modules.eval()
        loss, count = self.validation_loss()
        metrics = {
            "validation_loss": loss,
            "validation_n": count,
            "unet_parameters": sum(p.numel() for p in self.unet.parameters()),
            "text_encoder_parameters": sum(p.numel() for p in self.text_encoder.parameters()),
            "images_seen": self.rates.last_epoch * self.config.batch,
        }
        save_pipeline(folder, self.vae, self.text_encoder, self.tokenizer, self.unet, self.schedule)
        return metrics


def save_pipeline(
    folder: Path,
    vae: AutoencoderTiny,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    schedule: DDPMScheduler,
) -> None:
    """Write the parts as the folder `StableDiffusionPipeline.from_pretrained` loads in fp32, weights in bf16 shards."""
    # the cosine schedule's last log-SNR overflows a solver in fp32; diffusers' documented clip for it is -5.1
    clip = {"lambda_min_clipped": -5.1} if schedule.config.beta_schedule == "squaredcos_cap_v2" else {}
    scheduler = DPMSolverMultistepScheduler.from_config(
        schedule.config, algorithm_type="dpmsolver++", steps_offset=1, timestep_spacing="linspace", **clip
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_BYTES)
    load_in_fp32(folder / "text_encoder")
    drop_unknown_options(folder / "vae")


def main(arguments: list[str]) -> None:
    """`python -m train diffusion RECIPE [overrides]`."""
    config = parse(arguments, DiffusionConfig)
    processes.join(config.device)
    if config.device == "cpu":
        keep_freed_memory()
    learner = DiffusionLearner(
        config,
        open_split(config.domain, "train", extra_folders=config.extra_folders),
        open_split(config.domain, "validation"),
    )
    if config.export_only:
        export_newest(learner, config)
    else:
        fit(learner, config)
    processes.leave()
