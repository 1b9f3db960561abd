"""README is part of the interface: its example runs, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import fastambient

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_trains_someone_elses_module():
    code = re.search(r"<!-- example: begin -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 20 + 2, "the example promises about twenty lines"
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "README", "exec"), names)
    trained = names["model"]
    torch.manual_seed(0)
    fresh = type(trained)(4, 3, 3, padding=1)

    def loss(model):
        x, c = names["ambient_noise"](*names["data"], **names["noise"])
        F = model(torch.cat([x, c.c_noise.view(-1, 1, 1, 1).expand(-1, 1, 16, 16)], dim=1))
        return names["ambient_loss"](F, *names["data"], **names["noise"]).mean().item()

    assert loss(trained) < 0.9 * loss(fresh)


def test_what_the_package_offers_is_listed():
    offered = set(re.search(r"from fastambient import (.*)", README).group(1).split(", "))
    assert offered <= set(fastambient.__all__) <= set(dir(fastambient))
    assert all(hasattr(fastambient, name) for name in dir(fastambient))


def test_the_first_screen_shows_the_two_commands():
    screen = README.split("## ")[0]
    block = re.search(r"```\n(make .*?)```", screen, re.DOTALL).group(1)
    assert [line.split("#")[0].strip() for line in block.splitlines()] == ["make quickstart", "make test"]


def test_commands_and_presets_of_readme_exist():
    from fastambient.cli import app
    from fastambient.models.presets import PRESETS

    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    named = set(re.findall(r"fastambient (prepare|train|sample|evaluate|info|quickstart)\b", README))
    assert named <= known and {"prepare", "train", "sample", "evaluate", "info", "quickstart"} <= known
    for name in re.findall(r"\b(?:cifar10|ffhq64|imagenet64|paper)-[\w-]+", README):
        assert name in PRESETS
    for link in re.findall(r"\]\(([\w/.-]+\.md)\)", README):
        assert (Path(__file__).parents[1] / link).is_file(), link
