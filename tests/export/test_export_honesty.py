"""What an export says is true: a proof that is none refuses, what a cut drops is refused, and what
adapters bring beside their tensors is not lost by the way.
"""


import pytest

from lorafold.errors import LorafoldError
from lorafold.exporting.older import older_config
from lorafold.exporting.proof import Proof
from lorafold.exporting.run import _check
from lorafold.exporting.table import target_of


def proved(**figures):
    """The figures of a proof, all well but those given."""
    plain = {
        "engine": "mlx-lm", "version": "1", "prompts": 32, "kl": 1e-9, "kl_largest": 1e-8,
        "distance": 0.1, "changed": 0.1, "alone": 1e-9, "top": 32, "gap": 1e-4, "greedy": 32,
        "near": 0, "unused": (), "other_tokens": (), "other_texts": (),
    }  # fmt: skip
    return Proof(**(plain | figures))


def test_an_engine_that_reads_another_base_is_no_rounding():
    """As far from lorafold without the adapter as with it, and far: mlx-lm with GLM."""
    with pytest.raises(LorafoldError, match="reads the base as another model"):
        _check(proved(kl=0.69, alone=0.63), target_of("mlx"), None)
    _check(proved(kl=6e-4, alone=5e-4, distance=1e-3), target_of("mlx"), None)


def test_part_of_a_head_that_is_rotated_is_told_in_the_older_word():
    """Phi's, StableLM's and GLM-4's, which mlx-lm reads beside rope_theta or has a default for."""
    config = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    older = older_config(config)
    assert older is not None
    assert older["partial_rotary_factor"] == 0.25
