"""What takes long between two steps, and is cut short by a signal: an epoch's beginning and the online evaluation."""

from sslctl import distributed
from sslctl.methods.base import Method
from sslctl.runs.generators import generator_states, restore_generators
from sslctl.signals import Interrupted
from sslctl.training.logger import Log
from sslctl.training.setup import Setup


def start_epoch(setup: Setup, step: int) -> bool:
    """Lets the method begin an epoch, in the main process for all; returns False when a signal cut it short.

    Its state and the generators are then as they were before.
    """
    method = setup.method
    if type(method).start_epoch is Method.start_epoch:
        return True
    state = method.state_dict()

    def start() -> bool:
        state_before, generators_before = (
            {name: tensor.clone() for name, tensor in state.items()},
            generator_states(),
        )
        try:
            method.start_epoch(step // setup.plan.steps_per_epoch, setup.embed)
        except Interrupted:
            for name, tensor in state.items():
                tensor.copy_(state_before[name])
            restore_generators(generators_before)
            return False
        return True

    complete = distributed.on_main_process(start)
    distributed.broadcast_from_main(*state.values())
    setup.clock.lap("evaluation")
    return complete


def evaluate_online(setup: Setup, log: Log, step: int) -> bool:
    """Logs the online figures and pictures of a step; returns False when a signal cut it short.

    The generators are as before, so that training goes on as if nothing had been looked at.
    """

    def evaluate() -> bool:
        try:
            if setup.online:
                setup.online(setup.method, log, step)
        except Interrupted:
            return False
        return True

    generators_before = generator_states()
    setup.method.eval()
    try:
        return distributed.on_main_process(evaluate)
    finally:
        setup.method.train()
        restore_generators(generators_before)
