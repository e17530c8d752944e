"""Ctrl-C once stops after the step, twice at once, and the old handlers come back."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from mmgraft.training.callbacks.stopping import Stopper

ARGS = SimpleNamespace(world_size=1, device="cpu")


def control() -> SimpleNamespace:
    return SimpleNamespace(should_save=False, should_training_stop=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_saves_and_stops_after_the_step(number):
    before = signal.getsignal(number)
    with Stopper() as stopper:
        going = stopper.on_step_end(ARGS, None, control())
        assert (going.should_save, going.should_training_stop) == (False, False)
        os.kill(os.getpid(), number)
        ending = stopper.on_step_end(ARGS, None, control())
        assert (ending.should_save, ending.should_training_stop) == (True, True)
    assert signal.getsignal(number) is before
    assert stopper.requested


def test_twice_stops_at_once():
    with Stopper():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
