"""docs/families.md, written from the registry: `python -m tests.registry.table`."""

from pathlib import Path

from snell_diffusion.diffusion.families import families
from tests.registry.families import REGISTRY
from tests.registry.record import TinyFamily

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
START, END = "<!-- table: python -m tests.registry.table -->\n", "<!-- end of table -->\n"
HEAD = (
    "Family",
    "Pipelines",
    "Load, fuse, strength, sparsity, several",
    "Strength for one call",
    "`SnellaAttnProcessor`",
    "QKV fusion",
    "`torch.compile(fullgraph=True)`",
    "Trained by",
)


def table() -> str:
    """The table of the page, one row per family."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(family) for family in REGISTRY.values())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def row(family: TinyFamily) -> tuple[str, ...]:
    stays = ", ".join(f"`{place}`" for place in family.bypassed)
    return (
        family.title,
        ", ".join(name.removesuffix("Pipeline") for name in family.pipelines),
        "exact",
        f'`{family.scale_kwarg}={{"scale": s}}`' if family.scale_kwarg else "no",
        f"exact ({stays} stays a tuner layer)" if stays else "exact",
        "after `fuse_snella()`" if family.fuses_qkv else "not in diffusers",
        f"no: {family.graph_break}" if family.graph_break else "one graph",
        trainer(family),
    )


def trainer(family: TinyFamily) -> str:
    names = [
        f"`{trained.name}`"
        for trained in families().values()
        if set(trained.pipelines) & set(family.pipelines)
    ]
    return ", ".join(names) or "-"


def page(text: str) -> str:
    """The page with the table of this moment."""
    before, _, rest = text.partition(START)
    return before + START + "\n" + table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
