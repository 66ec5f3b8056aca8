"""examples/anatomy_of_adam.py: it runs, what it prints is right, its page shows its code, and faults end it by name.

Tolerance: float64, the same gradients for all implementations, so they differ by a few roundings a step: below 1e-13 at
this length, where the example allows 1e-12 and the smallest planted fault makes 1e-5.
"""

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import distadam

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "anatomy-of-adam.md"


@pytest.fixture
def anatomy(monkeypatch) -> ModuleType:
    """The example, fresh: tests break it."""
    spec = importlib.util.spec_from_file_location("anatomy_of_adam", ROOT / "examples" / "anatomy_of_adam.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def few_steps(anatomy: ModuleType, rule: str, problem: str = "Rosenbrock"):
    return anatomy.run(rule, anatomy.PROBLEMS[problem], lr=1e-3, steps=4)


def test_anatomy_runs_and_prints_what_it_checked(anatomy, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    anatomy.main(["--steps", "8", "--plots", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "pip install distadam[plot]" in printed
    rows = re.findall(r"^(quadratic|quadratic, turned|Rosenbrock) +(\w+) .* (\S+) +(\S+)$", printed, re.MULTILINE)
    assert {(problem, rule) for problem, rule, *_ in rows} == {(p, r) for p in anatomy.PROBLEMS for r in anatomy.RULES}
    assert all(float(ours) < 1e-13 and float(torchs) < 1e-13 for *_, ours, torchs in rows)
    assert re.search(r"wrong backward +gradient of 0\.\w+\[", printed)
    assert re.search(r"layer left out +parameter '2\.weight'", printed)
    assert re.search(r"fp32 .* 0 of 420 elements frozen", printed)
    assert re.search(r"bf16 alone .* [1-9]\d\d of 420 elements frozen", printed)


@pytest.mark.long
def test_anatomy_draws_its_pictures(anatomy, tmp_path):
    paths = {title: {rule: few_steps(anatomy, rule, title) for rule in anatomy.RULES} for title in anatomy.PROBLEMS}
    assert str(tmp_path) in anatomy.plot(tmp_path, paths)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    shown = sorted(re.findall(r"\]\((\S+\.png)\)", PAGE.read_text()))
    assert drawn == shown
    for name in shown:
        assert (PAGE.parent / name).read_bytes().startswith(b"\x89PNG")
        assert (PAGE.parent / name).stat().st_size < 100_000


def test_anatomy_page_shows_the_code_that_runs(anatomy):
    page = PAGE.read_text()
    for function in (anatomy.ewa, anatomy.bias_corrected, *(rule.function for rule in anatomy.RULES.values())):
        assert inspect.getsource(function).rstrip() in page, function.__name__


@pytest.mark.parametrize("rule", ["SGD", "momentum", "RMSprop", "Adam"])
def test_anatomy_agrees_on_every_rule(anatomy, rule):
    path = few_steps(anatomy, rule)
    assert path.points.shape == (5, 2)
    assert bool((path.losses[1:] < path.losses[:1]).all())


def plain_average(V, b, t):
    return V


def short_average(V, x, b):
    return (b + 1e-3) * V + (1 - b) * x


def late_average(V, b, t):
    return V / (1 - b ** (t + 1))


def dampened(w, g, state, t, *, lr, momentum):
    state["momentum_buffer"] = (1 - momentum) * g if t == 1 else momentum * state["momentum_buffer"] + g
    return w - lr * state["momentum_buffer"]


@pytest.mark.parametrize(
    ("part", "mutation", "rule", "step"),
    [
        ("bias_corrected", plain_average, "Adam", 1),
        ("bias_corrected", late_average, "Adam", 1),
        ("ewa", short_average, "Adam", 2),
        ("ewa", short_average, "RMSprop", 2),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_anatomy_names_rule_step_and_element_when_a_part_is_wrong(anatomy, monkeypatch, part, mutation, rule, step):
    monkeypatch.setattr(anatomy, part, mutation)
    with pytest.raises(anatomy.Difference, match=rf"^{rule}, step {step}, \w+, element [01]: expected .* distadam\."):
        few_steps(anatomy, rule)


def test_anatomy_names_a_wrong_momentum(anatomy, monkeypatch):
    monkeypatch.setitem(
        anatomy.RULES, "momentum", anatomy.Rule(function=dampened, optimizer="SGD", options={"momentum": 0.9})
    )
    with pytest.raises(anatomy.Difference, match=r"^momentum, step 1, \w+, element [01]: .* distadam\.SGD has"):
        few_steps(anatomy, "momentum")


def test_anatomy_names_a_wrong_beta_in_the_library(anatomy, monkeypatch):
    right = distadam.Adam
    monkeypatch.setattr(distadam, "Adam", lambda *args, betas, **rest: right(*args, betas=(0.9, 0.998), **rest))
    with pytest.raises(anatomy.Difference, match=r"^Adam, step 1, \w+, element [01]: .* but distadam\.Adam has"):
        few_steps(anatomy, "Adam")


def test_anatomy_ends_when_the_average_of_ones_is_not_one(anatomy, monkeypatch):
    monkeypatch.setattr(anatomy, "bias_corrected", late_average)
    with pytest.raises(anatomy.Difference, match=r"average of ones, b = 0\.9: expected 1 but got"):
        anatomy.show_averages()


def test_anatomy_ends_when_a_layer_moves_by_another_rate(anatomy, monkeypatch):
    right = distadam.Adam
    monkeypatch.setattr(
        distadam, "Adam", lambda groups, **rest: right([{"params": [*g["params"]]} for g in groups], **rest)
    )
    with pytest.raises(anatomy.Difference, match=r"^body, step 1, \|change\|, element \d+: expected .* distadam\.Adam"):
        anatomy.show_layers()


def test_anatomy_ends_when_a_wrong_gradient_passes_its_check(anatomy, monkeypatch):
    monkeypatch.setattr(anatomy, "WrongActivation", torch.nn.Tanh)
    with pytest.raises(anatomy.Difference, match="check_gradients, wrong backward"):
        anatomy.show_gradients()
