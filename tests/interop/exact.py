"""What training comes to in double precision, with the codec's rounding where tensors cross the wire.

A value that lies in the middle between two codes of a lossy codec, as nearly as float32 sums can tell, may be sent as
either: a last bit decides, and the codec makes a whole step of it. Such roundings are open. Any choice of them is right,
and weights that none of these choices leads to are wrong.
"""

import torch
from hivemind.moe.server.layers import name_to_block

# How far float32 values may be off, relative to the largest of their tensor: those that were computed through layers,
# and those that every client was given, of which only mean and deviation are computed.
COMPUTED, GIVEN = 2.0**-18, 2.0**-21
# Open roundings of one training that are turned around in search of what happened. Most trainings need none, few two.
TURNS = 4


class Wire:
    """Takes tensors across, and notes the roundings that were open as (which tensor, which of its values)."""

    def __init__(self, codec, turned):
        self.codec, self.turned = codec, turned
        self.crossed, self.open = 0, []

    def cross(self, tensor, error):
        if self.codec == "NONE":
            return tensor
        mean, deviation = torch.zeros(()), torch.ones(())
        if self.codec == "MEANSTD_16BIT":
            mean, deviation = tensor.mean(-1, keepdim=True), tensor.std(-1, keepdim=True, correction=0)
        elif error == GIVEN:
            error = 0.0
        scaled = (tensor - mean) / deviation
        codes = scaled.half()
        others = torch.nextafter(codes, torch.where(scaled > codes, torch.inf, -torch.inf).half())
        from_middle = (scaled - (codes.double() + others.double()) / 2).abs()
        near = from_middle < error * (tensor / deviation).abs().max()
        self.open += [(self.crossed, place) for place in near.flatten().nonzero().flatten().tolist()]
        turned = torch.zeros(tensor.numel(), dtype=torch.bool)
        turned[[place for crossed, place in self.turned if crossed == self.crossed]] = True
        self.crossed += 1
        return torch.where(turned.reshape(tensor.shape), others, codes).double() * deviation + mean


def train(graph, begun, steps, turned=frozenset()):
    """Weights by expert and name, trained from `begun` with some roundings turned around; the roundings that were open."""
    wire = Wire(graph.codec, turned)
    modules = [made(name, graph.width, weights) for name, weights in zip(graph.classes, begun, strict=True)]
    optimizers = [optimizer(module.parameters(), **graph.optimizer) for module in modules]
    gate = graph.gate().double()

    def learn(index, output, grad):
        output.backward(grad)
        optimizers[index].step()
        optimizers[index].zero_grad()

    for step in range(steps):
        (x, *others), grad = graph.inputs(step)
        x, grad = x.double(), grad.double()
        sent = wire.cross(x, GIVEN).requires_grad_()
        if graph.k:
            scores, chosen = gate(x).detach().topk(graph.k, dim=-1)
            for share, index in zip(scores.softmax(-1)[0], chosen[0].tolist()):
                learn(index, modules[index](sent), share * grad)
            continue
        passes = [(sent, modules[0](sent, *others))]
        for module in modules[1:]:
            sent = wire.cross(passes[-1][1].detach(), COMPUTED).requires_grad_()
            passes.append((sent, module(sent)))
        for index in reversed(range(len(modules))):
            sent, output = passes[index]
            learn(index, output, grad)
            if index > 0:
                grad = wire.cross(sent.grad, COMPUTED)
    return [module.state_dict() for module in modules], wire.open


def apart(graph, begun, steps, ended, tolerance):
    """How far weights ended from the nearest that a choice of open roundings leads to, and which were turned around.

    None are if the difference is within the tolerance already.
    """
    turned = frozenset()
    weights, still_open = train(graph, begun, steps)
    squares, largest = difference(weights, ended)
    while largest > tolerance and len(turned) < TURNS:
        choices = []
        for rounding in still_open:
            choice = turned ^ {rounding}
            weights, then_open = train(graph, begun, steps, choice)
            choices.append((*difference(weights, ended), choice, then_open))
        best = min(choices, key=lambda each: each[0], default=(squares,))
        # If so few roundings are all that went another way, the one that did most made this share of the difference.
        if best[0] > (1 - 1 / TURNS) * squares:
            break
        squares, largest, turned, still_open = best
    return largest, sorted(turned)


def difference(weights, ended):
    """Sum of squares, and the largest."""
    flat = [torch.cat([each.double().flatten() for expert in all_ for each in expert.values()]) for all_ in (weights, ended)]
    difference = flat[0] - flat[1]
    return difference.square().sum().item(), difference.abs().max().item()


def made(name, width, weights):
    module = name_to_block[name](width).double()
    module.load_state_dict(weights)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        elif isinstance(part, torch.nn.MultiheadAttention):
            part.dropout = 0.0
    return module


def optimizer(parameters, optimizer, learning_rate, **numbers):
    return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](parameters, lr=learning_rate, **numbers)
