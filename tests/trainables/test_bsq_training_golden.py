"""BSQ against golden arrays: short trainings, and fine-tunings of what they found."""

import torch
from torch import Tensor, nn

from tests.golden_vectors import index
from tests.trainables.golden_bsq import (
    PLANES,
    TRAINING,
    Settings,
    Tensors,
    arrays,
    compare,
    listed,
    part,
    planes_of,
    raw,
)
from trainables.config import Optimizer
from trainables.cost import LayerBits
from trainables.layers import trace
from trainables.methods._bit_planes import bit_tensors, penalty
from trainables.methods._bit_report import bit_state, float_state, scheme
from trainables.methods.bsq import Method
from trainables.optimizers import Optimizers


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, down: bool):
        super().__init__()
        stride = 2 if down else 1
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if down:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        features = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(features)) + self.downsample(x))


class Small(nn.Module):
    """The network of `train_small.npz`."""

    def __init__(self, settings: Settings):
        super().__init__()
        c1, c2 = settings["c1"], settings["c2"]
        self.conv1 = nn.Conv2d(3, c1, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c1)
        self.relu = nn.ReLU()
        self.block = Block(c1, c2, down=settings["down"])
        self.fc = nn.Linear(c2, settings["ncls"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.relu(self.bn1(self.conv1(x)))).mean(dim=(2, 3)))


def state_of(model: nn.Module) -> Tensors:
    """The model's tensors under the stored names: planes as they are, or normalized weights once frozen."""
    state = dict(model.state_dict())
    for layer, role, tensor, _ in bit_tensors(model):
        scale = "scale" if role == "weight" else "biasscale"
        if tensor.frozen:
            state |= {f"{layer}.{role}": tensor.latent, f"{layer}.{scale}": tensor.scale}
        else:
            state |= {f"{layer}.{name}": x for name, x in raw(tensor, role).items()}
    return {name: x.clone() for name, x in state.items()}


class Run:
    """One short training as the public loop does it, with its slips."""

    def __init__(self, settings: Settings, stored: Tensors):
        self.settings, self.stored = settings, stored
        self.model = Small(settings)
        self.model.load_state_dict(part(stored, "float"), strict=False)
        table = trace(self.model, tuple(stored["x"].shape[2:]))
        bits = {row.name: LayerBits(weight=32, activation=settings["act"]) for row in table.quantizable}
        shortcuts = ("block.downsample.0",) if settings["down"] else ()
        self.method = Method(
            Method.Settings(
                penalty_strength=settings["alpha"],
                interval=1,
                start_planes=settings["N"],
                placement="relus",
                float_layers=shortcuts,
                as_published=True,
            ),
            epochs=2,
        )
        self.method.prepare(self.model, table, bits)
        self.method.calibrate(self.model, stored["x"][0])
        counted = [row for row in table.quantizable if row.name not in shortcuts]
        self.parameters = sum(row.weights + row.biases for row in counted)
        self.losses: list[float] = []
        self.penalties: list[float] = []
        self.states: dict[str, Tensors] = {}
        self.schemes: list[dict[str, list[int]]] = []
        self.adjusted("start")

    def optimizers(self, lr: float) -> Optimizers:
        keys = {name: self.settings[name] for name in ("momentum", "weight_decay")}
        groups = [group | keys for group in self.method.groups(self.model)]
        return Optimizers(groups, Optimizer(lr=lr, schedule="constant"))

    def keep(self, name: str) -> None:
        self.states[name] = state_of(self.model)

    def adjusted(self, name: str) -> None:
        self.keep(name)
        self.schemes.append(planes_of(self.model))

    def train(self, optimizers: Optimizers, batches: range) -> None:
        self.model.train()
        for number in batches:
            optimizers.zero_grad()
            share = float(penalty(tensor for _, _, tensor, _ in bit_tensors(self.model)))
            (loss,) = self.method.losses(self.model, self.stored["x"][number], self.stored["target"][number])
            loss.backward()
            self.penalties.append(share / self.settings["alpha"])
            self.losses.append(float(loss.detach()) - share)
            optimizers.step()
            self.method.after_step(self.model)
            if number == 0:
                self.keep("step1")

    def search(self) -> None:
        """Both stretches of steps, each with an optimizer of its own, and an adjustment after each."""
        first, second = self.settings["steps1"], self.settings["steps2"]
        for epoch, batches in ((1, range(first)), (2, range(first, first + second))):
            self.train(self.optimizers(self.settings["lr"]), batches)
            self.keep(f"before_adjust{epoch}")
            assert self.method.after_epoch(self.model, epoch)
            self.adjusted("adjust1" if epoch == 1 else "end")

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model.eval()(self.stored["x"][0])


@listed("train_small.npz")
def test_a_short_training_gives_the_published_planes_losses_and_schemes(settings, stored):
    run = Run(settings, stored)
    run.search()
    assert run.schemes == settings["schemes_after_each_adjustment"]
    assert run.parameters == settings["total_param"]
    for stage, state in run.states.items():
        compare(state, part(stored, stage) if stage != "end" else without_logits(stored), **TRAINING)
    for stage in ("start", "adjust1", "end"):
        planes = {name: x for name, x in part(stored, stage).items() if name.rpartition(".")[2] in PLANES}
        assert planes
        compare(run.states[stage], planes, rtol=0, atol=0)
    torch.testing.assert_close(torch.tensor(run.losses, dtype=torch.float64), stored["task_loss"], **TRAINING)
    torch.testing.assert_close(
        torch.tensor(run.penalties, dtype=torch.float64), stored["reg_over_total"], rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(run.logits(), stored["end.eval_logits"], **TRAINING)
    sizes = {f"{layer}.{role}": leaf.numel() for layer, role, _, leaf in bit_tensors(run.model)}
    planes = {f"{layer}.{role}": tensor.planes for layer, role, tensor, _ in bit_tensors(run.model)}
    assert sum(sizes[name] * planes[name] for name in sizes) == settings["total_bit_end"]


def without_logits(stored: Tensors) -> Tensors:
    return {name: x for name, x in part(stored, "end").items() if name != "eval_logits"}


@listed("finetune_small.npz")
def test_a_short_fine_tuning_gives_the_published_weights_and_both_exports(settings, stored, request):
    name = request.node.callspec.id
    searched = index("bsq")["files"]["train_small.npz"]["cases"][name]
    run = Run(searched, part(arrays("train_small.npz"), name))
    run.search()
    run.losses.clear()
    run.method.freeze(run.model)
    compare(state_of(run.model), part(stored, "start"), **TRAINING)
    run.settings = settings | {"alpha": 1.0}
    run.train(run.optimizers(settings["lr"]), range(settings["steps"]))
    run.keep("end")
    compare(run.states["step1"], part(stored, "step1"), **TRAINING)
    compare(run.states["end"], without_logits(stored), **TRAINING)
    torch.testing.assert_close(torch.tensor(run.losses, dtype=torch.float64), stored["task_loss"], **TRAINING)
    torch.testing.assert_close(run.logits(), stored["end.eval_logits"], **TRAINING)
    found = {layer: list(widths) for layer, widths in scheme(run.model).items()}
    assert found == settings["scheme"] == settings["scheme_float"]
    bits = sum(tensor.planes * leaf.numel() for _, _, tensor, leaf in bit_tensors(run.model))
    assert (run.parameters, bits) == (settings["total_param"], settings["total_bit"])
    for kind, state in (("best_bin", bit_state(run.model)), ("best_float", float_state(run.model))):
        wanted = part(stored, kind)
        logits = wanted.pop("eval_logits")
        compare(state, wanted, exact=PLANES, **TRAINING)
        run.model.load_state_dict(float_state(run.model), strict=False)  # with the biases
        torch.testing.assert_close(run.logits(), logits, **TRAINING)
