"""The registry: every family of this folder by name."""

from tests.registry import cross, joint, single, unets, video
from tests.registry.record import TinyFamily

MODULES = (unets, joint, cross, single, video)

REGISTRY: dict[str, TinyFamily] = {
    family.name: family for module in MODULES for family in module.FAMILIES
}
