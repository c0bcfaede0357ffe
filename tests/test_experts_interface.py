"""Every experts class that transformers decorates with `use_experts_implementation`: recognised, and computed alike.

The class is built on the meta device from its family's default config, given small weights in its own layout, and its
own (eager) forward is the oracle for grouped_experts. This covers the interface; whole models are in test_families.py.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers

from moe_runtime.comm.plan import plan_expand
from moe_runtime.comm.rows import combine_rows
from moe_runtime.experts.compute import grouped_experts
from moe_runtime.layer import is_experts_module

EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 5, 8, 6, 11, 3


def decorated_classes() -> list[tuple[str, str]]:
    """(model folder, class name) of every decorated experts class of the installed transformers."""
    pattern = re.compile(r"^@use_experts_implementation.*\nclass (\w+)\(", re.MULTILINE)
    models = Path(transformers.__file__).parent / "models"
    found = []
    for file in sorted(models.glob("*/modeling_*.py")):
        found += [(f"{file.parent.name}.{file.stem}", name) for name in pattern.findall(file.read_text())]
    return found


CLASSES = decorated_classes()


def test_transformers_has_the_families_this_project_speaks_of():
    assert len(CLASSES) >= 40
    names = {name for _, name in CLASSES}
    assert {"DeepseekV2Experts", "DeepseekV3Experts", "MixtralExperts", "GptOssExperts", "Qwen3MoeExperts"} <= names


def configs_of(module) -> list:
    """Default instances of the config classes of a modeling module's family, with sizes where the default has none."""
    family = importlib.import_module(module.__name__.replace(".modeling_", ".configuration_"))
    made = []
    for value in (getattr(family, name) for name in dir(family)):
        if isinstance(value, type) and issubclass(value, transformers.PretrainedConfig):
            try:
                made.append(value())
            except (TypeError, ValueError, AttributeError, KeyError):  # a config that needs arguments
                continue
    for config in made:
        for field in ("num_experts", "n_routed_experts", "moe_intermediate_size"):
            if hasattr(config, field) and not isinstance(getattr(config, field), int):  # None, or one per modality
                config.__dict__[field] = 4  # past the config's own check of the type
    return made


def build(module, name: str):
    errors = []
    for config in configs_of(module):
        try:
            with torch.device("meta"):
                return getattr(module, name)(config)
        except (AttributeError, TypeError, KeyError, ValueError, RuntimeError) as error:
            errors.append(f"{type(config).__name__}: {error}")
    raise AssertionError(f"{name}: no default config of its family builds it: {errors}")


def give_small_weights(experts: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    twice = 2 * WIDTH if experts.has_gate else WIDTH
    shapes = {"gate_up_proj": (twice, HIDDEN), "up_proj": (twice, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    for name, _ in list(experts.named_parameters(recurse=False)):
        rows, columns = shapes[name.removesuffix("_bias")]
        shape = (rows,) if name.endswith("_bias") else (columns, rows) if experts.is_transposed else (rows, columns)
        value = torch.randn(EXPERTS, *shape, generator=generator) * 0.5
        setattr(experts, name, torch.nn.Parameter(value))
    experts.num_experts = EXPERTS
    for child in experts.children():  # a norm behind each expert, or an activation with parameters
        for name, parameter in list(child.named_parameters()):
            path, _, leaf = name.rpartition(".")
            shape = [HIDDEN if extent > 1 else extent for extent in parameter.shape]
            setattr(child.get_submodule(path), leaf, torch.nn.Parameter(torch.rand(shape, generator=generator) + 0.5))


@pytest.mark.parametrize(("module_name", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_grouped_experts_equal_the_classs_own_forward(module_name, name):
    module = importlib.import_module(f"transformers.models.{module_name}")
    experts = build(module, name)
    assert is_experts_module(experts)
    give_small_weights(experts)
    experts.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    with torch.no_grad():
        expected = experts(x, ids, weights)
        order = plan_expand(ids.to(torch.int32).numpy(), EXPERTS)
        row_index = torch.from_numpy(order.row_index)
        outputs = grouped_experts(experts, x, row_index, order.rows_per_slot)
        weights_M = weights[row_index, torch.from_numpy(order.k_index)]
        ours = combine_rows(outputs, row_index, TOKENS, weights_M)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
