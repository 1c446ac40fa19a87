"""Drawing on the main process where a forward pass needs all of them."""

from collections.abc import Sequence

from accelerate.utils import broadcast_object_list
from PIL import Image

from snell_diffusion.diffusion.sampling import Sampler


class LedSampler:
    """A sampler that the main process calls and the others follow, call by call.

    The main process may decide by what it finds on its own disk what to draw; the others run the
    same forward passes and drop the pictures:

        if main:
            work(sampler)      # calls sampler.draw as often as it likes
            sampler.dismiss()
        else:
            sampler.follow()

    Args:
        sampler: Draws; the same on every process.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def draw(
        self, prompts: Sequence[str], purpose: str, indices: Sequence[int]
    ) -> list[Image.Image]:
        """As `Sampler.draw`, on the main process; the others take part."""
        broadcast_object_list([(list(prompts), purpose, list(indices))])
        return self._sampler.draw(prompts, purpose, indices)

    def dismiss(self) -> None:
        """Let the others go on: the main process draws no more."""
        broadcast_object_list([None])

    def follow(self) -> None:
        """Take part in every call of the main process, until it dismisses this one."""
        while True:
            (request,) = broadcast_object_list([None])
            if request is None:
                return
            self._sampler.draw(*request)
