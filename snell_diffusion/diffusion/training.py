"""DreamBooth training from a config to a run folder: `run(config)`.

Order matters: photos, folder and settings are checked before the base loads; the base and its
adapters are built before anything on disk is replaced; only then the run begins.
"""

import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from snell_diffusion.adapters.export_tokens import EMBEDS_GLOB
from snell_diffusion.diffusion.cache import Cache
from snell_diffusion.diffusion.card import Facts, write_card
from snell_diffusion.diffusion.config import TrainConfig
from snell_diffusion.diffusion.config_files import config_values
from snell_diffusion.diffusion.config_idle import idle_settings
from snell_diffusion.diffusion.data import Photo, data_digest
from snell_diffusion.diffusion.drawing import LedSampler
from snell_diffusion.diffusion.dry_run import dry_run
from snell_diffusion.diffusion.feedback import RunFeedback
from snell_diffusion.diffusion.framing import shapes
from snell_diffusion.diffusion.hub import require_hub, upload
from snell_diffusion.diffusion.inputs import Photos
from snell_diffusion.diffusion.licence import base_licence
from snell_diffusion.diffusion.new_tokens import require_words_used
from snell_diffusion.diffusion.objective import build_loss, build_probe
from snell_diffusion.diffusion.optimization import build_state, loop_settings, start_processes
from snell_diffusion.diffusion.prior import (
    ClassImages,
    class_images,
    complete_images,
    require_recipes,
)
from snell_diffusion.diffusion.results import RunResult, save_result
from snell_diffusion.diffusion.run_folder import RunFolder, identity, require_same
from snell_diffusion.diffusion.sampling import Sampler
from snell_diffusion.diffusion.sensitivity import chosen
from snell_diffusion.diffusion.setup import absent_parts, base_path, build_model, size_notes
from snell_diffusion.training.adapter_tensors import (
    adapters_off,
    evaluating,
)
from snell_diffusion.training.errors import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    UploadError,
)
from snell_diffusion.training.keeping import StateKeeper
from snell_diffusion.training.loop import train
from snell_diffusion.training.parallel import Parallel, digest_of
from snell_diffusion.training.parallel.launcher import launcher_pid
from snell_diffusion.training.signals import StopRequest
from snell_diffusion.training.start import (
    end_processes,
    find_checkpoint,
    open_run,
    require_tracker,
)
from snell_diffusion.training.tracking import OnEvent, Tracker, peak_memory

__all__ = ["RunResult", "run"]

_DRIFT_IMAGES = 4


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
    folder = RunFolder(config)
    photos = Photos.find(config, folder)
    require_words_used(config, photos.instance)
    if not config.dry_run:
        folder.check()
    require_tracker(config.report_to)
    _cache_of(config).check()
    repository = require_hub(config)
    parallel = start_processes(config)
    try:
        with StopRequest(launcher_pid()) as stop:
            if config.dry_run:
                if config.resume_from_checkpoint is None:
                    require_recipes(config, folder)
                return dry_run(config, photos, parallel, stop, on_event)
            trainer = Trainer(config, folder, photos, parallel, stop, on_event, repository)
            return trainer.run()
    finally:
        end_processes(parallel)
        gc.collect()


def _cache_of(config: TrainConfig) -> Cache:
    return Cache(None if config.cache_dir is None else Path(config.cache_dir))


def _ending(error: BaseException) -> str:
    """What status.json says of a run that ends with an error."""
    if isinstance(error, UploadError):
        return "finished"
    return "stopped" if isinstance(error, Interrupted) else "failed"


class Trainer:
    """One run in one process. Building it loads and checks everything; nothing is written yet."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        photos: Photos,
        parallel: Parallel,
        stop: StopRequest,
        on_event: OnEvent | None,
        repository: str | None = None,
    ) -> None:
        self._repository = repository
        self._began = time.monotonic()
        self._config, self._folder, self._photos = config, folder, photos
        self._parallel, self._stop, self._on_event = parallel, stop, on_event
        self._closing = ExitStack()
        self._notes = idle_settings(config)
        checkpoint = find_checkpoint(folder, parallel, self._notes.append)
        if checkpoint is None:  # a resumed run compares the images themselves
            require_recipes(config, folder)
        selection = chosen(config, photos, parallel)
        self._model = build_model(config, parallel.device, parallel, selection)
        self._notes += photos.summary(config, shapes(config, self._model.family.multiple))
        self._notes += size_notes(config, self._model)
        self._state = build_state(config, self._model.components, parallel)
        self._identity = identity(config, photos.digest(), self._model.base, parallel.world)
        if checkpoint is not None:
            require_same(checkpoint, self._identity)
            self._state.restore(checkpoint)
        parallel.require_equal(
            digest_of(self._identity, self._state.step),
            "settings, photos, base or checkpoint of the run",
        )
        self._resumed = checkpoint is not None
        self._class_digest = checkpoint.state["class_images"] if checkpoint else None
        self._keeper = StateKeeper(
            self._state, folder.checkpoints, parallel, self._about, "checkpointing_steps"
        )
        self._sampler = Sampler(
            self._model,
            size=config.resolution,
            steps=config.num_inference_steps,
            guidance=config.guidance_scale,
            seed=config.seed,
        )

    def _about(self) -> dict[str, Any]:
        return {"identity": self._identity, "class_images": self._class_digest}

    def _write_card(self, result: RunResult) -> None:
        """Pictures and model card; with push_to_hub all of it goes to the hub."""
        config, pictures = self._config, self._feedback.draw_pictures()
        online = self._repository is not None
        licence = base_licence(base_path(config), config.revision, online)
        pipe = self._model.pipe
        facts = Facts(type(pipe).__name__, licence, self._repository, absent_parts(pipe))
        card = write_card(config, result, pictures, facts)
        assert result.adapter_path is not None
        folder = result.output_dir
        self._to_upload = [
            result.adapter_path,
            card,
            *(folder / name for name in pictures),
            *sorted(folder.glob(EMBEDS_GLOB)),
            *sorted((folder / "samples").glob("step-*.png")),
        ]

    def _upload(self) -> None:
        """Everything is written by now, and stays if the hub refuses it."""
        if self._repository is None:
            return
        try:
            if self._parallel.main:
                address = upload(self._repository, self._config, self._to_upload)
                self._tracker.note(f"uploaded to {address}")
        except UploadError as error:
            self._tracker.note(str(error))
            raise

    def run(self) -> RunResult:
        """Write the run folder, train, leave the adapter."""
        self._tracker = self._open()
        try:
            self._prepare()
            self._train()
            result = self._finish()
            self._upload()
            return result
        except BaseException as error:
            self._tracker.ended(error, _ending(error))
            raise
        finally:
            self._closing.close()
            self._tracker.close()

    def _open(self) -> Tracker:
        """Take the run folder: the first writes of the run."""
        return open_run(
            "dreambooth",
            config_values(self._config),
            self._folder,
            self._parallel,
            steps=self._config.max_train_steps,
            resumed=self._state.step if self._resumed else None,
            notes=self._notes,
            on_event=self._on_event,
        )

    def _prepare(self) -> None:
        """Class images, caches, and what the user sees before the first step."""
        config, model = self._config, self._model
        size = model.sizes
        self._tracker.event(
            "start",
            step=self._state.step,
            photos=len(self._photos.instance),
            held_out=len(self._photos.held_out),
            layers=size.layers,
            trainable=size.trainable,
            device=str(model.device),
            processes=self._parallel.world,
            strategy=self._parallel.name,
        )
        prior = self._class_images()
        cache = _cache_of(config)
        self._loss = build_loss(
            config, model, self._photos.instance, prior, self._parallel, self._closing, cache
        )
        held_out = build_probe(config, model, self._photos.held_out, self._parallel, cache)
        classes = self._photos.drift_photos(prior, config, _DRIFT_IMAGES)
        drift = build_probe(config, model, classes, self._parallel, cache)
        if cache.used:
            self._tracker.note(cache.summary())
        self._free_encoders()
        self._feedback = RunFeedback(
            config,
            self._folder.path,
            self._state,
            self._tracker,
            held_out,
            drift,
            self._sampler,
            self._parallel,
        )
        if self._state.step == 0:
            self._feedback.after(0)

    def _free_encoders(self) -> None:
        """Encode the prompts of sample pictures now; nothing else needs frozen encoders later."""
        config, model = self._config, self._model
        if not model.text_is_frozen:
            return
        with evaluating(model.components), self._parallel.accelerator.autocast():
            self._sampler.prepare(config.prompts * config.num_validation_images)
        freed = model.phases.free("text", *(() if config.prompts else ("latents", "decode")))
        if freed:
            self._tracker.note(f"freed for the rest of the run: {', '.join(freed)}")

    def _class_images(self) -> list[Photo]:
        images = class_images(self._config, self._folder)
        if not images:
            return []
        components, autocast = self._model.components, self._parallel.accelerator.autocast
        with evaluating(components), adapters_off(components), autocast():
            self._complete_class_images(images)
        self._parallel.wait()
        found = [photo for some in images for photo in some.given()]
        digest = data_digest(found)
        if self._class_digest not in (None, digest):
            folders = "', '".join(str(some.folder) for some in images)
            raise CheckpointError(
                f"the class images in '{folders}' are not those that the interrupted run trained "
                f"on; put them back, or start anew with --overwrite"
            )
        self._class_digest = digest
        return found

    def _complete_class_images(self, images: Sequence[ClassImages]) -> None:
        """Only the main process counts and writes; the others help where its passes need them."""
        together = self._parallel.shares_forward and self._parallel.world > 1
        sampler = LedSampler(self._sampler) if together else self._sampler
        if self._parallel.main:
            for some in images:
                complete_images(self._config, some, sampler, self._class_progress)
            if isinstance(sampler, LedSampler):
                sampler.dismiss()
        elif isinstance(sampler, LedSampler):
            sampler.follow()

    def _class_progress(self, present: int, wanted: int) -> None:
        self._tracker.status("class images", class_images=present, class_images_total=wanted)
        self._require_not_stopped()

    def _require_not_stopped(self) -> None:
        if self._stop.signum is not None and self._parallel.world == 1:
            raise Interrupted(
                self._stop.signum,
                f"stopped before step {self._state.step + 1}; continue with "
                f"--resume_from_checkpoint auto",
            )

    def _train(self) -> None:
        self._require_not_stopped()
        self._last = time.monotonic()
        self._model.phases.enter("train")
        try:
            stopped = train(
                self._state,
                self._loss,
                loop_settings(self._config),
                self._parallel,
                self._on_step,
                self._stop,
            )
        except NonFiniteError as error:
            kept = self._keeper.keep_last_good(self._tracker)
            raise NonFiniteError(f"{error}. {kept}") from error
        if stopped:
            path = self._keeper.save(self._tracker)
            self._save_adapter(self._state.step)
            raise Interrupted(
                self._stop.signum or 15,
                f"stopped after step {self._state.step}, the state is in {path}; continue with "
                f"--resume_from_checkpoint latest",
            )

    def _on_step(self, numbers: dict[str, float]) -> None:
        step, now = self._state.step, time.monotonic()
        self._tracker.step(
            step,
            **numbers,
            kept_share=self._feedback.kept_share,
            seconds=round(now - self._last, 4),
            memory=peak_memory(self._model.device),
        )
        self._feedback.after(step)
        every = self._config.checkpointing_steps
        last = step == self._config.max_train_steps or self._state.exhausted
        if (every and step % every == 0) or last:
            self._keeper.save(self._tracker)
        self._model.phases.enter("train")
        self._last = time.monotonic()

    def _save_adapter(self, step: int) -> Path:
        """Write the adapter file as it is now, after optimizer step `step`; return its path.

        A run that is stopped leaves one too, so that what it learned so far can be drawn with.
        """
        components, path = self._model.components, self._folder.path / self._folder.adapter_file
        if self._parallel.main:
            with self._feedback.shown_weights(), self._parallel.as_loaded(components):
                save_result(self._config, self._model.pipe, components, path, step)
        return path

    def _finish(self) -> RunResult:
        """Write adapter, pictures and model card."""
        self._tracker.status("saving")
        self._feedback.conclude()
        best = self._state.best
        adapter = self._save_adapter(self._state.step if best is None else best.step)
        result = RunResult(
            output_dir=self._folder.path,
            adapter_path=adapter,
            validation_loss_before=self._feedback.base_loss,
            validation_loss_after=self._feedback.validation_loss(),
            history=self._tracker.history,
            seconds=time.monotonic() - self._began,
            peak_memory=peak_memory(self._model.device),
            sizes=self._model.sizes,
            step=self._state.step,
            kept_step=None if best is None else best.step,
            stopped_early=self._state.exhausted,
        )
        if best is not None:
            ended = "stopped early" if self._state.exhausted else "ended"
            self._tracker.note(
                f"{ended} at step {self._state.step}; kept is the best adapter measured, "
                f"step {best.step}, held-out loss {best.loss:.4f}"
            )
        if self._parallel.main:
            self._write_card(result)
        self._tracker.event(
            "finished",
            step=self._state.step,
            run_seconds=round(result.seconds, 2),
            memory=result.peak_memory,
        )
        self._tracker.status("finished", force=True, eta_s=0.0, kept_step=result.kept_step)
        self._parallel.wait()
        return result
