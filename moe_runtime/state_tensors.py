"""Which tensors make up the state of a training, under which keys, and on which rank each is stored.

    weights/NAME             a dense parameter or buffer, once however many ranks hold it
    weights/NAME/EXPERT      one expert's row of a sharded parameter, from the rank of its first slot
    optimizer/WORD/NAME...   for either of them the optimizer's entry WORD of the parameter's shape, as "exp_avg"
    number/WORD/NAME...      and its entries that are one number, as "step"
    random/RANK/DEVICE       a rank's generator of random numbers

Keys do not depend on ranks or placement, so that any number of ranks finds its own. Nothing is cast.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .core.errors import CheckpointError, ConfigError
from .experts.compute import expert_parameters
from .layer import experts_modules, refuse_absent
from .state_files import Entry


@dataclass(frozen=True)
class Stored:
    """A tensor of the model as its keys name it: NAME, and for an expert's row its number and local slot."""

    name: str
    tensor: torch.Tensor  # the whole parameter or buffer on this rank: what the optimizer's state belongs to
    owner: int  # the rank that stores it
    expert: int | None = None
    slot: int | None = None  # None for a dense tensor

    @property
    def key(self) -> str:
        return self.name if self.expert is None else f"{self.name}/{self.expert}"

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """This one's part of a tensor of the parameter's shape; a number is everybody's."""
        return value if self.slot is None or value.dim() == 0 else value[self.slot]


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and the buffers that a model's state has, tied ones once under their first name."""
    first: dict[int, str] = {}
    found = model.state_dict(keep_vars=True).items()
    return {name: tensor for name, tensor in found if first.setdefault(id(tensor), name) == name}


def stored_tensors(model: torch.nn.Module, rank: int, size: int) -> list[Stored]:
    """All that this rank holds: every dense tensor, and a row per expert of its own."""
    sharded: dict[str, Any] = {}
    for prefix, module in experts_modules(model).items():
        sharded |= {f"{prefix}.{name}": module.moe_runtime_layer for name in expert_parameters(module)}
    tensors = named_tensors(model)
    owners = spread({name: tensor.nbytes for name, tensor in tensors.items() if name not in sharded}, size)
    found = [Stored(name, tensors[name], owner) for name, owner in owners.items()]
    for name, layer in sharded.items():
        experts, slots = layer.placement.slot_expert[layer.index], layer.placement.slot_rank
        for slot, expert in enumerate(layer.placement.rank_experts(layer.index, rank)):
            first = int(slots[(experts == expert).argmax()])
            found.append(Stored(name, tensors[name], first, expert, slot))
    return found


def spread(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """A rank for each name, so that sums of sizes are about even; the same wherever it is asked."""
    sums = [0] * ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = sums.index(min(sums))
        sums[owners[name]] += sizes[name]
    return owners


def copy_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int, size: int) -> dict[str, Any]:
    """Copies in host memory of what this rank stores. Raises ConfigError for optimizer state that has no place,
    and where no rank holds some experts."""
    refuse_absent(model, "saved")
    _check_optimizer(optimizer, named_tensors(model))
    stored = stored_tensors(model, rank, size)
    found = {}
    for each in stored:
        if each.owner != rank:
            continue
        found[f"weights/{each.key}"] = _host_copy(each.of(each.tensor))
        for word, value in optimizer.state.get(each.tensor, {}).items():
            kind = "number" if is_number(word, value, each.tensor) else "optimizer"
            found[f"{kind}/{word}/{each.key}"] = _host_copy(each.of(value))
    return found | {f"random/{rank}/{kind}": get() for kind, (get, _) in _generators(stored).items()}


def is_number(word: str, value: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether an entry of optimizer state is one number for the whole parameter."""
    return value.dim() == 0 and (parameter.dim() > 0 or word == "step")


def _check_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    names = {id(tensor): name for name, tensor in tensors.items()}
    for parameter, state in optimizer.state.items():
        if id(parameter) not in names:
            raise ConfigError(
                f"training state: the optimizer holds a parameter of shape {list(parameter.shape)} that is not the "
                "model's; make it from model.parameters()"
            )
        for word, value in state.items():
            shape = list(value.shape) if isinstance(value, torch.Tensor) else None
            if shape is None or (shape and shape != list(parameter.shape)) or "/" in word:
                raise ConfigError(
                    f"training state: the optimizer's {word!r} for {names.get(id(parameter))} is "
                    f"{type(value).__name__ if shape is None else f'of shape {shape}'}; it can be stored where it is "
                    "a 0-dim tensor or has the parameter's shape (Adam, SGD, ...)"
                )


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


_Generator = tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]


def _generators(stored: list[Stored]) -> dict[str, _Generator]:
    """How to get and set torch's generators of random numbers: the CPU's, and the device's where it shows one."""
    found: dict[str, _Generator] = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    device = stored[0].tensor.device.type
    module: Any = getattr(torch, device, None)
    if device != "cpu" and hasattr(module, "get_rng_state") and hasattr(module, "set_rng_state"):
        found[device] = (module.get_rng_state, module.set_rng_state)
    return found


class Restore:
    """What is to be read into a model and its optimizer, found without changing either; then done by `finish`.

    Raises CheckpointError where model or optimizer are not the ones of the checkpoint.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        rank: int,
        size: int,
        entries: Mapping[str, Entry],
        path: Path,
        same_ranks: bool,
    ) -> None:
        self._optimizer, self._entries, self._path = optimizer, entries, path
        self.targets: dict[str, torch.Tensor] = {}
        self._states: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        self._numbers: dict[tuple[torch.Tensor, str], list[str]] = {}  # (parameter, word) -> keys of 0-dim entries
        self._generators: dict[str, Callable[[torch.Tensor], None]] = {}
        tensors, stored = named_tensors(model), stored_tensors(model, rank, size)
        by_name: dict[str, list[Stored]] = defaultdict(list)
        for each in stored:
            by_name[each.name].append(each)
            self._want(f"weights/{each.key}", each.of(each.tensor.detach()))
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for (kind, word, name), keys in sorted(_group(entries).items()):
            if name not in tensors:
                raise CheckpointError(f"{path}: holds {name}, which the model does not have; it is of another model")
            if kind != "weights":
                if id(tensors[name]) not in trained:
                    raise CheckpointError(f"{path}: holds {word} of {name}, which this optimizer does not train")
                self._want_state(kind, word, tensors[name], by_name[name], keys)
        for kind, (_, put) in _generators(stored).items():
            key = f"random/{rank}/{kind}"
            if same_ranks and key in entries:
                self.targets[key] = torch.empty(entries[key].shape, dtype=entries[key].dtype)
                self._generators[key] = put

    def _want(self, key: str, target: torch.Tensor) -> None:
        entry = self._entries.get(key)
        if entry is None:
            raise CheckpointError(f"{self._path}: holds no {key}; it is of another model or another optimizer")
        if (entry.shape, entry.dtype) != (tuple(target.shape), target.dtype):
            raise CheckpointError(
                f"{self._path}: {key} is {entry.dtype} {list(entry.shape)}, the model has {target.dtype} "
                f"{list(target.shape)}; give the settings it was trained with"
            )
        self.targets[key] = target

    def _want_state(self, kind: str, word: str, parameter: torch.Tensor, parts: list[Stored], keys: list[str]) -> None:
        state, dtype = self._states.setdefault(parameter, {}), self._entries[keys[0]].dtype
        wanted = [f"{kind}/{word}/{part.key}" for part in parts]
        if kind == "optimizer":
            state[word] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            for key, part in zip(wanted, parts, strict=True):
                self._want(key, part.of(state[word]))
            return
        wanted = wanted or keys[:1]  # a rank without experts of a layer counts its steps all the same
        self._numbers[parameter, word] = wanted
        for key in wanted:
            self._want(key, torch.empty((), dtype=dtype))

    def finish(self) -> None:
        """The targets have been read: give the optimizer its state and the generators theirs."""
        on_device = {
            id(parameter)
            for group in self._optimizer.param_groups
            if group.get("capturable") or group.get("fused")
            for parameter in group["params"]
        }
        for (parameter, word), keys in self._numbers.items():
            value = self.targets[keys[0]]
            if any(not torch.equal(self.targets[key], value) for key in keys):
                raise CheckpointError(
                    f"{self._path}: {keys[0]} and its like differ among the experts of a rank; resume on the ranks and "
                    "the placement that wrote it"
                )
            self._states[parameter][word] = value.to(parameter.device) if id(parameter) in on_device else value
        self._optimizer.state.clear()
        self._optimizer.state.update(self._states)
        for key, put in self._generators.items():
            put(self.targets[key])


def _group(entries: Mapping[str, Entry]) -> dict[tuple[str, str, str], list[str]]:
    """(kind, WORD or "", NAME) -> the keys of a checkpoint that are parts of it."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for key in entries:
        kind, *parts = key.split("/")
        if kind != "random":
            word, name = ("", parts[0]) if kind == "weights" else parts[:2]
            found[kind, word, name].append(key)
    return found
