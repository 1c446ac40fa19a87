"""One classification training in one process of a run."""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftConfig

from snell_diffusion.training.adapter_tensors import (
    adapter_tensors,
    copy_adapter_tensors,
    trainable_parameters,
)
from snell_diffusion.training.errors import (
    Interrupted,
    NonFiniteError,
)
from snell_diffusion.training.files import write_json
from snell_diffusion.training.finite import require_finite_weights
from snell_diffusion.training.keeping import StateKeeper
from snell_diffusion.training.loop import train
from snell_diffusion.training.parallel import Parallel, digest_of
from snell_diffusion.training.run_folder import RunFolder, require_same
from snell_diffusion.training.signals import StopRequest
from snell_diffusion.training.start import find_checkpoint, open_run
from snell_diffusion.training.tracking import OnEvent, Tracker, peak_memory
from snell_diffusion.vision.batches import ClassificationLoss, Order
from snell_diffusion.vision.classifier import Classifier
from snell_diffusion.vision.config import VisionConfig, config_values
from snell_diffusion.vision.data import Inputs, Preprocess, Split, Task, read_processor
from snell_diffusion.vision.features import Features, HeadAlone, is_constant
from snell_diffusion.vision.loading import base_digest, load_base
from snell_diffusion.vision.measure import Measurement, measure
from snell_diffusion.vision.method import COMPONENT, adapt
from snell_diffusion.vision.models import Family
from snell_diffusion.vision.optimization import build_state, loop_settings, run_length
from snell_diffusion.vision.pictures import draw_pictures
from snell_diffusion.vision.results import RunResult
from snell_diffusion.vision.run_folder import identity, run_folder
from snell_diffusion.vision.saving import Facts, adapter_bytes, head_bytes, save_classifier
from snell_diffusion.vision.sensitivity import selected

_RECORDS = 20  # allocations in the log of a run


class Trainer:
    """Building it loads and checks everything; nothing is written before `run`.

    Args:
        config: All settings, without `levels`.
        task: The images.
        parallel: The processes.
        stop: Ends the run between two steps.
        on_event: Called with every event that log.jsonl gets.
        test: Whether to measure on the test images at the end.
    """

    def __init__(
        self,
        config: VisionConfig,
        task: Task,
        parallel: Parallel,
        stop: StopRequest,
        on_event: OnEvent | None = None,
        *,
        test: bool = True,
    ) -> None:
        self._began = time.monotonic()
        self._config, self._task, self._test = config, task, test
        self._parallel, self._stop, self._on_event = parallel, stop, on_event
        self._folder = run_folder(config)
        self._notes = task.summary()
        checkpoint = find_checkpoint(self._folder, parallel, self._notes.append)
        self._base = load_base(
            config.base,
            len(task.classes),
            revision=config.revision,
            precision=config.mixed_precision,
            seed=config.seed,
        )
        model, family = self._base.model, self._base.family
        self._digest = base_digest(model)
        processor = read_processor(self._base.source, config.revision)
        self._preprocess = Preprocess.of(config, processor, self._base.side)
        inputs = Inputs(task.train, self._preprocess, True, config)
        per_step = config.train_batch_size * config.gradient_accumulation_steps * parallel.world
        self._order = Order(len(inputs), per_step, config.seed)
        self._steps = run_length(config, self._order)
        self._extras = family.extras(model) if config.train_cls_token else []
        model.to(parallel.device)
        self._sizes = adapt(config, self._base, self._steps, self._choose)
        model.train()
        components = {COMPONENT: model}
        self._state = build_state(config, components, self._extras, self._order, parallel)
        self._identity = identity(config, task.digest(), self._digest, parallel.world)
        if checkpoint is not None:
            require_same(checkpoint, self._identity)
            self._state.restore(checkpoint)
        parallel.require_equal(
            digest_of(self._identity, self._state.step),
            "settings, images, base or checkpoint of the run",
        )
        self._resumed = checkpoint is not None
        self._keeper = None if self._folder is None else self._keeper_in(self._folder)
        self._best_found: Measurement | None = None
        self._fixed = is_constant(model, inputs, config.backbone_drop_path or 0.0)
        self._asked: Family | HeadAlone = HeadAlone() if self._fixed else family
        shown = self._features(inputs)
        self._loss = ClassificationLoss(config, self._asked, model, shown, self._order, parallel)
        self._validation = self._inputs_of(task.validation)

    def _keeper_in(self, folder: RunFolder) -> StateKeeper:
        about = {"identity": self._identity}
        return StateKeeper(
            self._state, folder.checkpoints, self._parallel, lambda: about, "checkpointing_epochs"
        )

    def _choose(self, settings: PeftConfig) -> PeftConfig:
        """Settings that a sensitivity pass completes, on training images without augmentation."""
        shown = Inputs(self._task.train, self._preprocess, False, self._config)
        count = sum(self._base.model.get_parameter(name).numel() for name in self._extras)
        return selected(settings, self._config, self._base, shown, count, self._parallel)

    def _inputs_of(self, split: Split) -> Inputs | Features:
        """Pictures to measure on, or their features where those stay as they are."""
        return self._features(Inputs(split, self._preprocess, False, self._config))

    def _features(self, inputs: Inputs) -> Inputs | Features:
        if not self._fixed:
            return inputs
        base, batch = self._base, self._config.eval_batch_size
        return Features(base.family, base.model, inputs, batch, self._parallel)

    def run(self) -> RunResult:
        """Write the run folder, train, keep the best weights, measure them."""
        self._tracker = self._open()
        try:
            self._tracker.event(
                "start",
                step=self._state.step,
                images=len(self._task.train),
                classes=len(self._task.classes),
                layers=self._sizes.layers,
                trainable=self._sizes.trainable,
                steps_per_epoch=self._order.per_epoch,
                device=str(self._parallel.device),
                processes=self._parallel.world,
            )
            began = time.monotonic()
            self._train()
            return self._finish(time.monotonic() - began)
        except BaseException as error:
            state = "stopped" if isinstance(error, Interrupted) else "failed"
            self._tracker.ended(error, state)
            raise
        finally:
            self._tracker.close()

    def _open(self) -> Tracker:
        """Take the run folder: the first writes of the run."""
        return open_run(
            "classification",
            config_values(self._config),
            self._folder,
            self._parallel,
            steps=self._steps,
            resumed=self._state.step if self._resumed else None,
            notes=self._notes,
            on_event=self._on_event,
            quiet=self._config.quiet,
        )

    # Training

    def _train(self) -> None:
        self._last = time.monotonic()
        settings = loop_settings(self._config, self._steps)
        try:
            stopped = train(
                self._state, self._loss, settings, self._parallel, self._on_step, self._stop
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. {self._keep_last_good()}") from error
        if stopped:
            step, signum = self._state.step, self._stop.signum or 15
            if self._keeper is None:
                raise Interrupted(signum, f"stopped after step {step}; nothing was written")
            path = self._keeper.save(self._tracker)
            with self._shown():
                self._save(step)
            raise Interrupted(
                signum,
                f"stopped after step {step}, the state is in {path}; continue with "
                f"--resume_from_checkpoint latest",
            )

    def _keep_last_good(self) -> str:
        if self._keeper is None:
            return "Nothing was written"
        return self._keeper.keep_last_good(self._tracker)

    def _on_step(self, numbers: dict[str, float]) -> None:
        step, now = self._state.step, time.monotonic()
        self._tracker.step(
            step,
            **numbers,
            kept_share=self._kept_share(),
            seconds=round(now - self._last, 4),
            memory=peak_memory(self._parallel.device),
        )
        every = self._config.checkpointing_epochs
        per_epoch, last = self._order.per_epoch, step == self._steps
        if last or step % (per_epoch * self._config.eval_epochs) == 0:
            self._validate(step)
        last = last or self._state.exhausted
        if last or step % max(1, self._steps // _RECORDS) == 0:
            self._record_allocation(step, last)
        if self._keeper is not None and (last or (every and step % (every * per_epoch) == 0)):
            self._keeper.save(self._tracker)
        self._last = time.monotonic()

    def _kept_share(self) -> float | None:
        """Share of the update's entries that the layers' levels keep; None without levels."""
        competition = self._state.competition
        return None if competition is None else competition.kept_share()

    def _record_allocation(self, step: int, last: bool) -> None:
        competition = self._state.competition
        if competition is None or (self._config.quiet and not last):
            return
        layers = competition.report()
        if layers:
            self._tracker.event("allocation", step=step, layers=layers)

    def _shown(self) -> AbstractContextManager[None]:
        """What is measured: the average where one is kept."""
        return nullcontext() if self._state.ema is None else self._state.ema.applied()

    def _validate(self, step: int) -> None:
        weights = trainable_parameters(self._state.components)
        require_finite_weights(weights, f"after step {step}", self._parallel)
        with self._shown():
            found = self._measure(self._validation)
            assert self._state.best is not None
            if self._state.best.observe(step, found.objective):
                self._best_found = found
        numbers = {"validation_loss": found.loss, "validation_accuracy": found.accuracy}
        epoch = round(step / self._order.per_epoch, 4)
        self._tracker.event("validation", step=step, epoch=epoch, **numbers)
        self._tracker.remote(numbers, step)

    def _measure(self, inputs: Inputs | Features) -> Measurement:
        model, batch = self._base.model, self._config.eval_batch_size
        return measure(self._asked, model, inputs, batch, self._parallel)

    # The end

    def _finish(self, train_seconds: float) -> RunResult:
        """Put the best weights into the model, measure and save them."""
        self._tracker.status("saving")
        best, task = self._state.best, self._task
        assert best is not None
        copy_adapter_tensors(self._state.components, best.tensors)
        validation = self._best_found or self._measure(self._validation)
        test = self._measure_test(task.test, validation)
        config, base = self._config, self._base
        written = self._save(best.step)
        data = adapter_bytes(config, base, best.step)
        result = RunResult(
            output_dir=None if self._folder is None else self._folder.path,
            adapter_path=written,
            adapter_bytes=self._stored_bytes(data),
            head_bytes=len(head_bytes(base, self._extras)),
            # In float32, since it is asked outside of the run's autocast.
            classifier=Classifier(
                base.family, base.model.float().eval(), task.classes, self._preprocess
            ),
            classes=task.classes,
            validation=validation,
            test=test,
            sizes=self._sizes,
            steps_per_epoch=self._order.per_epoch,
            step=self._state.step,
            kept_step=best.step,
            stopped_early=self._state.exhausted,
            seconds=time.monotonic() - self._began,
            train_seconds=train_seconds,
            peak_memory=peak_memory(self._parallel.device),
            history=self._tracker.history,
        )
        self._tell(result)
        return result

    def _measure_test(self, split: Split, validation: Measurement) -> Measurement | None:
        if not self._test:
            return None
        if split is self._task.validation:
            return validation
        return self._measure(self._inputs_of(split))

    def _stored_bytes(self, data: bytes | None) -> int:
        if data is not None:
            return len(data)
        trained = adapter_tensors(self._state.components).items()
        beside = {id(p) for p in self._base.model.get_submodule("classifier").parameters()}
        return sum(t.numel() * t.element_size() for _, t in trained if id(t) not in beside)

    def _save(self, step: int) -> Path | None:
        """Write the classifier as it is now; return its adapter."""
        if self._folder is None or not self._parallel.main:
            return None
        config = self._config
        facts = Facts(
            config.base,
            config.revision,
            self._digest,
            config.mixed_precision,
            config.method,
            self._task.classes,
            self._preprocess,
        )
        return save_classifier(self._folder.path, config, self._base, facts, self._extras, step)

    def _tell(self, result: RunResult) -> None:
        numbers: dict[str, Any] = {
            "validation_accuracy": result.validation.accuracy,
            "test_accuracy": None if result.test is None else result.test.accuracy,
        }
        self._tracker.event(
            "finished",
            step=result.step,
            kept_step=result.kept_step,
            run_seconds=round(result.seconds, 2),
            **numbers,
        )
        if self._folder is not None and self._parallel.main:
            write_json(self._folder.path / "result.json", result.to_json())
            if not self._config.quiet:
                draw_pictures(self._folder.path, result)
        self._tracker.status("finished", force=True, eta_s=0.0, kept_step=result.kept_step)
        self._parallel.wait()
