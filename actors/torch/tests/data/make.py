"""Makes the files beside it: states of hivemind's experts as its servers save them, and TorchScript modules.

Run with the Python of the interop tests: `"$(scripts/interop-venv | tail -n 1)" actors/torch/tests/data/make.py`.
"""

import pathlib
from typing import Dict, Optional, Tuple

import torch
from hivemind.moe.server.layers import name_to_block
from hivemind.moe.server.layers.lr_schedule import get_linear_schedule_with_warmup
from hivemind.moe.server.module_backend import ModuleBackend
from hivemind.utils.tensor_descr import BatchTensorDescriptor

HERE = pathlib.Path(__file__).parent


def make(optimizer, scheduled):
    module = name_to_block["ffn"](4)
    optimizer = optimizer(module.parameters())
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 50) if scheduled else None
    side = BatchTensorDescriptor(4)
    return ModuleBackend(
        "ffn.0.3", module, optimizer=optimizer, scheduler=scheduler, args_schema=(side,), outputs_schema=side, max_batch_size=16
    )


class Block(torch.nn.Module):
    """Several inputs and outputs, integers, a keyword, batch statistics, a frozen parameter, a buffer that is replaced."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.linear = torch.nn.Linear(4, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.scale = torch.nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(
        self, x, token, keep: Optional[torch.Tensor] = None
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        self.calls = self.calls + 1
        y = self.norm(self.linear(x + self.embed(token))) * self.scale
        if keep is not None:
            y = y * keep.unsqueeze(-1)
        return y, {"sum": y.sum(-1), "token": token}


class Half(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4).bfloat16()

    def forward(self, x):
        return self.linear(x)


def main():
    torch.manual_seed(7)
    x = torch.arange(8.0).reshape(2, 4) / 4 - 1
    gradient = torch.ones(2, 4) * torch.tensor([1.0, -1.0, 0.5, 2.0])
    adam = make(lambda parameters: torch.optim.Adam(parameters, lr=0.01), scheduled=True)
    for _ in range(3):
        adam.backward(x, gradient)
    torch.save(adam.state_dict(), HERE / "ffn_adam_3_steps.pt")
    adam.backward(x, gradient)
    torch.save({"module": adam.module.state_dict()}, HERE / "ffn_adam_4_steps.pt")
    sgd = make(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), scheduled=False)
    sgd.backward(x, gradient)
    torch.save(sgd.state_dict(), HERE / "ffn_sgd.pt")
    torch.manual_seed(3)
    torch.jit.script(Block()).save(str(HERE / "block.pt"))
    torch.jit.script(Half()).save(str(HERE / "half.pt"))


if __name__ == "__main__":
    main()
