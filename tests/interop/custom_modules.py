"""Experts that hivemind does not have: hosted by its servers, and by skep's as TorchScript files."""

import torch


class Mixed(torch.nn.Module):
    """Floats, integers and, by keyword, bools in; two tensors out."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 8)
        self.linear = torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, token: torch.Tensor, keep: torch.Tensor):
        y = self.linear(x + self.embed(token)) * keep.unsqueeze(-1)
        return y, y.sum(-1)


class Half(torch.nn.Module):
    """bfloat16 throughout."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor):
        return self.linear(x)


class Bytes(torch.nn.Module):
    """Any number of bytes in, the same out."""

    def forward(self, x: torch.Tensor):
        return x.clone()


# By class: positional inputs, keyword inputs and outputs, each a dtype and the shape behind the batch; -1 takes any size.
SCHEMAS = {
    Mixed: (
        [("float32", [8]), ("int64", [])],
        {"keep": ("bool", [])},
        [("float32", [3]), ("float32", [])],
    ),
    Half: ([("bfloat16", [8])], {}, [("bfloat16", [8])]),
    Bytes: ([("uint8", [-1])], {}, [("uint8", [-1])]),
}
CLASSES = {module.__name__: module for module in SCHEMAS}


def made(name, seed):
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return CLASSES[name]()


def samples(name, rows=1):
    """Positional and keyword inputs that fit, for hivemind, which takes any size anyway."""
    args, kwargs, _ = SCHEMAS[CLASSES[name]]

    def sample(dtype, shape):
        return torch.zeros(rows, *(max(size, 1) for size in shape), dtype=getattr(torch, dtype))

    return [sample(*each) for each in args], {key: sample(*each) for key, each in kwargs.items()}


def script(name, seed, file):
    """Saves one for skep; the keys of its section [[experts]]."""
    torch.jit.script(made(name, seed)).save(str(file))
    args, kwargs, outputs = SCHEMAS[CLASSES[name]]

    def described(dtype, shape, **more):
        return {**more, "dtype": dtype, "shape": shape}

    inputs = [described(*each) for each in args] + [described(*each, name=key) for key, each in kwargs.items()]
    return {"module": str(file), "inputs": inputs, "outputs": [described(*each) for each in outputs]}
