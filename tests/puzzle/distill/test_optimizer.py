"""AdamW on masters: what is restored continues as if it had never stopped, on the device of the masters."""

import torch

from tasks.puzzle.distill.optimizer import MasterWeights, Schedule

SCHEDULE = Schedule(num_steps=6, learning_rate=0.1, warmup=0.2, weight_decay=0.01)


def test_a_state_is_restored_on_the_device_of_the_masters() -> None:
    """A checkpoint is read to the CPU; torch's device without memory stands for the GPU that this machine may lack."""
    saved, weights = (MasterWeights(torch.nn.Linear(3, 2, device=device), SCHEDULE) for device in ("cpu", "meta"))
    saved.apply([torch.ones_like(weight) for weight in saved.narrow])
    weights.restore(saved.state(), 1)
    assert len(weights.state()) == 6
    for optimizer_state in weights._optimizer.state.values():
        assert {name: tensor.device.type for name, tensor in optimizer_state.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), "meta"
        )


def test_a_restored_state_continues_as_if_it_had_never_stopped() -> None:
    torch.manual_seed(0)
    gradients = [[torch.randn(2, 3), torch.randn(2)] for _ in range(4)]
    torch.manual_seed(1)
    whole, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    never_stopped, stopped = MasterWeights(whole, SCHEDULE), MasterWeights(second, SCHEDULE)
    for number, gradient in enumerate(gradients):
        never_stopped.apply([part.clone() for part in gradient])
        if number == 1:
            stopped.restore({name: tensor.clone() for name, tensor in never_stopped.state().items()}, 2)
    for gradient in gradients[2:]:
        stopped.apply([part.clone() for part in gradient])
    assert torch.equal(whole.weight, second.weight) and torch.equal(whole.bias, second.bias)
