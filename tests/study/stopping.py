"""Trainings that are stopped as a kill would."""

from unittest import mock

from crab.study.loop import Checkpoints


def stop_at(step):
    """Inside, a training ends by KeyboardInterrupt after its first whole checkpoint at or past a step."""
    on_save = Checkpoints.on_save

    def stopping(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        if state.global_step >= step:
            raise KeyboardInterrupt(f"stopped at step {state.global_step}")

    return mock.patch.object(Checkpoints, "on_save", stopping)
