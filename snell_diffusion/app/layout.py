"""The page: a Train tab and a Generate tab over Actions; the only file that builds components."""

import functools
import html
from collections.abc import Callable
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from snell_diffusion.app.actions import STEP_RANGE, TOKEN, Actions, Progress
from snell_diffusion.app.photos import MAX_PHOTOS
from snell_diffusion.app.embedded_studio import MAX_PROMPT, MAX_SEED
from snell_diffusion.errors import SnellaError

POLL = 2.0  # seconds between two looks at a run
PIPELINE = {"concurrency_id": "pipeline", "concurrency_limit": 1}
PICTURE = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
INTRO = f"""# SNELLA
Teach a small text-to-image model one subject from a few photos. Everything stays on this machine.
The word **{TOKEN}** in a prompt stands for your subject: *a photo of a {TOKEN} cat in the snow*."""


def build(actions: Actions) -> gr.Blocks:
    """The page over the given actions; not launched yet."""
    with gr.Blocks(title="SNELLA", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(INTRO)
        run, chosen = (gr.Dropdown([], label="Run", render=False) for _ in range(2))
        prompt = gr.Textbox(new_scene("cat"), label="Prompt", max_length=MAX_PROMPT, render=False)
        with gr.Tab("Train"):
            _train_tab(actions, run, chosen, prompt)
        with gr.Tab("Generate"):
            _generate_tab(actions, chosen, prompt)
        page.load(_choices(actions), outputs=[run, chosen], api_name="runs")
    return page


def _train_tab(actions: Actions, run: gr.Dropdown, chosen: gr.Dropdown, prompt: gr.Textbox) -> None:
    with gr.Row():
        with gr.Column():
            photos = gr.File(
                label=f"Photos of the subject (PNG, JPEG or WebP, up to {MAX_PHOTOS})",
                file_count="multiple",
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
            )
            word = gr.Textbox("cat", label="What is it? One or two English words", max_length=30)
            low, high = STEP_RANGE
            steps = gr.Slider(low, high, 200, step=1, label="Training steps")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            start = gr.Button("Train", variant="primary")
        with gr.Column():
            run.render()
            bar = gr.HTML()
            samples = gr.Image(label="Newest samples", **PICTURE)
            curve = gr.LinePlot(x="step", y="loss", title="Loss, mean of 20 steps", height=200)
            stop = gr.Button("Stop", variant="stop", interactive=False)
    view = [bar, samples, curve, stop]
    timer = gr.Timer(POLL)
    started = start.click(
        _said(_started(actions)),
        [photos, word, steps, seed],
        [run, chosen, prompt],
        api_name="train",
    )
    for event in (started.then, timer.tick, run.change):
        event(
            _said(_shown(actions)),
            [run],
            view,
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )
    stop.click(_said(actions.stop), [run], api_name="stop", queue=False)
    gr.api(_said(_status(actions)), api_name="status", queue=False)


def _generate_tab(actions: Actions, chosen: gr.Dropdown, prompt: gr.Textbox) -> None:
    with gr.Row():
        with gr.Column():
            chosen.render()
            prompt.render()
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength of the adapter")
            own = gr.Checkbox(False, label="Set the sparsity below instead of the trained one")
            sparsity = gr.Slider(0, 1, 0.5, step=0.01, label="Share of zeros in the update")
            draw = gr.Button("Generate", variant="primary")
        with gr.Column(), gr.Row():
            base = gr.Image(label="Base model", **PICTURE)
            adapted = gr.Image(label="With the adapter", **PICTURE)
    draw.click(
        _said(_drawn(actions)),
        [chosen, prompt, seed, strength, own, sparsity],
        [base, adapted],
        api_name="generate",
        **PIPELINE,
    )


def _said(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn this package's errors into the page's; any other error stays a bug with a traceback."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except SnellaError as error:
            raise gr.Error(str(error)) from error

    return call


def _choices(actions: Actions) -> Callable[[], Any]:
    def choices() -> Any:
        runs = actions.runs()
        return _both(runs, runs[0][1] if runs else None)

    return choices


def _both(runs: list[tuple[str, str]], job: str | None) -> tuple[Any, Any]:
    # one update each: gradio consumes the keys of the update it is given
    return gr.update(choices=runs, value=job), gr.update(choices=runs, value=job)


def _started(actions: Actions) -> Callable[..., Any]:
    def train(photos: list[str] | None, word: str, steps: int, seed: int) -> Any:
        job = actions.train(photos or [], word, steps, seed)
        return *_both(actions.runs(), job), new_scene(word.strip().lower())

    return train


def _shown(actions: Actions) -> Callable[..., Any]:
    def show(job: str | None) -> tuple[Any, ...]:
        if job is None:
            return "No run yet.", None, None, gr.update(interactive=False)
        progress = actions.progress(job)
        # numbers from the first, empty frame on: the plot's axes keep the type they start with
        frame = pd.DataFrame(progress.losses, columns=["step", "loss"], dtype=float)
        return bar_html(progress), progress.samples, frame, gr.update(interactive=progress.running)

    return show


def _status(actions: Actions) -> Callable[..., Any]:
    def status(job: str) -> dict[str, Any]:
        progress = actions.progress(job)
        return {
            "sentence": progress.sentence,
            "share": progress.share,
            "running": progress.running,
        }

    return status


def _drawn(actions: Actions) -> Callable[..., Any]:
    def draw(
        job: str | None, prompt: str, seed: int, strength: float, own: bool, sparsity: float
    ) -> Any:
        pictures = actions.draw(job or "", prompt, seed, strength, sparsity if own else None)
        return tuple(enlarged(picture) for picture in pictures)

    return draw


def new_scene(word: str) -> str:
    """A prompt that puts the subject where no photo showed it."""
    return f"a photo of a {TOKEN} {word} in the snow"


def enlarged(picture: Image.Image, side: int = 384) -> Image.Image:
    """A small picture with whole, unsmoothed pixels, up to about `side` of them a side."""
    factor = max(1, side // max(picture.size))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def bar_html(progress: Progress) -> str:
    """A progress bar with its sentence; the text is escaped, as it may quote a log."""
    text = html.escape(progress.sentence)
    bar = f'<progress value="{progress.share:.4f}" max="1" style="width:100%"></progress>'
    return f"{bar}<p>{text}</p>"
