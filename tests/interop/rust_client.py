"""skep's client in a process of its own, driven line by line (see client.rs)."""

import contextlib
import json
import os
import subprocess

import numpy
import torch

PROGRAM = os.environ.get("SKEP_CLIENT_BIN", "target/debug/examples/interop_client")
NAMES = "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
DTYPES = {name: getattr(torch, name) for name in NAMES}


class CallFailed(Exception):
    """What skep's client said."""


class RustClient:
    def __init__(self, folder, *peers):
        self.folder, self.count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [PROGRAM, str(folder), *peers], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def end(self):
        # An end of file would not do: processes that hivemind forked hold the pipe open too.
        self.process.stdin.write(json.dumps({"do": "end"}) + "\n")
        self.process.stdin.flush()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def forward_backward(self, layers, inputs, *grads, balance=0.0):
        """Outputs, gradients of the inputs, gradients of the gates, balancing losses; `grads` are those of the outputs."""
        command = {"do": "pass", "layers": layers, "inputs": [self._write(each) for each in inputs]}
        answer = self._ask({**command, "grads": [self._write(each) for each in grads], "balance": balance})
        outputs = [self._read(each) for each in answer["outputs"]]
        grads = [each and self._read(each) for each in answer["grads"]]
        gates = [{name: self._read(each) for name, each in gate.items()} for gate in answer["gates"]]
        return outputs, grads, gates, answer["losses"]

    def many(self, uid, inputs):
        """Asks one expert with every input at once; outputs of those that were answered, and what each failed with."""
        answer = self._ask({"do": "many", "expert": uid, "inputs": [self._write(each) for each in inputs]})
        return [self._read(each) for each in answer["outputs"]], answer["failures"]

    def grid(self, prefix, grid, k_best, proj):
        weight, bias = self._write(proj.weight.detach()), self._write(proj.bias.detach())
        return {"prefix": prefix, "grid": list(grid), "k_best": k_best, "weight": weight, "bias": bias}

    def _ask(self, command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise CallFailed(answer["error"])
        return answer

    def _write(self, tensor):
        file = self.folder / f"request-{self.count}"
        self.count += 1
        tensor = tensor.detach().contiguous()
        tensor.flatten().view(torch.uint8).numpy().tofile(file)
        return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "file": str(file)}

    def _read(self, stored):
        values = numpy.fromfile(stored["file"], dtype=numpy.uint8)
        with contextlib.suppress(FileNotFoundError):
            os.remove(stored["file"])
        return torch.from_numpy(values).view(DTYPES[stored["dtype"]]).reshape(stored["shape"])
