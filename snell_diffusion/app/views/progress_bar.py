"""Bars of the drawing tabs as HTML; all they hold are numbers and words of our own."""

from snell_diffusion.app.drawing import Step
from snell_diffusion.app.progress import duration

DOING = {
    "waiting": "Waiting for the picture before yours",
    "loading": "Loading the model",
    "drawing": "Drawing",
}


def bar(share: float, text: str) -> str:
    """A bar of a share, 0 to 1, with its sentence."""
    return (
        f'<progress value="{share:.4f}" max="1" aria-label="{text}" style="width:100%"></progress>'
        f'<p role="status" style="margin:0">{text}</p>'
    )


def step_bar(step: Step) -> str:
    """How far a drawing is, with the time left."""
    text = DOING[step.phase]
    if step.phase == "drawing":
        text = f"{text}: step {min(step.done + 1, step.total)} of {step.total}"
        text += "" if step.left_s is None else f", {duration(step.left_s)} left"
    return bar(step.done / step.total, f"{text}.")


def done(seconds: float) -> str:
    """That a drawing is finished."""
    took = f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
    return f'<p role="status">Done in {took}.</p>'


def kept_bar(kept: int, size: int, level: float | None) -> str:
    """How many weights of the adapters' updates survive."""
    if not size:
        return bar(0.0, "No adapter, so no weights are changed.")
    how = "as trained" if level is None else f"at sparsity {level:.2f}"
    return bar(kept / size, f"Kept weights {how}: {kept:,} of {size:,} ({kept / size:.1%}).")
