"""The page: its tabs in order; what is in a tab is in tabs/."""

from collections.abc import Callable

import gradio as gr

from snell_diffusion.app import endpoints
from snell_diffusion.app.shared import Shared
from snell_diffusion.app.tabs import compare, generate, inspect, personalize, runs
from snell_diffusion.app.workspace import App

INTRO = """# SNELLA
Teach a text-to-image model your subject from a few photos. Everything stays on {place}."""
TABS: tuple[tuple[str, str, Callable[[Shared], None]], ...] = (
    ("personalize", "Personalize", personalize.build),
    ("generate", "Generate", generate.build),
    ("compare", "Compare", compare.build),
    ("inspect", "Inspect", inspect.build),
    ("runs", "Runs", runs.build),
)


def build(app: App) -> gr.Blocks:
    """The page over the given app; not launched yet."""
    with gr.Blocks(title="SNELLA", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(INTRO.format(place="this server" if app.exposed else "this machine"))
        wanted = gr.State(None)  # among the tabs it would shift their labels
        with gr.Tabs() as tabs:
            shared = Shared(app, page, tabs, wanted)
            for name, label, fill in TABS:
                with gr.Tab(label, id=name, elem_id=f"tab-{name}") as tab:
                    fill(shared)
                shared.connect(name, tab)
        endpoints.register(shared)
    return page
