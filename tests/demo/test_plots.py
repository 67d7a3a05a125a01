"""The figures are written as PNG, and refuse what they cannot draw."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from adaptq_peft.demo.plots import plot_perplexities, plot_profile

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_profile_makes_missing_folders(tmp_path):
    path = tmp_path / "new" / "profile.png"
    plot_profile([1.0, 2.0, 3.0], [9.0, 0.5, 0.4], {2}, path)
    assert path.read_bytes().startswith(PNG_SIGNATURE)


def test_profiles_of_different_length_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="magnitude has 2 blocks and update has 1"):
        plot_profile([1.0, 2.0], [1.0], [0], tmp_path / "profile.png")


def test_perplexities_of_unknown_stage_are_an_error(tmp_path):
    stages = {"base": 2.0, "halfway": 1.5}
    with pytest.raises(
        ValueError, match=r"unknown stages \['halfway'\]; allowed are \['base', 'quantized', 'trained'\]"
    ):
        plot_perplexities(stages, stages, tmp_path / "perplexities.png")
