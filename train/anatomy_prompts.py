"""Anatomy-grounded prompt tuning (arXiv 2506.10633): words of a place learn to look where the place is.

Only the input embeddings of the sub-tokens in the places' wordings learn, as offsets inside those wordings; text
encoder, unet and autoencoder are frozen. On real training images, noised to the middle of the schedule, the attention
to a prompt "{location} {pathology}" is drawn to the location's Gaussian (L_loc) and its tokens apart (L_div).

Beyond the paper, each a switch: the patient's own regions from the segmenter as target, places and findings named
alone, LoRA on the keys and values of the cross-attention, and beside the two the denoising loss, or how well an
image-text network finds the prompt in the picture that one step of denoising gives. In dermoscopic images the words of
a lesion and its structures learn to look where experts outlined them.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig

from medviz.errors import InputError
from medviz.generation.sampling import decode_latents
from medviz.grounding.anatomy import Segmenter
from medviz.grounding.atlas import ATLAS_NAME
from medviz.grounding.capture import COARSEST, watch
from medviz.grounding.words import content_indices
from medviz.models.adapters import add_prompt_embeddings, loaded_adapters, save_prompt_adapter, using_adapter
from medviz.models.prompt_embeddings import PromptEmbeddings
from medviz.rewards.alignment import AlignmentNetwork
from medviz.rewards.registry import TextImageNetwork
from train import seeding
from train.attention_losses import diversity_loss, location_loss
from train.config import StageConfig, parse
from train.datasets.outlined_scenes import open_outlined_scene
from train.datasets.placed_findings import fit_atlas
from train.datasets.placed_scenes import PlacedPrompts, open_placed_scene
from train.datasets.scenes import Scene, ScenePrompt
from train.datasets.split import open_split
from train.diffusion import denoised
from train.evaluate.statistics import mean_interval, paired_difference
from train.loop import fit
from train.rl.trainer import open_pipeline

KEYS_AND_VALUES = ("attn2.to_k", "attn2.to_v")
QUERIES = "attn2.to_q"
STAGE = "anatomy"


@dataclass
class AnatomyPromptsConfig(StageConfig):
    """Options of the anatomy prompts stage."""

    steps_may_change: ClassVar[bool] = True
    domain: str = "radiology"
    """radiology: places of findings; dermatology: outlined lesions and structures."""
    base: str = "assets/models/radiology"
    """Pipeline folder that is tuned."""
    adapter: str = "anatomy"
    title: str = "Anatomy-grounded prompts"
    target: str = "atlas"
    """atlas: the mean anatomy of the training images; segmenter: each image's own regions; masks: of dermatology."""
    segmenter: str = "assets/models/radiology/segmenter"
    """Folder of the network that finds the lungs, for that target alone."""
    template: str = "{location} {pathology}"
    """Wording of the training prompts."""
    place_share: float = 0.0
    """Of prompts that name a place alone, any of the image's own."""
    finding_share: float = 0.0
    """Of prompts that name a finding alone; its target is every place where the image has it."""
    notes: bool = True
    """Also learn from sentences of notes that place a finding, not from readers' boxes alone."""
    layers: str = "fine"
    """read: all that a phrase's heat map is made of; fine: the decoder's on half the latents' grid or finer;
    decoder: all its; paper: mid and first three decoder."""
    window: tuple[float, ...] = (0.3, 0.6)
    """Noise levels learnt at, as fractions of the schedule: the paper's steps 30 to 60 of 100."""
    levels: int = 2
    """Noise levels an image and step, spread over the window."""
    batch: int = 1
    """Prompts a step."""
    learning_rate: float = 1e-4
    alpha: float = 0.1
    """Weight of the Gaussian in the target of L_loc."""
    spread: float = 1.0
    """How wide the Gaussian is, against the paper's sigma of a sixth of the place's side."""
    eps: float = 1e-5
    """The Gaussian's value above which the attention is kept as it is."""
    jitter: float = 0.05
    """How far the Gaussian moves, as a fraction of the image, and how far its sigma changes."""
    diversity_weight: float = 1.0
    denoising_weight: float = 0.0
    """Of the denoising loss on the same images; 0: not mixed in."""
    alignment: str = ""
    """The alignment/ folder of a contrastive run's model, for the image-text loss."""
    alignment_weight: float = 0.0
    """Of the image-text loss, 1 - cosine of the denoised picture and the prompt; 0: not mixed in."""
    lora_rank: int = 0
    """Rank of LoRA on keys and values of the cross-attention; 0: none."""
    lora_alpha: float = 8.0
    lora_queries: bool = False
    """Also LoRA on the queries of the cross-attention: on what the picture is asked by, not by words alone."""
    min_snr_gamma: float = 5.0
    """Of the denoising loss."""

    def checked(self) -> "AnatomyPromptsConfig":
        """The configuration itself. Raises InputError naming the option that is out of range and what is allowed."""
        for name, value, allowed in (
            ("domain", self.domain, tuple(TARGETS)),
            ("target", self.target, TARGETS.get(self.domain, ())),
            ("layers", self.layers, tuple(LAYERS)),
        ):
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")
        self.prompts()
        if len(self.window) != 2 or not 0.0 <= self.window[0] < self.window[1] <= 1.0:
            raise InputError(f"window must be two ascending fractions in [0, 1], found {self.window}")
        least = {"batch": 1, "levels": 1, "lora_rank": 0, "alpha": 0, "eps": 0}
        weights = dict.fromkeys(("diversity_weight", "denoising_weight", "alignment_weight", "learning_rate"), 0)
        for name, low in (least | weights).items():
            if not getattr(self, name) >= low:
                raise InputError(f"{name} must be at least {low}, found {getattr(self, name)}")
        if self.alignment_weight > 0 and not self.alignment:
            raise InputError(f"alignment_weight is {self.alignment_weight}, but alignment names no image-text network")
        return self

    def prompts(self) -> PlacedPrompts:
        """How prompts are made of placed findings. Raises as `checked`."""
        return PlacedPrompts(self.template, self.place_share, self.finding_share, self.jitter, self.spread)


Maps = Mapping[str, torch.Tensor]
TARGETS = {"radiology": ("atlas", "segmenter"), "dermatology": ("masks",)}


def _decoder(maps: Maps) -> list[str]:
    return sorted(layer for layer in maps if layer.startswith("up_blocks."))


# layers of {name: (rows, h, w, L)} and the latents' height -> the names of those that learn
LAYERS: dict[str, Callable[[Maps, int], list[str]]] = {
    "read": lambda maps, height: [layer for layer in maps if COARSEST * maps[layer].shape[1] >= height],
    "fine": lambda maps, height: [layer for layer in _decoder(maps) if 2 * maps[layer].shape[1] >= height],
    "decoder": lambda maps, height: _decoder(maps),
    "paper": lambda maps, height: [
        *(layer for layer in maps if layer.startswith("mid_block.")),
        *_decoder(maps)[:3],
    ],
}


class AnatomyPromptsLearner:
    """Learns the embeddings of the scene's phrases; see `train.loop.Learner`."""

    def __init__(
        self,
        config: AnatomyPromptsConfig,
        pipeline: StableDiffusionPipeline,
        train: Scene,
        validation: Scene | None = None,
        alignment: TextImageNetwork | None = None,
    ) -> None:
        """validation: scenes that the losses of baseline and adapter are reported on. alignment: the image-text network
        of the loss of that name, where it has a weight.

        Raises InputError for an option out of range, or a pipeline that already holds an adapter of the name.
        """
        self.config = config.checked()
        if config.adapter in loaded_adapters(pipeline.unet):
            raise InputError(f"the pipeline already holds an adapter {config.adapter!r}; train on the plain baseline")
        if config.alignment_weight > 0 and alignment is None:
            raise InputError("the image-text loss has a weight but no network")
        self.pipeline, self.train, self.validation = pipeline, train, validation
        self.alignment = alignment if config.alignment_weight > 0 else None
        for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
            module.requires_grad_(False).eval()
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        width = pipeline.text_encoder.config.hidden_size
        self.embeddings = PromptEmbeddings(pipeline.tokenizer, train.phrases, width)
        self.embeddings.offsets.data = self.embeddings.offsets.data.to(config.device)
        self.embeddings.offsets.requires_grad_(True)
        add_prompt_embeddings(pipeline, config.adapter, self.embeddings)
        self.lora = self._add_lora() if config.lora_rank else {}
        self.weights = {"offsets": self.embeddings.offsets, **self.lora}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=config.learning_rate, weight_decay=0.0)

    def _add_lora(self) -> dict[str, torch.nn.Parameter]:
        config, unet = self.config, self.pipeline.unet
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            torch.manual_seed(seeding.key(config.seed, STAGE, "weights"))
            layers = [*KEYS_AND_VALUES, *([QUERIES] if config.lora_queries else [])]
            options = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=layers)
            unet.add_adapter(options, config.adapter)
        mine = {n: w for n, w in unet.named_parameters() if f".{config.adapter}." in n and "lora_" in n}
        for weight in mine.values():
            weight.requires_grad_(True)
        unet.disable_adapters()
        for weight in mine.values():
            weight.requires_grad_(True)
        return mine

    def embed(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text embeddings (B, L, D), padded as the sampler pads; the gradient reaches the learned offsets."""
        tokenizer, text_encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        length = tokenizer.model_max_length
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(text_encoder.device)
        mask = tokens.attention_mask if getattr(text_encoder.config, "use_attention_mask", False) else None
        return text_encoder(tokens.input_ids, attention_mask=mask)[0]

    def losses(
        self,
        scene: Scene,
        prompts: Sequence[ScenePrompt],
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """location, diversity, denoising and, with a weight, alignment loss of each prompt (B,), with the adapter as
        it is switched now.

        noise (B, C, h, w); timesteps (B, T) int64.
        """
        config, levels, device = self.config, timesteps.shape[1], self.config.device
        texts = [prompt.text for prompt in prompts]
        latents = scene.latents[[prompt.index for prompt in prompts]].to(device)
        rows = torch.arange(len(prompts), device=device).repeat_interleave(levels)
        maps: dict[str, torch.Tensor] = {}
        with watch(self.pipeline.unet, maps.__setitem__, gradient=True):
            found = denoised(
                self.pipeline.unet, latents[rows], self.embed(texts)[rows], noise.to(device)[rows],
                timesteps.to(device).flatten(), self.schedule, config.min_snr_gamma,
            )  # fmt: skip
        layers = LAYERS[config.layers](maps, latents.shape[-2])
        if not layers:
            raise InputError(f"the unet has no cross-attention for layers {config.layers!r}; it has {', '.join(maps)}")
        location, diversity = [], []
        for row, prompt in enumerate(prompts):
            tokens = list(content_indices(self.pipeline.tokenizer, texts[row]))
            mine = [maps[layer][row * levels : (row + 1) * levels, ..., tokens].movedim(-1, 1) for layer in layers]
            targets = [torch.from_numpy(prompt.heat((each.shape[-2], each.shape[-1]))).to(each) for each in mine]
            pairs = zip(mine, targets, strict=True)
            location.append(torch.stack([location_loss(*each, config.alpha, config.eps) for each in pairs]).mean())
            diversity.append(torch.stack([diversity_loss(each) for each in mine]).mean())
        losses = {
            "location_loss": torch.stack(location),
            "diversity_loss": torch.stack(diversity),
            "denoising_loss": found.loss.unflatten(0, (len(prompts), levels)).mean(dim=1),
        }
        if self.alignment is not None:
            pictures = decode_latents(self.pipeline.vae, found.clean)
            fit_of_each = self.alignment.similarity(pictures, [texts[row] for row in rows])
            losses["alignment_loss"] = 1 - fit_of_each.unflatten(0, (len(prompts), levels)).mean(dim=1)
        return losses

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        chosen = seeding.batch_indices(len(self.train), config.batch, step, config.seed, STAGE)
        samples = range(step * config.batch, (step + 1) * config.batch)
        prompts = [
            self.train.prompt(int(row), seeding.numpy_generator(config.seed, STAGE, "target", sample))
            for sample, row in zip(samples, chosen, strict=True)
        ]
        noise = seeding.normal(tuple(self.train.latents.shape[1:]), config.seed, "anatomy-noise", 0, list(samples))
        offset = seeding.numpy_generator(config.seed, STAGE, "levels", step).random((config.batch, 1))
        with using_adapter(self.pipeline.unet, config.adapter):
            losses = self.losses(self.train, prompts, noise, self._timesteps(offset))
            means = {name: loss.mean() for name, loss in losses.items()}
            loss = means["location_loss"] + config.diversity_weight * means["diversity_loss"]
            if config.denoising_weight > 0:
                loss = loss + config.denoising_weight * means["denoising_loss"]
            if self.alignment is not None:
                loss = loss + config.alignment_weight * means["alignment_loss"]
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        return {"loss": loss.item(), **{name: mean.item() for name, mean in means.items()}, "grad_norm": norm.item()}

    def _timesteps(self, offset: np.ndarray) -> torch.Tensor:
        """Timesteps (B, levels) int64, one in each of as many equal parts of the window, at `offset` (B, 1) in them."""
        config, last = self.config, self.schedule.config.num_train_timesteps - 1
        places = (np.arange(config.levels) + offset) / config.levels
        low, high = config.window
        return torch.from_numpy(np.round((low + (high - low) * places) * last).astype(np.int64))

    def state(self) -> dict[str, Any]:
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["weights"].keys() != self.weights.keys():
            raise InputError(
                f"the checkpoint learnt other weights: {sorted(state['weights'].keys() ^ self.weights.keys())[:3]}"
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the adapter's folder, with the atlas if there is one; returns its losses on validation images beside
        the baseline's."""
        metrics: dict[str, Any] = {
            "learned_tokens": len(self.embeddings.ids),
            "lora_parameters": sum(weight.numel() for weight in self.lora.values()),
            "train_prompts": len(self.train),
            "train_images": len(self.train.latents),
            "validation": self.figures(),
        }
        details = {"title": self.config.title, "recipe": asdict(self.config), "metrics": metrics}
        save_prompt_adapter(self.pipeline.unet, folder, self.config.adapter, details=details)
        if self.train.atlas is not None:
            self.train.atlas.write(folder / ATLAS_NAME)
        return metrics

    def figures(self, count: int = 128) -> dict[str, Any]:
        """Each loss on validation images, of the baseline, the adapter and their difference; None without such images.

        The same noise, noise levels, canonical wordings and unmoved Gaussians for both, on at most `count` prompts. An
        image with several prompts counts once, with their mean.
        """
        if self.validation is None:
            names = ("location_loss", "diversity_loss", "denoising_loss")
            return dict.fromkeys((*names, "alignment_loss") if self.alignment is not None else names)
        prompts = [self.validation.prompt(row) for row in range(min(count, len(self.validation)))]
        found: dict[str | None, dict[str, list[float]]] = {}
        for adapter in (None, self.config.adapter):
            found[adapter] = {}
            for row, prompt in enumerate(prompts):
                noise = seeding.normal(tuple(self.validation.latents.shape[1:]), 0, "anatomy-validation", 0, [row])
                with torch.no_grad(), using_adapter(self.pipeline.unet, adapter):
                    losses = self.losses(self.validation, [prompt], noise, self._timesteps(np.full((1, 1), 0.5)))
                for name, loss in losses.items():
                    found[adapter].setdefault(name, []).append(loss.item())
        images = [prompt.index for prompt in prompts]
        baseline, adapted = ({n: _image_means(v, images) for n, v in each.items()} for each in found.values())
        return {
            name: {
                "baseline": mean_interval(baseline[name]).as_json(),
                "adapter": mean_interval(adapted[name]).as_json(),
                "change": paired_difference(adapted[name], baseline[name]).as_json(),
            }
            for name in baseline
        }


def _image_means(values: Sequence[float], images: Sequence[int]) -> np.ndarray:
    """Mean of the values of each image (N,), in the order of first appearance."""
    return np.array(
        [np.mean([v for v, i in zip(values, images, strict=True) if i == each]) for each in dict.fromkeys(images)]
    )


def _placed(config: AnatomyPromptsConfig, pipeline: StableDiffusionPipeline) -> list[Scene]:
    segmenter = Segmenter.load(config.segmenter, config.device) if config.target == "segmenter" else None
    splits = [open_split(config.domain, name) for name in ("train", "validation")]
    atlas = fit_atlas(splits[0])
    return [
        open_placed_scene(split, pipeline, atlas, notes=config.notes, segmenter=segmenter, prompts=config.prompts())
        for split in splits
    ]


def _outlined(config: AnatomyPromptsConfig, pipeline: StableDiffusionPipeline) -> list[Scene]:
    return [open_outlined_scene(open_split(config.domain, name), pipeline) for name in ("train", "validation")]


# domain -> its scenes of training and of validation images
SCENES: dict[str, Callable[[AnatomyPromptsConfig, StableDiffusionPipeline], list[Scene]]] = {
    "radiology": _placed,
    "dermatology": _outlined,
}


def run(config: AnatomyPromptsConfig) -> dict[str, Any] | None:
    """Train one adapter; returns its metrics, None where `max_minutes` was over first. Raises InputError for options
    out of range and images that are missing, ModelError for a base or networks that do not hold up."""
    config.checked()
    pipeline = open_pipeline(config.base, config.device)
    train, validation = SCENES[config.domain](config, pipeline)
    alignment = AlignmentNetwork.load(config.alignment, config.device) if config.alignment_weight > 0 else None
    return fit(AnatomyPromptsLearner(config, pipeline, train, validation, alignment), config)


def main(arguments: list[str]) -> None:
    """`python -m train anatomy_prompts RECIPE [overrides]`."""
    run(parse(arguments, AnatomyPromptsConfig))
