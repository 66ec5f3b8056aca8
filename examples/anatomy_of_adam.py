"""Build SGD, momentum, RMSprop and Adam from their parts, check each step, and see what each part is for.

    python examples/anatomy_of_adam.py                  # tables
    python examples/anatomy_of_adam.py --plots DIR      # and the pictures of docs/anatomy-of-adam.md

One process, under half a minute. The rules below are plain functions in the notation of docs/anatomy-of-adam.md;
distadam and torch.optim run beside them on the same gradients, and the first step and element that differ end the run.
"""

import argparse
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import distadam
from distadam import diagnostics

State = dict[str, Tensor]

# float64, and the same gradients for all three: a step adds a few roundings of 2^-53 to what they differ by, a thousand
# steps a few 1e-13. A wrong hyper-parameter shows as 1e-3 and more.
TOLERANCE = 1e-12
NUM_RATES = 49  # learning rates that a rule is tried with, from 1e-4 to 1: twelve a decade
CLOSE = 1e-4  # a problem is solved when its loss is below, and stays there


class Difference(Exception):
    """Two implementations of a rule disagree."""


# ---- the parts -------------------------------------------------------------------------------------------------------


def ewa(V: Tensor, x: Tensor, b: float) -> Tensor:
    """Exponentially weighted average: V_t = b V_{t-1} + (1-b) x_t."""
    return b * V + (1 - b) * x


def bias_corrected(V: Tensor, b: float, t: int) -> Tensor:
    """V_0 = 0 weighs b^t in V_t: divide by what the t values weigh together."""
    return V / (1 - b**t)


# ---- the rules -------------------------------------------------------------------------------------------------------


def sgd(w: Tensor, g: Tensor, state: State, t: int, *, lr: Any) -> Tensor:
    return w - lr * g


def momentum(w: Tensor, g: Tensor, state: State, t: int, *, lr: Any, momentum: float) -> Tensor:
    state["momentum_buffer"] = g if t == 1 else momentum * state["momentum_buffer"] + g
    return w - lr * state["momentum_buffer"]


def rmsprop(w: Tensor, g: Tensor, state: State, t: int, *, lr: Any, alpha: float, eps: float) -> Tensor:
    state["square_avg"] = v = ewa(state.get("square_avg", torch.zeros_like(w)), g**2, alpha)
    return w - lr * g / (v.sqrt() + eps)


def adam(w: Tensor, g: Tensor, state: State, t: int, *, lr: Any, betas: tuple[float, float], eps: float) -> Tensor:
    state["exp_avg"] = m = ewa(state.get("exp_avg", torch.zeros_like(w)), g, betas[0])
    state["exp_avg_sq"] = v = ewa(state.get("exp_avg_sq", torch.zeros_like(w)), g**2, betas[1])
    m_hat, v_hat = bias_corrected(m, betas[0], t), bias_corrected(v, betas[1], t)
    return w - lr * m_hat / (v_hat.sqrt() + eps)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A function above, the class of the same rule in torch.optim and distadam, and the arguments of both."""

    function: Callable[..., Tensor]
    optimizer: str
    options: dict[str, Any]


RULES = {
    "SGD": Rule(function=sgd, optimizer="SGD", options={}),
    "momentum": Rule(function=momentum, optimizer="SGD", options={"momentum": 0.9}),
    "RMSprop": Rule(function=rmsprop, optimizer="RMSprop", options={"alpha": 0.99, "eps": 1e-8}),
    "Adam": Rule(function=adam, optimizer="Adam", options={"betas": (0.9, 0.999), "eps": 1e-8}),
}


# ---- the problems ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A loss of two parameters, w[..., 0] and w[..., 1]."""

    loss: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    steps: int

    def gradient(self, w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        return torch.autograd.grad(self.loss(w).sum(), w)[0]


def quadratic(turned_by: float) -> Callable[[Tensor], Tensor]:
    """A bowl 50 times as steep along one axis as along the other, turned by an angle."""
    cos, sin = math.cos(turned_by), math.sin(turned_by)

    def loss(w: Tensor) -> Tensor:
        x, y = w[..., 0], w[..., 1]
        return ((cos * x + sin * y) ** 2 + 50 * (cos * y - sin * x) ** 2) / 2

    return loss


def rosenbrock(w: Tensor) -> Tensor:
    x, y = w[..., 0], w[..., 1]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def turn(x: float, y: float, angle: float) -> tuple[float, float]:
    return math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y


ANGLE = math.pi / 6
PROBLEMS = {
    "quadratic": Problem(loss=quadratic(0), start=(-8.0, 1.6), steps=200),
    "quadratic, turned": Problem(loss=quadratic(ANGLE), start=turn(-8.0, 1.6, ANGLE), steps=200),
    "Rosenbrock": Problem(loss=rosenbrock, start=(-1.2, 1.0), steps=600),
}


def steps_to_solve(losses: Tensor) -> Tensor:
    """Return after how many steps a loss, (steps + 1, ...), is below `CLOSE` for good; steps + 1 if it never is."""
    above = ~(losses < CLOSE)
    count = torch.arange(1, len(losses) + 1).reshape(-1, *[1] * (losses.dim() - 1))
    return (above * count).amax(dim=0)


def best_rate(rule: Rule, problem: Problem, steps: int) -> float:
    """Return the learning rate that solves the problem soonest or, if none does, ends lowest: all tried at once.

    One that ever doubles the loss it started with is taken only if they all do: where a leap lands is luck.
    """
    rates = torch.logspace(-4, 0, NUM_RATES, dtype=torch.float64)
    w = torch.tensor(problem.start, dtype=torch.float64).expand(NUM_RATES, 2)
    state: State = {}
    losses = [problem.loss(w)]
    for t in range(1, steps + 1):
        w = rule.function(w, problem.gradient(w), state, t, lr=rates[:, None], **rule.options)
        losses.append(problem.loss(w))
    curves = torch.stack(losses).nan_to_num(nan=math.inf)
    leaps = (curves > 2 * curves[0]).any(dim=0)
    ranking = (leaps, steps_to_solve(curves), curves[-1], rates)
    return min(zip(*(column.tolist() for column in ranking), strict=True))[-1]


# ---- each step beside distadam and torch.optim -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Path2D:
    """A run: points, (steps + 1, 2), their losses, and how far distadam and torch.optim were from it at most."""

    lr: float
    points: Tensor
    losses: Tensor
    distadam: float
    torch: float


def compare(where: str, names: list[str], expected: Tensor, actual: Tensor, whose: str) -> float:
    """Return the largest difference, relative to 1 + |expected|, both (names, elements); raise above the tolerance."""
    error = (actual - expected).abs() / (1 + expected.abs())
    worst = error.max().item()
    if not worst <= TOLERANCE:
        row, element = divmod(int(error.nan_to_num(nan=math.inf).argmax()), expected.shape[1])
        raise Difference(
            f"{where}, {names[row]}, element {element}: expected {expected[row, element].item():.12g}, built from its "
            f"parts, but {whose} has {actual[row, element].item():.12g}"
        )
    return worst


def run(name: str, problem: Problem, lr: float, steps: int) -> Path2D:
    """Run a rule and check every step, states included; raises `Difference`."""
    rule = RULES[name]
    w = torch.tensor(problem.start, dtype=torch.float64)
    state: State = {}
    params = {source: nn.Parameter(w.clone()) for source in ("distadam", "torch")}
    optimizers = {
        "distadam": getattr(distadam, rule.optimizer)([params["distadam"]], lr=lr, **rule.options),
        "torch": getattr(torch.optim, rule.optimizer)([params["torch"]], lr=lr, **rule.options),
    }
    points, worst = [w], {"distadam": 0.0, "torch": 0.0}
    for t in range(1, steps + 1):
        g = problem.gradient(w)
        w = rule.function(w, g, state, t, lr=lr, **rule.options)
        expected = torch.stack([w, *state.values()])
        for source, optimizer in optimizers.items():
            param = params[source]
            param.grad = g.clone()
            optimizer.step()
            actual = torch.stack([param.detach(), *(optimizer.state[param][key] for key in state)])
            whose = f"{source}.{'optim.' * (source == 'torch')}{rule.optimizer}"
            difference = compare(f"{name}, step {t}", ["w", *state], expected, actual, whose)
            worst[source] = max(worst[source], difference)
        points.append(w)
    path = torch.stack(points)
    return Path2D(lr=lr, points=path, losses=problem.loss(path), **worst)


def race(most_steps: int | None) -> dict[str, dict[str, Path2D]]:
    """Run every rule on every problem and print a line for each."""
    paths: dict[str, dict[str, Path2D]] = {}
    print(f"Rules built from their parts, float64; solved: loss below {CLOSE:g} for good; lr: the best of {NUM_RATES}")
    print(f"{'problem':18} {'rule':9} {'lr':>8} {'solved after':>13} {'last loss':>10}  largest difference from")
    print(f"{'':62}  distadam  torch.optim")
    for title, problem in PROBLEMS.items():
        steps = min(problem.steps, most_steps or problem.steps)
        paths[title] = {}
        for name, rule in RULES.items():
            path = paths[title][name] = run(name, problem, best_rate(rule, problem, steps), steps)
            solved = int(steps_to_solve(path.losses))
            after = f"{solved} steps" if solved <= steps else f"not in {steps}"
            losses = f"{path.lr:8.2g} {after:>13} {path.losses[-1].item():10.1e}"
            print(f"{title:18} {name:9} {losses}  {path.distadam:8.1e}  {path.torch:11.1e}")
    return paths


# ---- exponentially weighted averages ---------------------------------------------------------------------------------


def averages(b: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return V_t and V_t / (1 - b^t) for t = 1, 2, ... of values x, (n,)."""
    V, plain, corrected = torch.zeros((), dtype=x.dtype), [], []
    for t, value in enumerate(x, 1):
        V = ewa(V, value, b)
        plain.append(V)
        corrected.append(bias_corrected(V, b, t))
    return torch.stack(plain), torch.stack(corrected)


def noisy_signal(num: int = 120) -> tuple[Tensor, Tensor]:
    """Return a slow wave around 1, and the same with noise."""
    t = torch.arange(num, dtype=torch.float64)
    wave = 1 + 0.4 * torch.sin(2 * math.pi * t / 90)
    return wave, wave + 0.25 * torch.randn(num, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def steady_step(num: int, *, corrected: bool, betas: tuple[float, float] = (0.9, 0.999)) -> Tensor:
    """Return the size of Adam's steps, in units of lr, while the gradient is always 1."""
    ones = torch.ones(num, dtype=torch.float64)
    m, v = (averages(b, ones)[corrected] for b in betas)
    return m / v.sqrt()


def show_averages() -> None:
    print("\nAn average that starts at 0, of values that are all 1")
    ones = torch.ones(1000, dtype=torch.float64)
    print(f"{'t':>24} {1:8} {10:8} {100:8} {1000:8}")
    for b in (0.9, 0.99, 0.999):
        plain, corrected = averages(b, ones)
        if not torch.allclose(corrected, ones, rtol=0, atol=TOLERANCE):
            raise Difference(f"bias-corrected average of ones, b = {b:g}: expected 1 but got {corrected[0].item():g}")
        print(f"V_t, b = {b:<5g}{'':>11}" + "".join(f" {plain[t - 1].item():8.4f}" for t in (1, 10, 100, 1000)))
    print(f"{'V_t / (1 - b^t), each b':24}" + "".join(f" {corrected[t - 1].item():8.4f}" for t in (1, 10, 100, 1000)))
    steps = {kind: steady_step(1000, corrected=kind == "with") for kind in ("without", "with")}
    for kind, sizes in steps.items():
        label = f"Adam's step / lr, {kind}"
        print(f"{label:24}" + "".join(f" {sizes[t - 1].item():8.4f}" for t in (1, 10, 100, 1000)))


# ---- layers with their own learning rate -----------------------------------------------------------------------------


def small_model(dtype: torch.dtype) -> tuple[nn.Sequential, Callable[[], Tensor]]:
    """Return two layers, and the loss of one fixed batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
    inputs, targets = torch.randn(64, 8).to(dtype), torch.randn(64, 4).to(dtype)
    return model, lambda: nn.functional.mse_loss(model(inputs), targets)


def show_layers() -> None:
    """Print what one step moves in each layer: at t = 1 Adam moves a parameter by lr |g| / (|g| + eps), almost lr."""
    model, loss = small_model(torch.float64)
    body, head = model[0], model[2]
    groups = [{"params": body.parameters(), "lr": 1e-4}, {"params": head.parameters()}]
    optimizer = distadam.Adam(groups, lr=1e-2, eps=1e-8)  # 1e-2 is for the groups that name none
    before = {layer: layer.weight.detach().clone() for layer in (body, head)}
    loss().backward()
    gradients = {layer: optimizer.full_grad(layer.weight) for layer in (body, head)}
    optimizer.step()
    print("\nLayers with their own learning rate: what Adam's first step moves")
    print(f"{'layer':6} {'lr':>8} {'median |change|':>16}")
    for name, layer, lr in (("body", body, 1e-4), ("head", head, 1e-2)):
        moved, size = (layer.weight.detach() - before[layer]).abs(), gradients[layer].abs()
        expected = lr * size / (size + 1e-8)
        compare(f"{name}, step 1", ["|change|"], expected.reshape(1, -1), moved.reshape(1, -1), "distadam.Adam")
        print(f"{name:6} {lr:8.0e} {moved.median().item():16.6e}")
    optimizer.param_groups[0]["lr"] = 0.0
    held = body.weight.detach().clone()
    loss().backward()
    optimizer.step()
    most = (body.weight.detach() - held).abs().max().item()
    if most > 0:
        raise Difference(f"body, step 2: expected no change with lr = 0 but distadam.Adam moved it by {most:g}")
    print(f"{'body':6} {0.0:8.0e} {most:16.6e}   second step, after param_groups[0]['lr'] = 0")


# ---- testing an optimizer --------------------------------------------------------------------------------------------


class WrongTanh(torch.autograd.Function):
    """A backward as one writes it by mistake: 1 - y instead of 1 - y^2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y)


class WrongActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return WrongTanh.apply(x)


def show_gradients() -> None:
    """Are the gradients right? Against central differences, in float64, of sampled elements."""
    print("\nAre the gradients right? diagnostics.check_gradients(optimizer, model, loss)")
    for name in ("as it is", "wrong backward", "layer left out"):
        model, loss = small_model(torch.float32)
        if name == "wrong backward":
            model[1] = WrongActivation()
        params = model[0].named_parameters() if name == "layer left out" else model.named_parameters()
        report = diagnostics.check_gradients(distadam.Adam(params), model, loss, raises=False)
        if report.ok != (name == "as it is"):
            raise Difference(f"check_gradients, {name}: {report}")
        worst = max(row.difference_error for row in report.rows)
        print(f"  {name:15} {f'right: slopes agree to {worst:.0e}' if report.ok else report.problems[0]}")


def show_updates() -> None:
    """Are the parameters updated properly? Against the formula, in float64, within contract 2.3.1's bound."""
    print("\nAre the parameters updated properly? with diagnostics.check_updates(optimizer): optimizer.step()")
    kinds = {"fp32": (torch.float32, "auto"), "bf16, fp32 master": (torch.bfloat16, "fp32")}
    for name, (dtype, master) in (kinds | {"bf16 alone": (torch.bfloat16, "none")}).items():
        model, loss = small_model(dtype)
        precision = distadam.PrecisionPolicy(master=master)
        optimizer = distadam.Adam(model.named_parameters(), lr=1e-4, precision=precision)
        for _ in range(3):
            loss().backward()
            with diagnostics.check_updates(optimizer, elements=None) as check:
                optimizer.step()
        rows = check.report.rows
        frozen, moving = sum(row.frozen for row in rows), sum(row.should_move for row in rows)
        worst = max(row.worst for row in rows)
        print(f"  {name:18} error {worst:5.2f} x the bound; {frozen:3} of {moving} elements frozen by rounding")


# ---- pictures --------------------------------------------------------------------------------------------------------

COLORS = {"SGD": "#777777", "momentum": "#d95f02", "RMSprop": "#7570b3", "Adam": "#1b7f5c"}


def plot_averages(axes: Any) -> None:
    left, right = axes
    wave, noisy = noisy_signal()
    t = torch.arange(1, len(noisy) + 1)
    left.plot(t, noisy, ".", color="#bbbbbb", markersize=4, label="values $x_t$")
    left.plot(t, wave, color="black", linewidth=0.8, label="without noise")
    for b, color in ((0.8, COLORS["momentum"]), (0.95, COLORS["Adam"])):
        plain, corrected = averages(b, noisy)
        left.plot(t, corrected, color=color, label=f"b = {b}, bias-corrected")
        left.plot(t, plain, "--", color=color, linewidth=1.2, label=f"b = {b}, plain $V_t$")
    left.set(title="exponentially weighted averages", xlabel="t", ylim=(0, 2.6))
    left.legend(fontsize=8, loc="upper center", ncols=2)
    steps = torch.arange(1, 10_001)
    right.plot(steps, steady_step(10_000, corrected=False), "--", color=COLORS["SGD"], label="without bias correction")
    right.plot(steps, steady_step(10_000, corrected=True), color=COLORS["Adam"], label="with bias correction")
    right.set(title="Adam's step / lr while the gradient is constant", xlabel="t", xscale="log", ylim=(0, 7.5))
    right.legend(fontsize=8)


def plot_paths(axes: Any, title: str, paths: dict[str, Path2D], box: tuple[float, float, float, float]) -> None:
    """Draw contours of the loss, a decade or less apart, and each rule's path."""
    loss = PROBLEMS[title].loss
    x = torch.linspace(box[0], box[1], 240, dtype=torch.float64)
    y = torch.linspace(box[2], box[3], 240, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    levels = [10 ** (k / 2) for k in range(-4, 7)]
    axes.contour(x, y, loss(grid), levels=levels, colors="#c8d4e0", linewidths=0.8)
    for name, path in paths.items():
        axes.plot(*path.points.T, ".-", color=COLORS[name], markersize=3, linewidth=1, label=name)
    axes.plot(*PROBLEMS[title].start, "o", color="black", markersize=4)
    goal = (1, 1) if title == "Rosenbrock" else (0, 0)
    axes.plot(*goal, "*", color="black", markersize=9)
    axes.set(title=title, xlabel="$w_0$", ylabel="$w_1$", xlim=box[:2], ylim=box[2:])


def plot_losses(axes: Any, title: str, paths: dict[str, Path2D]) -> None:
    for name, path in paths.items():
        axes.plot(path.losses, color=COLORS[name], linewidth=1.3, label=f"{name}, lr {path.lr:.2g}")
    axes.axhline(CLOSE, color="black", linewidth=0.6, linestyle=":")
    axes.set(title=f"{title}: loss", xlabel="step", yscale="log", ylim=(1e-8, None))
    axes.legend(fontsize=8)


def plot(folder: Path, paths: dict[str, dict[str, Path2D]]) -> str:
    """Write the pictures; return what to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return "no pictures: matplotlib is missing (pip install distadam[plot])"
    matplotlib.use("agg")
    from matplotlib import pyplot
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> None:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=90)
        pyplot.close(figure)
        # A palette is enough for lines, and fewer bytes. Pillow comes with matplotlib.
        Image.open(drawn).convert("RGB").quantize(256).save(folder / f"anatomy-{name}.png", optimize=True)

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    plot_averages(axes)
    save(figure, "averages")
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for row, title in zip(axes, ("quadratic", "quadratic, turned"), strict=True):
        box = (-9, 3, -2.4, 2.4) if title == "quadratic" else (-9, 2.5, -5, 2.5)
        plot_paths(row[0], title, paths[title], box)
        plot_losses(row[1], title, paths[title])
    save(figure, "quadratic")
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    plot_paths(axes[0], "Rosenbrock", paths["Rosenbrock"], (-1.6, 1.6, -0.6, 2.2))
    plot_losses(axes[1], "Rosenbrock", paths["Rosenbrock"])
    save(figure, "rosenbrock")
    return f"pictures: {folder}/anatomy-*.png"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build Adam from its parts and check each step.")
    parser.add_argument("--plots", type=Path, default=None, metavar="DIR", help="write the pictures there")
    parser.add_argument("--steps", type=int, default=None, help="at most so many steps of each run")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # two parameters: threads would only wait for each other
    paths = race(options.steps)
    show_averages()
    show_layers()
    show_gradients()
    show_updates()
    if options.plots is not None:
        print(plot(options.plots, paths))


if __name__ == "__main__":
    main()
