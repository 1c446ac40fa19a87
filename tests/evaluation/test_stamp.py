"""The command that results name is the one that measures all of them."""

import pytest

from snell_diffusion.evaluation.stamp import command


@pytest.mark.parametrize(
    "shard", [[], ["--shard", "1/2"], ["--shard=1/2"]], ids=["none", "two words", "one word"]
)
def test_the_command_is_of_the_whole_and_names_no_folder(shard: list[str]) -> None:
    said = command(["bits", *shard, "--photos", "/home/someone/photos", "--output", "runs/bits"])
    assert said == "python -m snell_diffusion.evaluation bits --photos photos --output runs/bits"
