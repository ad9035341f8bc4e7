"""Policies of sb3-contrib's RecurrentPPO whose LSTMs run on fastrnn's engines.

    from fastrnn.sb3 import MlpLstmPolicy

    model = RecurrentPPO(MlpLstmPolicy, env)  # was: RecurrentPPO("MlpLstmPolicy", env)

sb3-contrib calls its LSTM step by step as soon as an episode begins anywhere in a batch. These policies derive from its own and
replace that loop by one call. Constructors, parameters, results and files are theirs, but for rounding.
"""

from __future__ import annotations

from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from torch import Tensor

import fastrnn

__all__ = ["CnnLstmPolicy", "MlpLstmPolicy", "MultiInputLstmPolicy"]


class MlpLstmPolicy(RecurrentActorCriticPolicy):
    """sb3-contrib's MlpLstmPolicy, arguments and behaviour, on fastrnn's engines.

    A class derived from one of its policies gets the same by this class as a further base: `class Own(MlpLstmPolicy, Theirs)`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        fastrnn.convert(self)  # parameters stay the objects that the optimizer has

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: fastrnn.LSTM
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run an LSTM over sequences in which episodes begin.

        Args:
            features: [B * T, I], one sequence after the other.
            lstm_states: h [L, B, R] and c [L, B, H] before the first step.
            episode_starts: [B * T], 1 at the first steps of episodes, else 0.
            lstm: of the actor or of the critic.

        Returns:
            output [B * T, R], and the states after the last step.
        """
        batch = lstm_states[0].shape[1]
        x, begins = (each.unflatten(0, (batch, -1)).transpose(0, 1) for each in (features, episode_starts != 0))
        # A rollout buffer cuts its sequences where episodes begin, so in nearly all batches they do at first steps alone.
        state = tuple(each * ~begins[0].unsqueeze(-1) for each in lstm_states)
        output, state = lstm(x, state, resets=begins) if begins[1:].any() else lstm(x, state)
        return output.transpose(0, 1).flatten(0, 1), state


class CnnLstmPolicy(MlpLstmPolicy, RecurrentActorCriticCnnPolicy):
    """sb3-contrib's CnnLstmPolicy, arguments and behaviour, on fastrnn's engines."""


class MultiInputLstmPolicy(MlpLstmPolicy, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's MultiInputLstmPolicy, arguments and behaviour, on fastrnn's engines."""
