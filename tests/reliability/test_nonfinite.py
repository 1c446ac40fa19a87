"""R7: NaN and infinity stop a run before they are taken into it, wherever they come from.

Every case goes through the script and asks for the same: exit code 3, a message with step, cause
and advice, the last good state kept bit for bit, and not one NaN in any file of the run folder.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

import train_dreambooth_snella
from snell_diffusion.diffusion import encoded, objective, training
from snell_diffusion.diffusion.config_files import config_text
from snell_diffusion.diffusion.data import Photo
from snell_diffusion.diffusion.framing import Size, View
from snell_diffusion.training.ema import AdapterEma
from snell_diffusion.training.errors import NonFiniteError
from snell_diffusion.training.finite import not_finite
from snell_diffusion.training.loop import LoopSettings, TrainState, train
from snell_diffusion.training.parallel import Replicated
from snell_diffusion.training.randomness import normal
from snell_diffusion.training.signals import StopRequest
from snell_diffusion.training.tracking import read_log
from snell_diffusion.tuners import Competition
from tests import tiny_models
from tests.diffusion.training_runs import PROMPT, config
from tests.training.models import adapted

pytestmark = pytest.mark.row("R7")

ADVICE = "Lower learning_rate, or use mixed_precision no or bf16"


def train_by_script(base: Path, folder: Path, **changes: Any) -> int:
    """Run the script on a config with a drawn prompt and EMA; returns its exit code."""
    values = {"validation_prompt": PROMPT, "ema_decay": 0.9, "target_modules": ["to_q"], **changes}
    folder.mkdir(exist_ok=True)
    file = folder / "settings.yaml"
    file.write_text(config_text(config(base, folder, **values)), "utf-8")
    return train_dreambooth_snella.main(["--config", str(file)])


def refuse_constant(text: str) -> NoReturn:
    raise AssertionError(f"{text} in a JSON file")


def require_clean(run: Path) -> None:
    """No adapter, nothing unfinished, and no value that is not finite in any file."""
    assert not list(run.glob("*.safetensors"))
    assert not list(run.rglob(".tmp*"))
    for path in run.rglob("*.safetensors"):
        # A threshold that is not stored is kept as NaN: it is computed from the level instead.
        tensors = {k: t for k, t in load_file(path).items() if "snella_threshold" not in k}
        assert not_finite({k: t for k, t in tensors.items() if t.is_floating_point()}) == []
    for path in (*run.rglob("*.json"), *run.rglob("*.jsonl")):
        for line in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            json.loads(line, parse_constant=refuse_constant)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["message"]


@pytest.fixture(scope="module")
def healthy(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of an undisturbed run, one after every step."""
    folder = tmp_path_factory.mktemp("healthy")
    assert train_by_script(tiny_base, folder, checkpointing_steps=1, checkpoints_total_limit=9) == 0
    return folder / "run" / "checkpoints"


def require_kept(run: Path, healthy: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, bit for bit as if nothing had happened after it."""
    newest = max(path.name for path in (run / "checkpoints").iterdir())
    assert newest == f"step-{step:06d}"
    for name in ("adapter", "optimizer", "ema", "competition"):
        kept, expected = (
            load_file(root / newest / f"{name}.safetensors")
            for root in (run / "checkpoints", healthy)
        )
        assert kept.keys() == expected.keys()
        # the level of the next step may be set already; it is set again on resuming
        names = [k for k in kept if "snella_sparsity" not in k]
        assert all(
            torch.equal(
                kept[k],
                expected[k],
            )
            or "threshold" in k
            for k in names
        )


def on_state(monkeypatch: pytest.MonkeyPatch, change: Callable[[TrainState], None]) -> None:
    """Let `change` tamper with the state of the run, once it is built."""
    build = training.build_state

    def built(*arguments: Any) -> TrainState:
        state = build(*arguments)
        change(state)
        return state

    monkeypatch.setattr(training, "build_state", built)


def test_loss(
    tiny_base: Path,
    tmp_path: Path,
    healthy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error of one sample is NaN at step 3: part, photo and timestep are named."""
    calls, real = [], objective.squared_error

    def errors(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        calls.append(None)
        spoiled = math.nan if len(calls) == 3 else 1.0
        return real(prediction, target, mask) * torch.tensor([1.0, spoiled])

    monkeypatch.setattr(objective, "squared_error", errors)
    assert train_by_script(tiny_base, tmp_path) == 3
    said = capsys.readouterr().err
    assert "NonFiniteError: the loss is nan at step 3, learning rate 1.0e-02" in said
    assert "in loss_instance; photo '" in said
    assert said.count(".png' at timestep ") == 1
    assert f"the step was not taken. {ADVICE}. The last good state is kept in " in said
    require_kept(tmp_path / "run", healthy, 2)
    require_clean(tmp_path / "run")


def test_gradient(
    tiny_base: Path,
    tmp_path: Path,
    healthy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One entry of one gradient is NaN at step 3, under a finite loss."""

    def tamper(state: TrainState) -> None:
        def hook(gradient: Tensor) -> Tensor:
            if state.step == 2:
                gradient = gradient.clone()
                gradient.view(-1)[0] = math.nan
            return gradient

        state.parameters[1].register_hook(hook)

    on_state(monkeypatch, tamper)
    assert train_by_script(tiny_base, tmp_path) == 3
    said = capsys.readouterr().err
    assert "the gradient norm is nan at step 3, loss " in said
    assert ".snella_B.default; the step was not taken" in said
    assert said.count("default") == 1, "one parameter is to blame, not all that were clipped"
    require_kept(tmp_path / "run", healthy, 2)
    require_clean(tmp_path / "run")


def spoil_weight(after: int) -> Callable[[TrainState], None]:
    """Let the update of step `after` write a NaN."""

    def tamper(state: TrainState) -> None:
        def spoil(*_: Any) -> None:
            if state.step == after - 1:
                with torch.no_grad():
                    state.parameters[0].view(-1)[3] = math.nan

        state.optimizer.register_step_post_hook(spoil)

    return tamper


def test_weight(
    tiny_base: Path,
    tmp_path: Path,
    healthy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The update of step 3 spoils a weight: found before anything is measured or saved."""
    on_state(monkeypatch, spoil_weight(after=3))
    assert train_by_script(tiny_base, tmp_path, checkpointing_steps=1) == 3
    said = capsys.readouterr().err
    assert "after step 3 weights are NaN, infinite or too large to square, in unet." in said
    assert ".snella_A.default; nothing was saved. " in said
    assert said.count("default") == 1
    assert f"{ADVICE}. The last good state is kept in " in said
    require_kept(tmp_path / "run", healthy, 2)
    require_clean(tmp_path / "run")


def test_weight_where_nothing_is_due(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 60 steps every third is measured; the fifth spoils a weight, the sixth is not taken."""
    on_state(monkeypatch, spoil_weight(after=5))
    code = train_by_script(tiny_base, tmp_path, max_train_steps=60, checkpointing_steps=2)
    assert code == 3
    said = capsys.readouterr().err
    assert "too large to square before step 6, learning rate 1.0e-02, in unet." in said
    assert ".snella_A.default; the step was not taken. " in said
    assert "The last good state is kept in " in said
    assert "step-000004" in said
    require_clean(tmp_path / "run")


def test_latents(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One photo overflows the VAE: it is named before the first step."""
    encode = encoded.Latents._encode

    def spoiled(self: encoded.Latents, photo: Photo, shape: Size, view: View) -> dict[str, Tensor]:
        found = encode(self, photo, shape, view)
        if photo.path.name == "1.png":
            found["mean"][0, 0, 0] = math.inf
        return found

    monkeypatch.setattr(encoded.Latents, "_encode", spoiled)
    assert train_by_script(tiny_base, tmp_path) == 3
    said = capsys.readouterr().err
    photo = tmp_path / "photos" / "1.png"
    assert f"before step 1: the VAE's latents are NaN or infinite for: photo '{photo}'. " in said
    assert "Take these photos out" in said
    require_clean(tmp_path / "run")


def test_text_embedding(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One caption overflows the text encoder: it is named before the first step."""
    encode = encoded.TextTable._encode

    def spoiled(self: encoded.TextTable, prompts: Any) -> Any:
        found = encode(self, prompts)
        for index, prompt in enumerate(prompts):
            if prompt == "a caption":
                found["text"][index, 0, 0] = math.nan
        return found

    monkeypatch.setattr(encoded.TextTable, "_encode", spoiled)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "2.txt").write_text("a caption")
    assert train_by_script(tiny_base, tmp_path) == 3
    said = capsys.readouterr().err
    assert "before step 1: the text encoder's embedding is NaN or infinite for: prompt 'a c" in said
    assert "Change the prompt" in said
    require_clean(tmp_path / "run")


def test_sampled_image(
    tiny_base: Path, tmp_path: Path, healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that is NaN is noted and left out, not drawn black; the run goes on unchanged."""
    from diffusers import AutoencoderKL

    calls, decode = [], AutoencoderKL.decode

    def decoded(self: AutoencoderKL, *arguments: Any, **options: Any) -> Any:
        found = decode(self, *arguments, **options)
        calls.append(None)
        if len(calls) == 2:
            found.sample[0, :, 3, 3] = math.nan
        return found

    monkeypatch.setattr(AutoencoderKL, "decode", decoded)
    assert train_by_script(tiny_base, tmp_path, sample_steps=2) == 0
    run = tmp_path / "run"
    notes = [e["message"] for e in read_log(run / "log.jsonl") if e["event"] == "note"]
    assert any(
        "sampling at step 2 failed and was skipped: the VAE gave NaN" in note and PROMPT in note
        for note in notes
    )
    sheets = sorted(path.name for path in (run / "samples").iterdir())
    assert sheets == ["step-000000.png", "step-000004.png"]
    adapter = load_file(run / "checkpoints" / "step-000004" / "adapter.safetensors")
    expected = load_file(healthy / "step-000004" / "adapter.safetensors")
    assert all(torch.equal(adapter[k], expected[k]) or "threshold" in k for k in expected)


def test_bf16_autocast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base that overflows in bfloat16: also what is measured before the first step is no NaN."""
    pipe = tiny_models.pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(3e38)
    pipe.save_pretrained(tmp_path / "base")
    assert train_by_script(tmp_path / "base", tmp_path, mixed_precision="bf16") == 3
    said = capsys.readouterr().err
    assert "the loss is " in said
    assert " at step 1, learning rate 1.0e-02, in loss_instance; photo '" in said
    require_clean(tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert next(e for e in log if e["event"] == "validation")["validation_loss"] is None
    notes = [e["message"] for e in log if e["event"] == "note"]
    assert any("held-out loss of the base model is " in note for note in notes)
    assert not (tmp_path / "run" / "samples").exists()


def scaled(components: dict[str, nn.Module]) -> TrainState:
    parameters = [p for p in components["net"].parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    return TrainState(
        components=components,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        competition=Competition(
            components, "default", components["net"].first.configs["default"], 40
        ),
        ema=AdapterEma(components, 0.9),
        scaler=torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**24),
    )


def moved(state: TrainState) -> dict[str, Tensor]:
    """All that a step may change, but the levels, which follow the count of steps."""
    tensors, _ = state.pack()
    return {
        f"{group}/{name}": tensor.detach().clone().nan_to_num(7.0)
        for group, values in tensors.items()
        for name, tensor in values.items()
        if not ("sparsity" in name or "threshold" in name)
    }


def test_fp16_autocast() -> None:
    """Steps that overflow move nothing but the scale; N in a row that still overflow are an error.

    The base is float16, the factors are float32. The first loss is so large that its scaled
    gradients overflow float16 until the scale is low enough.
    """
    model = adapted()
    for layer in (model["net"].first, model["net"].second):
        layer.base_layer.half()
    state, before, numbers = scaled(model), {}, []
    assert {p.dtype for p in state.parameters} == {torch.float32}
    broken = False

    def loss_at(step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.float16):
            answer = model["net"](normal((4, 6), 0, "x", step, micro))
        loss = answer.float().square().mean()
        return (loss + (loss - loss.detach()).sqrt() if broken else loss), {}

    def on_step(found: dict[str, float]) -> None:
        numbers.append(found)
        now, scale, rate = moved(state), state.scaler.get_scale(), state.scheduler.get_last_lr()
        unchanged = all(torch.equal(now[k], before[k]) for k in before) if before else None
        history.append((unchanged, scale, rate[0]))
        before.clear()
        before.update(now)

    history: list[tuple[bool | None, float, float]] = []
    before.update(moved(state))
    parallel = Replicated(Accelerator(cpu=True))
    train(state, loss_at, LoopSettings(0, 30), parallel, on_step, StopRequest())
    skipped = [n.get("skipped", 0) for n in numbers]
    first = skipped.index(0)
    assert first >= 2, "no step overflowed, so nothing was shown"
    assert skipped == [*range(1, first + 1), *[0] * (30 - first)]
    assert [same for same, _, _ in history] == [True] * first + [False] * (30 - first)
    assert [scale for _, scale, _ in history[:first]] == [2.0 ** (23 - i) for i in range(first)]
    assert [rate for _, _, rate in history[: first + 1]] == [0.05] * first + [0.025]
    assert all(math.isfinite(v) for n in numbers for v in n.values())
    assert all("grad_norm" not in n for n in numbers[:first])
    assert not_finite(dict(enumerate(state.parameters))) == []  # type: ignore[arg-type]
    assert state.step == 30

    broken = True
    with pytest.raises(
        NonFiniteError, match=r"norm is nan at step 51 \(after 20 skipped steps in a row\), loss 0"
    ):
        train(state, loss_at, LoopSettings(0, 60), parallel, lambda n: None, StopRequest())
    assert all(torch.equal(v, before[k]) for k, v in moved(state).items())


@pytest.mark.parametrize("method", ["snella", "lora"])
def test_learning_rate(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """1e30: the weights after the first update are finite, and garbage; no file ever holds them."""
    assert train_by_script(tiny_base, tmp_path, method=method, learning_rate=1e30) == 3
    said = capsys.readouterr().err
    assert "after step 1 weights are NaN, infinite or too large to square, in unet." in said
    assert f"nothing was saved. {ADVICE}. No earlier state was saved" in said
    require_clean(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))
