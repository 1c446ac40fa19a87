"""DreamBooth training from a config to a run folder: `run(config)`.

Order matters: photos, folder and settings are checked before the base loads; the base and its
adapters are built before anything on disk is replaced; only then the run begins.
"""

import gc
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from snell_diffusion.diffusion.batches import Batches, Concept, Latents, TextTable
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_text, config_values
from snell_diffusion.diffusion.data import Photo, data_digest, duplicates, find_photos
from snell_diffusion.diffusion.families import Family
from snell_diffusion.diffusion.feedback import RunFeedback
from snell_diffusion.diffusion.losses import DiffusionObjective, dreambooth_loss, squared_error
from snell_diffusion.diffusion.prior import check_recipe, generate_images, given_images
from snell_diffusion.diffusion.results import RunResult, save_result, write_card
from snell_diffusion.diffusion.run_folder import RunFolder, identity, require_same
from snell_diffusion.diffusion.sampling import Sampler
from snell_diffusion.diffusion.setup import (
    Sizes,
    add_adapters,
    base_digest,
    build_competition,
    build_optimizer,
    build_scheduler,
    load_base,
    make_accelerator,
    sizes,
)
from snell_diffusion.diffusion.validation import HeldOut
from snell_diffusion.errors import SnellaConfigError
from snell_diffusion.training.adapter_tensors import adapters_off, evaluating, require_finite
from snell_diffusion.training.checkpoints import Checkpoint
from snell_diffusion.training.ema import AdapterEma
from snell_diffusion.training.errors import Interrupted, NonFiniteError
from snell_diffusion.training.files import write_text
from snell_diffusion.training.loop import LoopSettings, TrainState, train
from snell_diffusion.training.signals import StopRequest
from snell_diffusion.training.tracking import Event, Tracker, cut_log, peak_memory

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Photos:
    """The checked photos of a run."""

    instance: list[Photo]
    held_out: list[Photo]
    given_class: list[Photo]

    @classmethod
    def find(cls, config: TrainConfig, folder: RunFolder) -> "Photos":
        """Check every photo and split off the held-out ones.

        Raises:
            SnellaConfigError: Bad photos, or too few to hold any out.
        """
        prompt = str(config.instance_prompt)
        instance = find_photos(str(config.instance_data_dir), prompt, config.use_captions)
        held_out: list[Photo] = []
        if config.validation_data_dir is not None:
            held_out = find_photos(config.validation_data_dir, prompt, config.use_captions)
        elif config.num_validation_photos:
            count = len(instance) - config.num_validation_photos
            if count < 1:
                raise SnellaConfigError(
                    f"num_validation_photos is {config.num_validation_photos}, but "
                    f"'{config.instance_data_dir}' holds {len(instance)} photos; at least one must "
                    f"be left to train on"
                )
            instance, held_out = instance[:count], instance[count:]
        given = []
        if config.with_prior_preservation:
            given = given_images(folder.class_images, str(config.class_prompt))
        return cls(instance, held_out, given)


def run(config: TrainConfig, on_event: OnEvent | None = None) -> RunResult:
    """Train one adapter.

    Args:
        config: All settings.
        on_event: Called with every event that log.jsonl gets.

    Returns:
        Paths and measurements. After a dry run nothing was written and `adapter_path` is None.

    Raises:
        SnellaError: Bad settings, photos, base or checkpoint; nothing was replaced.
        NonFiniteError: The loss or a gradient is not finite; the last good state is kept.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    began = time.monotonic()
    folder = RunFolder(config)
    photos = Photos.find(config, folder)
    if not config.dry_run:
        folder.check()
    _require_tracker(config)
    accelerator = make_accelerator(config)
    try:
        with StopRequest() as stop:
            session = Session(config, folder, photos, accelerator, stop, on_event)
            return session.dry_run(began) if config.dry_run else session.run(began)
    finally:
        # Another run in this process may use another precision.
        AcceleratorState._reset_state()
        gc.collect()


def _require_tracker(config: TrainConfig) -> None:
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise SnellaConfigError(
            f"report_to {config.report_to} needs a package that is not installed: "
            f"pip install {config.report_to}"
        )


class Session:
    """One run in one process: builds everything, then trains. See `run`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        photos: Photos,
        accelerator: Accelerator,
        stop: StopRequest,
        on_event: OnEvent | None,
    ) -> None:
        self.config, self.folder, self.photos = config, folder, photos
        self.accelerator, self.stop = accelerator, stop
        self._on_event = on_event
        self._notes: list[str] = []
        checkpoint = None if config.dry_run else folder.find_checkpoint(self._notes.append)
        self.family, self.pipe = load_base(config)
        base = base_digest(getattr(self.pipe, self.family.denoiser))
        self.components = add_adapters(config, self.family, self.pipe)
        for name in self._module_names():
            getattr(self.pipe, name).to(accelerator.device)
        self.objective = self.family.objective(self.pipe, accelerator.device)
        self.state = self._build_state()
        self.identity = identity(config, self._data(), base, accelerator.num_processes)
        if checkpoint is not None:
            require_same(checkpoint, self.identity)
            self.state.restore(checkpoint)
        self.checkpoint = checkpoint
        self.sampler = Sampler(
            self.family,
            self.pipe,
            size=config.resolution,
            steps=config.num_inference_steps,
            guidance=config.guidance_scale,
            seed=config.seed,
        )

    def _module_names(self) -> list[str]:
        parts = self.pipe.components.items()
        return [name for name, part in parts if isinstance(part, nn.Module)]

    def _data(self) -> str:
        return data_digest([*self.photos.instance, *self.photos.held_out])

    def _build_state(self) -> TrainState:
        config = self.config
        denoiser = next(iter(self.components.values()))
        if config.gradient_checkpointing:
            for model in self.components.values():
                enable = getattr(model, "enable_gradient_checkpointing", None)
                (enable or model.gradient_checkpointing_enable)()
            denoiser.train()
        optimizer = build_optimizer(config, self.components)
        decay = config.ema_decay
        return TrainState(
            components=self.components,
            optimizer=optimizer,
            scheduler=build_scheduler(config, optimizer),
            competition=build_competition(config, self.components),
            ema=None if decay is None else AdapterEma(self.components, decay),
            scaler=torch.amp.GradScaler(
                self.accelerator.device.type, enabled=config.mixed_precision == "fp16"
            ),
        )

    # -- the two ways to run ------------------------------------------------------------------

    def dry_run(self, began: float) -> RunResult:
        """One step on everything, nothing written."""
        tracker = Tracker(None, 1, self._on_event, main=self.accelerator.is_main_process)
        loss_at = self._loss(self._concepts(self.photos.given_class or self.photos.instance))
        settings = LoopSettings(self.config.seed, 1, self.config.gradient_accumulation_steps)
        start = time.monotonic()
        train(self.state, loss_at, settings, self.accelerator, lambda numbers: None, self.stop)
        seconds, memory = time.monotonic() - start, peak_memory(self.accelerator.device)
        size = sizes(self.components)
        for line in self._dry_lines(size, seconds, memory):
            tracker.note(line)
        tracker.close()
        elapsed = time.monotonic() - began
        path = Path(self.config.output_dir)
        return RunResult(path, None, None, None, tracker.history, elapsed, memory, size)

    def _dry_lines(self, size: Sizes, seconds: float, memory: int) -> list[str]:
        photos = self.photos
        lines = [
            f"base: {self.config.pretrained_model_name_or_path} ({self.family.name}), "
            f"{size.base:,} parameters",
            f"adapter: {self.config.method}, {size.trainable:,} trainable parameters in "
            f"{size.layers} layers ({size.adapted:,} weights)",
            f"photos: {len(photos.instance)} to train on, {len(photos.held_out)} held out",
        ]
        if self.config.with_prior_preservation:
            missing = max(0, self.config.num_class_images - len(photos.given_class))
            lines.append(f"class images: {len(photos.given_class)} there, {missing} to generate")
        lines.append(f"one step: {seconds:.2f} s, peak memory {memory / 2**30:.2f} GiB")
        return [*lines, "dry run: all checks passed, nothing was written"]

    def run(self, began: float) -> RunResult:
        """The whole run."""
        self._open()
        try:
            return self._train(began)
        except BaseException as error:
            ended = "stopped" if isinstance(error, Interrupted) else "failed"
            self.tracker.status(ended, force=True, message=str(error) or type(error).__name__)
            raise
        finally:
            self.tracker.close()
            self.accelerator.end_training()

    def _open(self) -> None:
        """Take the run folder: the first writes of the run."""
        main = self.accelerator.is_main_process
        path = self.folder.path
        if main:
            self.folder.clear()
            path.mkdir(parents=True, exist_ok=True)
            cut_log(path / "log.jsonl", self.state.step if self.checkpoint else -1)
            write_text(path / "config.yaml", config_text(self.config))
        self.accelerator.wait_for_everyone()
        remote = None
        if self.config.report_to != "none":
            plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config_values(self.config).items()}
            self.accelerator.init_trackers("dreambooth", config=plain)
            remote = lambda numbers, step: self.accelerator.log(numbers, step=step)  # noqa: E731
        self.tracker = Tracker(path, self.config.max_train_steps, self._on_event, remote, main)
        self.tracker.status("preparing", step=self.state.step)
        for note in self._notes:
            self.tracker.note(note)
        twins = duplicates(self.photos.instance)
        if twins:
            self.tracker.note(f"photos that equal an earlier one: {', '.join(twins)}")
        size = sizes(self.components)
        self.tracker.event(
            "start",
            step=self.state.step,
            photos=len(self.photos.instance),
            held_out=len(self.photos.held_out),
            layers=size.layers,
            trainable=size.trainable,
            device=str(self.accelerator.device),
            processes=self.accelerator.num_processes,
        )

    def _train(self, began: float) -> RunResult:
        concepts = self._concepts(self._class_photos())
        loss_at = self._loss(concepts)
        held_out = self._held_out()
        self.feedback = RunFeedback(
            self.config,
            self.folder.path,
            self.state,
            self.tracker,
            held_out,
            self.sampler,
            self.accelerator.autocast,
        )
        if self.state.step == 0:
            self.feedback.after(0)
        self._require_not_stopped()
        self._last = time.monotonic()
        try:
            stopped = train(
                self.state,
                loss_at,
                self._settings(),
                self.accelerator,
                self._on_step,
                self.stop,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. {self._keep_last_good()}") from error
        if stopped:
            path = self._save_checkpoint()
            raise Interrupted(
                self.stop.signum or 15,
                f"stopped after step {self.state.step}; continue with --resume_from_checkpoint "
                f"latest (state in {path})",
            )
        return self._finish(began)

    def _settings(self) -> LoopSettings:
        config = self.config
        return LoopSettings(
            config.seed,
            config.max_train_steps,
            config.gradient_accumulation_steps,
            config.max_grad_norm,
        )

    # -- data ---------------------------------------------------------------------------------

    def _class_photos(self) -> list[Photo]:
        """Class images: those given, and generated ones up to num_class_images."""
        config, folder = self.config, self.folder.class_images
        if not config.with_prior_preservation:
            return []
        prompt = str(config.class_prompt)
        missing = config.num_class_images - len(self.photos.given_class)
        recipe = {"prompt": prompt, "base": config.pretrained_model_name_or_path}
        if missing > 0:
            check_recipe(folder, recipe)
        if missing > 0 and self.accelerator.is_main_process:
            self.tracker.note(f"generating {missing} class images with '{prompt}'")
            quiet = evaluating(self.components), adapters_off(self.components)
            with quiet[0], quiet[1], self.accelerator.autocast():
                generate_images(
                    folder,
                    config.num_class_images,
                    prompt,
                    recipe,
                    self.sampler,
                    config.sample_batch_size,
                    self._class_progress,
                )
        self.accelerator.wait_for_everyone()
        return given_images(folder, prompt)[: config.num_class_images]

    def _class_progress(self, present: int) -> None:
        total = self.config.num_class_images
        self.tracker.status("class images", class_images=present, class_images_total=total)
        self._require_not_stopped()

    def _require_not_stopped(self) -> None:
        if self.stop.signum is not None and self.accelerator.num_processes == 1:
            raise Interrupted(self.stop.signum, f"stopped before step {self.state.step + 1}")

    def _concepts(self, class_photos: list[Photo]) -> list[Concept]:
        """Encode photos (and class images), the subject's first."""
        config = self.config
        plan = [("instance", self.photos.instance, config.train_batch_size)]
        if config.with_prior_preservation:
            prompt = str(config.class_prompt)
            images = [Photo(p.path, prompt, p.digest) for p in class_photos]
            plan.append(("class", images, config.class_batch_size or config.train_batch_size))
        return [
            Concept(name, photos, Latents(self.family, self.pipe, photos, config, name), batch)
            for name, photos, batch in plan
        ]

    def _text(self) -> TextTable:
        photos = [*self.photos.instance, *self.photos.held_out]
        prompts = [p.prompt for p in photos]
        if self.config.class_prompt is not None:
            prompts.append(self.config.class_prompt)
        cached = not self.config.train_text_encoder
        return TextTable(self.family, self.pipe, prompts, cached)

    def _held_out(self) -> HeldOut | None:
        photos = self.photos.held_out
        if not photos:
            return None
        latents = Latents(self.family, self.pipe, photos, self.config, "held-out")
        return HeldOut(
            self.family,
            self.objective,
            self.components,
            self._text(),
            latents.means(),
            [p.prompt for p in photos],
            self.config.validation_timesteps,
        )

    def _loss(self, concepts: list[Concept]) -> "Objective":
        batches = Batches(
            self.config,
            concepts,
            self._text(),
            self.objective.num_timesteps,
            self.accelerator,
        )
        denoiser = next(iter(self.components.values()))
        return Objective(self.config, self.family, self.objective, denoiser, batches)

    # -- after a step -------------------------------------------------------------------------

    def _on_step(self, numbers: dict[str, float]) -> None:
        now = time.monotonic()
        step = self.state.step
        self.tracker.step(
            step,
            **numbers,
            kept_share=self.feedback.kept_share,
            seconds=round(now - self._last, 4),
            memory=peak_memory(self.accelerator.device),
        )
        self.feedback.after(step)
        every = self.config.checkpointing_steps
        if (every and step % every == 0) or step == self.config.max_train_steps:
            self._save_checkpoint()
        self._last = time.monotonic()

    def _save_checkpoint(self) -> Path:
        """Publish the state after the current step, from the main process."""
        require_finite(self.components, f"after step {self.state.step}")
        path = self.folder.checkpoints.path(self.state.step)
        if self.accelerator.is_main_process:
            tensors, state = self.state.pack()
            state["identity"] = self.identity
            self.folder.checkpoints.save(self.state.step, tensors, state)
            self.tracker.event("checkpoint", step=self.state.step)
        self.accelerator.wait_for_everyone()
        return path

    def _keep_last_good(self) -> str:
        """Save the state before a failed step, if it is sound; say what is kept."""
        try:
            return f"The last good state is kept in {self._save_checkpoint()}"
        except NonFiniteError:
            steps = self.folder.checkpoints.steps()
            if steps:
                return f"The last good state is kept in {self.folder.checkpoints.path(steps[-1])}"
            return "No earlier state was saved; set checkpointing_steps to keep one"

    # -- the end ------------------------------------------------------------------------------

    def _finish(self, began: float) -> RunResult:
        require_finite(self.components, "at the end")
        self.tracker.status("saving")
        adapter = None
        if self.accelerator.is_main_process:
            with self.feedback._shown_weights():
                adapter = save_result(self.config, self.pipe, self.components, self.folder.path)
        result = RunResult(
            output_dir=self.folder.path,
            adapter_path=adapter,
            validation_loss_before=self.feedback.base_loss,
            validation_loss_after=self.feedback.validation_loss,
            history=self.tracker.history,
            seconds=time.monotonic() - began,
            peak_memory=peak_memory(self.accelerator.device),
            sizes=sizes(self.components),
        )
        if self.accelerator.is_main_process:
            write_card(self.config, result, self.feedback.draw_pictures())
        self.tracker.event(
            "finished", step=self.state.step, run_seconds=result.seconds, memory=result.peak_memory
        )
        self.tracker.status("finished", force=True, eta_s=0.0)
        self.accelerator.wait_for_everyone()
        return result


class Objective:
    """The loss of any (step, micro-batch): what `training.loop` minimises."""

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        objective: DiffusionObjective,
        denoiser: nn.Module,
        batches: Batches,
    ) -> None:
        self._config, self._family = config, family
        self._objective, self._denoiser, self._batches = objective, denoiser, batches

    def __call__(self, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self._batches(step, micro)
        noisy = self._objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = self._objective.target(batch.latents, batch.noise, batch.timesteps)
        prediction = self._family.denoise(self._denoiser, noisy, batch.timesteps, batch.conditions)
        weights = self._objective.weight(batch.timesteps, self._config.snr_gamma)
        return dreambooth_loss(
            squared_error(prediction, target),
            weights,
            batch.instances,
            self._config.prior_loss_weight,
        )
