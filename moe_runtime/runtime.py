"""The runtime: one per process. It knows its rank, its transport, its models' placements, and says what runs."""

from __future__ import annotations

import atexit
import functools
import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from . import expert_dtypes, gradients, loading, overlap, saving
from .checkpoint import CheckpointReader
from .comm import cuda, formats, staging
from .comm.dispatch import IDLE, Dispatcher
from .comm.nodes import NodeDispatcher
from .comm.place import may_differ, place_of_rank
from .comm.rendezvous import connect
from .comm.transport import LocalTransport, Transport
from .comm.wire import all_gather_message
from .control.member import Notice
from .core import environment, native
from .core.cluster import Cluster, Node, load_cluster
from .core.config import RuntimeConfig
from .core.errors import CheckpointError, ConfigError
from .core.free_memory import free_bytes
from .core.memory import pool
from .core.placement import Placement
from .expert_dispatcher import ExpertDispatcher, describe_choice, make_chooser
from .experts import compute, dense
from .experts.placement import load_plan, proportional
from .experts.routing import ReplicaChooser
from .following import follow
from .layer import describe_lacking, experts_modules
from .migration import columns_of
from .model import empty_model, expert_layers, read_config, shard_experts
from .pays import Pays
from .rebalance import Policy, Rebalancer
from .recorder import Recorder
from .refit import Source
from .survival import LOST, Settings, Survival
from .views import Held, placement_of, spread

_USED_OF_FREE = 0.8  # by lost experts: reading them takes memory for a while, too
PROTOCOL = "0.1"  # of the exchanges between ranks; ranks with another one cannot join


@dataclass(frozen=True)
class View:
    """A numbered membership: the ranks that are alive and the placement in force."""

    number: int
    ranks: tuple[int, ...]
    placement: Placement | None


def _nothing(modules: Mapping[str, Any]) -> Placement:
    """The placement of a rank that holds no expert, alone."""
    num_experts = next(iter(modules.values())).num_experts
    return placement_of([Held([[] for _ in modules], [[] for _ in modules])], num_experts)


def init(config: RuntimeConfig | Mapping[str, Any] | None = None) -> Runtime:
    """Join the world the launcher describes (moe-launch, torchrun, mpirun, srun), or be a world of one.

    Every rank calls it once. Raises ConfigError for bad settings or a half-set environment, PeerTimeout when ranks
    are missing at the deadline.
    """
    return Runtime(RuntimeConfig.from_any(config), environment.read_world())


class Runtime:
    """See DESIGN.md section 5. Use it as a context manager, or call `close()`."""

    def __init__(self, config: RuntimeConfig, world: environment.WorldEnvironment) -> None:
        self.config = config
        self._cluster: Cluster | None = load_cluster(config.cluster) if config.cluster else None
        self._like = world.rank if world.like is None else world.like  # whose node in the cluster file is ours
        if self._cluster is not None and world.like is None and self._cluster.num_ranks != world.size:
            raise ConfigError(
                f"cluster file {config.cluster} describes {self._cluster.num_ranks} ranks, {world.size} were started"
            )
        self.world = world
        about = {"moe_runtime": PROTOCOL, "cluster": self._cluster.digest() if self._cluster else 0}
        self.place, self._notes = place_of_rank(config, self._cluster, world)
        if world.like is not None:
            beside = f"added to the running job on the node of rank {world.like}"
            self._notes.append(f"{beside}: where that has too few devices, one is shared")
        self.device = self.place.device
        self.number = world.rank  # for life; `rank` is the place among the ranks of the present view
        self._survival: Survival | None = None
        members = tuple(range(world.size))
        if (file := environment.survival_file()) is not None:
            encrypts = config.bridge_encryption == "on"
            settings = Settings.read(file)
            self._survival = Survival(settings, world.rank, config.transport, about, config.timeout_s, encrypts)
            notice = self._survival.first()
            members = (world.rank,) if notice is None else notice.members
            transport = LocalTransport(config.timeout_s) if notice is None else self._survival.build(notice, self.place)
        else:
            kind = "islands" if config.transport == "auto" and may_differ(self._cluster) else config.transport
            encrypts = config.bridge_encryption == "on"
            transport = connect(world, config.timeout_s, kind, about, self.place, config.bridge, encrypts)
        self.view = View(0, members, None)
        self._adopt(transport)
        self._dispatchers: dict[tuple, Dispatcher | NodeDispatcher] = {}
        self._slowdown = self._emulated_slowdown()
        self._rebalancers: weakref.WeakSet[Rebalancer] = weakref.WeakSet()
        self._models: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        self._join_depth = 0
        self._placed_as = 0  # this rank's place in the placement in force: of the present view, or the one before
        self._num_slots = 0  # of the placement that the latest model was loaded with
        self._early_layers = 0  # of the latest model, whose shared expert is computed while rows travel
        self._dense_layers = 0  # of the latest model, that take the C kernel for a few rows
        self._expert_lines: list[str] = []  # what the latest model's experts are held in

    def _adopt(self, transport: Transport) -> None:
        """Use this transport. What every rank can read and write on the wire, and who it is: formats follow from it."""
        self.transport = transport
        atexit.register(transport.close)  # for scripts that end without close()
        self.rank, self.size = transport.rank, transport.size
        claims = formats.claimed(self.place.vendor)
        if not self.place.emulated:
            claims = formats.seen(claims, self.device)
        said = all_gather_message(transport, [self.place.kind, claims, self._like], "rendezvous (wire formats)")
        self._rank_names = [f"rank {n} ({kind})" for n, (kind, _, _) in zip(self.view.ranks, said, strict=True)]
        self._claims, self._likes = [claims for _, claims, _ in said], [like for _, _, like in said]

    # ---- models -------------------------------------------------------------------------------------------------

    def load_model(
        self,
        path: str | Path,
        dtype: torch.dtype | None = None,
        placement: Placement | str | Path | None = None,
        *,
        keep_fp8: bool = False,
        expert_dtype: str | None = None,
        progress: loading.Progress = lambda done, total: None,
    ) -> PreTrainedModel:
        """A transformers model of which this rank holds the non-expert weights and its own experts only.

        path: a Hugging Face checkpoint folder (safetensors). dtype: None takes the config's. placement: a
        Placement, or the path of a plan file; None gives each rank experts in proportion to its speed in the cluster
        file, or equal shares. keep_fp8: leave experts that are stored in FP8 as they are; they are dequantised one by
        one when used. expert_dtype: what this rank holds its experts in, "fp8", "int8" or dtype's name; None takes what
        the cluster file says of its node, else what keep_fp8 says, else 8 bits where memory_gib asks for it
        (expert_dtypes.py). Experts in 8 bits can neither be saved nor trained.

        Raises CheckpointError (missing or unreadable files, missing or misshapen tensors) and ConfigError (no experts
        to shard, more ranks than experts, an expert_dtype that cannot be).
        """
        with self.same_outcome("open checkpoint"):
            reader = CheckpointReader(path)
            config = read_config(Path(path))
            dtype = dtype or config.dtype or torch.float32
            model = empty_model(config, dtype)
        with reader:
            self._shard(model, placement)
            held = self._choose_expert_dtype(model, reader, dtype, expert_dtype, keep_fp8)
            with self.same_outcome("load"):
                unexpected = loading.fill_from_checkpoint(
                    model, reader, dtype, self.device, self.rank, expert_form=held.form, progress=progress
                )
            if self.on_loss == "reload":
                model.moe_runtime_source = Source(model, path)
        self._expert_lines = expert_dtypes.describe(held, expert_dtypes.of_ranks(model), model)
        if unexpected:
            self._notes.append(f"{path}: {len(unexpected)} tensors are not part of the model, such as {unexpected[0]}")
        if (Path(path) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        return model

    def _choose_expert_dtype(
        self, model: PreTrainedModel, reader: CheckpointReader, dtype: torch.dtype, asked: str | None, keep_fp8: bool
    ) -> expert_dtypes.Choice:
        node = self._node()
        with self.same_outcome("choose expert_dtype"):
            stored, sizes = expert_dtypes.stored_form(reader), expert_dtypes.sizes_of(model, dtype)
            choice = expert_dtypes.choose(asked, keep_fp8, node, stored, dtype, self._claims[self.rank], sizes)
        expert_dtypes.settle(model, self.transport, choice, self.config)
        if node is not None and node.expert_dtype not in (None, choice.name):
            self._notes.append(
                f"expert_dtype {node.expert_dtype} of node {node.name} gave way to {choice.name}, as asked"
            )
        return choice

    def create_model(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        placement: Placement | str | Path | None = None,
    ) -> PreTrainedModel:
        """A fresh model of this config, the same for any number of ranks: to train from scratch."""
        model = empty_model(config, dtype)
        self._shard(model, placement)
        loading.fill_fresh(model, dtype, self.device, self.rank, seed)
        experts = tuple(f"{name}." for name in experts_modules(model))
        for name, value in model.state_dict().items():
            if not name.startswith(experts):
                self.transport.broadcast(value, 0, "fresh weights")
        return model

    def save_model(
        self, model: PreTrainedModel, path: str | Path, tokenizer: Any = None, max_shard_bytes: int = 1 << 30
    ) -> None:
        """Write a checkpoint that plain transformers loads. Every rank calls; rank 0 writes. See saving.py."""
        saving.save_checkpoint(model, Path(path), self.transport, tokenizer, max_shard_bytes)

    @contextmanager
    def same_outcome(self, phase: str) -> Iterator[None]:
        """What one rank finds wrong ends the phase on every rank: nobody is left waiting for one that gave up."""
        failure: CheckpointError | ConfigError | None = None
        try:
            yield
        except (CheckpointError, ConfigError) as error:
            failure = error
        said = all_gather_message(self.transport, failure and str(failure), f"{phase} (outcome)")
        if failure is not None:
            raise failure
        for rank, problem in enumerate(said):
            if problem is not None:
                raise CheckpointError(f"rank {rank} could not {phase}: {problem}")

    def _shard(self, model: PreTrainedModel, placement: Placement | str | Path | None) -> None:
        modules = experts_modules(model)
        if self.joins:
            placement = _nothing(modules)
        if placement is None:
            num_experts = {module.num_experts for module in modules.values()}
            if len(num_experts) > 1:
                raise ConfigError(f"layers with different numbers of experts {sorted(num_experts)}: give a placement")
            placement = proportional(len(modules), num_experts.pop(), self.rank_speeds)
        placement = self._read_placement(placement)
        if placement.num_ranks != self.size:
            raise ConfigError(f"the placement is for {placement.num_ranks} ranks, the world has {self.size}")
        shard_experts(
            model,
            placement,
            lambda hidden, top_k, dtype: self._dispatcher(placement, hidden, top_k, dtype),
            lambda layer: self._chooser(placement, layer),
            self.rank,
            slowdown=self._slowdown,
            per_expert_sums=self.config.per_expert_sums,
            transformers_kernel=self.config.expert_kernel == "transformers",
            join=self.join,
        )
        if self.config.dense_kernel == "auto" and self.device.type == "cpu":
            self._dense_layers = dense.use_few_rows_kernel(model)
        self._early_layers = overlap.compute_shared_experts_early(model) if self.size > 1 or self.joins else 0
        self.view = View(self.view.number + 1, self.view.ranks, placement)
        self._placed_as, self._num_slots = self.rank, placement.num_slots
        self._models.add(model)
        if self.config.rebalance == "auto" and (self.size > 1 or self.joins):
            dispatch = "split" if self.config.replica_choice == "balanced" else "static"
            policy = Pays(dispatch=dispatch, spares=self.on_loss == "replica")
            self.rebalance_by(model, policy, self.config.rebalance_every)

    def _read_placement(self, placement: Placement | str | Path) -> Placement:
        if isinstance(placement, Placement):
            return placement
        with self.same_outcome("read placement"):
            return load_plan(placement)

    def _emulated_slowdown(self) -> float:
        """How many times as long experts are made to take here, by the cluster file's emulate_speed."""
        node = self._node()
        if node is None or node.emulate_speed is None:
            return 1.0
        if self.device.type != "cpu" and not self.place.emulated:
            raise ConfigError(f"node {node.name}: emulate_speed slows CPU ranks down, this one runs on {self.device}")
        return 1 / node.emulate_speed

    @property
    def rank_speeds(self) -> list[float]:
        """Relative speed of each rank, as the cluster file has it; all 1 without one."""
        speeds = self._cluster.rank_speeds() if self._cluster else [1.0] * (1 + max(self._likes))
        return [speeds[like] for like in self._likes]

    def _node(self) -> Node | None:
        return self._cluster.rank_nodes()[self._like] if self._cluster else None

    def _node_names(self) -> list[str]:
        """The cluster file's node of each rank of the view; "" without one."""
        nodes = self._cluster.rank_nodes() if self._cluster else ()
        return [nodes[like].name if nodes else "" for like in self._likes]

    def _dispatcher(
        self, placement: Placement, hidden: int, top_k: int, dtype: torch.dtype, digest: int | None = None
    ) -> Dispatcher | NodeDispatcher:
        digest = placement.digest() if digest is None else digest
        key = (digest, hidden, top_k, dtype)
        if key not in self._dispatchers:
            wanted = [word.strip() for word in self.config.wire_format.split(",")]
            nodes = self._rank_nodes()
            make = Dispatcher if nodes is None else functools.partial(NodeDispatcher, rank_node=nodes)
            self._dispatchers[key] = make(
                self.transport,
                placement.slot_rank,
                hidden_size=hidden,
                num_experts=placement.num_experts,
                top_k=top_k,
                dtype=dtype,
                placement_digest=digest,
                device=self.device,
                formats=formats.agree(wanted, self._claims, dtype, self._rank_names),
            )
        return self._dispatchers[key]

    def _chooser(self, placement: Placement, layer: int) -> ReplicaChooser:
        names = self._node_names()
        return make_chooser(self.config.replica_choice, placement, layer, self.transport, names, self.rank_speeds)

    def _rank_nodes(self) -> list[int] | None:
        """The node of each rank, where there are several and some have several ranks; None: no rank shares its node.

        One row per (token, expert) goes home where sums must not depend on the placement: nothing is summed on the way.
        """
        if self._cluster is None or self.config.per_expert_sums:
            return None
        names = self._node_names()
        nodes = list(dict.fromkeys(names))
        return [nodes.index(name) for name in names] if 1 < len(nodes) < len(names) else None

    def dispatcher(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        dtype: torch.dtype = torch.float32,
        placement: Placement | None = None,
        layer: int = 0,
    ) -> ExpertDispatcher:
        """Dispatch and combine for callers with their own experts, by expert ids. Every rank calls alike."""
        if placement is None:
            placement = proportional(max(layer, 0) + 1, num_experts, self.rank_speeds)
        for name, value in (("hidden_size", hidden_size), ("top_k", top_k), ("num_experts", num_experts)):
            if value < 1:
                raise ConfigError(f"dispatcher: {name} must be at least 1, got {value}")
        if not dtype.is_floating_point:
            raise ConfigError(f"dispatcher: dtype must be a floating-point type, got {dtype}")
        if placement.num_ranks != self.size:
            raise ConfigError(f"the placement is for {placement.num_ranks} ranks, the world has {self.size}")
        if placement.num_experts != num_experts:
            raise ConfigError(f"the placement is for {placement.num_experts} experts, not {num_experts}")
        if not 0 <= layer < placement.num_layers:
            raise ConfigError(f"dispatcher: layer {layer} is not one of the placement's {placement.num_layers}")
        chooser = self._chooser(placement, layer)
        return ExpertDispatcher(self._dispatcher(placement, hidden_size, top_k, dtype), placement, layer, chooser)

    # ---- live rebalancing ---------------------------------------------------------------------------------------

    def rebalance(
        self,
        model: PreTrainedModel,
        placement: Placement | str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        wait: bool = False,
    ) -> None:
        """Move to another placement while the model runs (rebalance.py). Every rank calls between the same passes.

        Returns at once. In each following forward pass at most `rebalance_slice_mib` of a rank's experts travel, and
        when all have come and their checksums agree, all ranks switch before the same pass. `wait` does all of it now.

        While training, give the `optimizer` and call after its step: weights and optimizer state travel in the next
        forward passes, a slice per expert layer; the next `sync_gradients` does what is left, moves the gradients after
        them and switches. Where this rank gets more or fewer experts, new Parameters take the old ones' places in model
        and optimizer.

        A move that fails leaves the placement in force as it is; stderr and `describe()` say why. Raises ConfigError,
        on all ranks, for a placement that does not fit.
        """
        rebalancer = self._rebalancer(model)
        rebalancer.begin(self._read_placement(placement), optimizer)
        if wait:
            rebalancer.finish()

    def finish_rebalance(self, model: PreTrainedModel) -> None:
        """Do what is left of a rebalance now. Every rank calls."""
        self._rebalancer(model).finish()

    def rebalance_by(self, model: PreTrainedModel, policy: Policy | None, every: int) -> None:
        """Every `every` forward passes show `policy` (on rank 0) what was measured, and move to what it answers.

        Every rank calls. None ends it. `rebalance = "auto"` is this with pays.Pays. While a model trains nothing moves
        by itself: call `rebalance_step` after the optimizer's step.
        """
        rebalancer = self._rebalancer(model)
        rebalancer.policy, rebalancer.every = policy, every

    def rebalance_step(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """In training, after the optimizer's step: look, if it is time, and begin what the policy wants. Every rank."""
        self._rebalancer(model).between_steps(optimizer)

    def _rebalancer(self, model: PreTrainedModel) -> Rebalancer:
        if not hasattr(model, "moe_runtime_rebalancer"):
            layers = expert_layers(model)
            model.moe_runtime_rebalancer = Rebalancer(
                self.transport,
                layers,
                int(self.config.rebalance_slice_mib * (1 << 20)),
                self.config.rebalance_stall_s,
                self.rank_speeds,
                functools.partial(self._switched, layers),
            )
            for layer in layers:
                layer.moe_runtime_layer.before_exchange = model.moe_runtime_rebalancer.before_exchange
            self._rebalancers.add(model.moe_runtime_rebalancer)
        return model.moe_runtime_rebalancer

    def _switched(self, layers: list[Any], old: Placement, new: Placement) -> None:
        """The weights are in their new slots: make everything else follow."""
        self._hold(layers, new)
        digest, old_digest = self._dispatch_by(layers, new), old.digest()
        if digest != old_digest:  # a dispatcher of the old placement is made again if anyone asks for it
            self._dispatchers = {key: made for key, made in self._dispatchers.items() if key[0] != old_digest}
        self.view = View(self.view.number + 1, self.view.ranks, new)

    def _hold(self, layers: list[Any], placement: Placement) -> None:
        """This rank's experts are in the places of this placement. Nothing here waits for others, or can break."""
        slots = placement.rank_slots(self.rank)
        count, self._placed_as = slots.stop - slots.start, self.rank
        for module in layers:
            layer, module.num_experts = module.moe_runtime_layer, count
            layer.placement, layer.tokens_per_slot = placement, np.zeros(count, dtype=np.int64)

    def _dispatch_by(self, layers: list[Any], placement: Placement) -> int:
        """All ranks hold what this placement says: compare that, and send tokens there. Returns its digest."""
        digest = placement.digest()
        for module in layers:
            layer, before = module.moe_runtime_layer, module.moe_runtime_layer.dispatcher
            layer.dispatcher = self._dispatcher(placement, before.hidden_size, before.top_k, before.dtype, digest)
            layer.chooser = self._chooser(placement, layer.index)
        return digest

    # ---- new views ----------------------------------------------------------------------------------------------

    @property
    def on_loss(self) -> str:
        """What happens when a rank is lost: "fail", or what `moe-launch --on-loss` was given."""
        return self._survival.settings.on_loss if self._survival else "fail"

    @property
    def joins(self) -> bool:
        """Whether this rank was started when the job had begun: it loads its model alone, then calls `recover`."""
        return self._survival is not None and not self._survival.entered

    def ready(self, model: PreTrainedModel, notes: Sequence[str] = ()) -> None:
        """This rank works in the present view, and calls `recover` when one of survival.LOST is raised from here on."""
        if self._survival is None:
            raise ConfigError("no coordinator: start the job with moe-launch --on-loss")
        if not self._survival.member.state.get("view"):
            gc.collect()
            gc.freeze()  # what was loaded stays: collecting what a view leaves behind takes milliseconds from here on
        self._survival.member.state["view"] = self.view.number
        self._survival.member.settled(self._survival.entered, notes)

    @property
    def log_dir(self) -> str:
        """Where the launcher of a job with a coordinator keeps its logs."""
        return self._survival.settings.log_dir if self._survival else "."

    def leave(self) -> None:
        """This rank's work is done, and its end is no loss."""
        if self._survival is not None:
            self._survival.member.leave()

    def recover(self, model: PreTrainedModel, error: Exception | None = None) -> bool:
        """Take up the next view: after `error` (one of survival.LOST) the one that the coordinator will announce, else
        one that waits to be taken up (`next_view`). Call `ready` when the caller's own state has followed.

        Ranks are renumbered by their place among the view's, a new transport joins them, and experts that were on lost
        ranks are where --on-loss puts them; a rank that has come holds none yet. Returns False where this rank is not
        in the view: it has been drained, and is done. Raises `error` where the job has no coordinator, ConfigError
        where the user's choice does not let the job go on, MoeRuntimeError where the coordinator ends the job.
        """
        survival = self._survival
        if survival is None:
            raise error or ConfigError("no coordinator: start the job with moe-launch --on-loss")
        if self.joins:
            survival.member.ready()
        while True:
            if error is not None:
                survival.report(self.view.ranks, error)
            notice = survival.next()
            if self.number not in notice.members:
                survival.member.leave()
                return False
            try:
                self._enter(model, notice)
                return True
            except LOST as again:
                error = again

    @property
    def progress(self) -> dict[str, Any] | None:
        """Where layers write what they are doing, for the coordinator's reports (metrics.watch_progress)."""
        return self._survival.member.state if self._survival else None

    def tell(self, metrics: dict[str, Any]) -> None:
        """Have the coordinator show these counters (metrics.collect) from the next beat on."""
        if self._survival is not None:
            self._survival.member.metrics = metrics

    def may_act(self) -> bool:
        """Whether the others cannot have gone on without this rank: asked before writing where they may write. Where
        they can, this process is about to be ended by its agent, or to be heard again."""
        return self._survival is None or self._survival.member.may_act()

    def take_notes(self) -> list[str]:
        """What people should be told of the view that was entered last; once."""
        notes, self._survival.notes = self._survival.notes, []
        return notes

    def next_view(self) -> int:
        """The number of a view that all ranks are to take up together, between two steps; 0 where there is none."""
        newest = self._survival.member.newest if self._survival else None
        return newest.number if newest and newest.at_boundary and newest.number > self._survival.entered else 0

    def spread(self, model: PreTrainedModel, closed: Sequence[int] = ()) -> None:
        """Begin to move experts to ranks that hold none, and off those in `closed` (of the view); nothing where all is
        well or a move is under way. Every rank calls alike, between the same passes. See `rebalance`."""
        rebalancer = self._rebalancer(model)
        wanted = None
        if rebalancer.migration is None:
            spares = self.on_loss == "replica"
            wanted = spread(rebalancer.placement, self.rank_speeds, closed, self._num_slots, spares)
        if wanted is not None:
            rebalancer.begin(wanted)

    def drained(self, position: int) -> None:
        """Tell the coordinator that this rank of the view holds no experts any more."""
        self._survival.member.drained(self.view.ranks[position])

    @property
    def draining(self) -> list[int]:
        """The ranks of the view that are being drained, as far as this rank has heard."""
        told = self._survival.member.draining if self._survival else []
        return [self.view.ranks.index(number) for number in told if number in self.view.ranks]

    def _enter(self, model: PreTrainedModel, notice: Notice) -> None:
        layers = expert_layers(model)
        self.transport.close()
        atexit.unregister(self.transport.close)
        transport = self._survival.build(notice, self.place)
        self.view = View(notice.number, notice.members, self.view.placement)
        self._adopt(transport)
        self._dispatchers.clear()
        found = follow(
            model, self._survival, transport, self._placed_as, self._room(model), self._num_slots, self.rank_speeds
        )
        self._num_slots = found.num_slots
        if found.told:
            self._survival.notes.append(found.told)
            self._notes.append(f"view {notice.number}: {found.told}")
        for layer in layers:
            state = layer.moe_runtime_layer
            state.renormalise, state.passes = self.on_loss == "renormalise", found.passes
            state.expert_dtypes = found.forms
        self._hold(layers, found.placement)
        if found.most_read:
            self._survival.await_readers(found.most_read)
        self._dispatch_by(layers, found.placement)
        rebalancer = getattr(model, "moe_runtime_rebalancer", None)
        if rebalancer is not None:
            rebalancer.follow(transport, self.rank_speeds)
        self.view = View(notice.number, notice.members, found.placement)
        gc.collect()  # errors hold the frames that hold the transport that failed, and that its windows and files

    def _room(self, model: PreTrainedModel) -> int | None:
        """Slots that this rank has memory for, beside what it holds; None where nobody knows.

        By memory_gib of the cluster file, else by what is free now, of which the ranks of a host may take equal parts.
        """
        each = max(1, sum(column.row_bytes for layer in expert_layers(model) for column in columns_of(layer, None)))
        node = self._node()
        if node is not None and node.memory_gib is not None:
            held = sum(p.numel() * p.element_size() for p in model.parameters())
            return max(0, int((node.memory_gib * (1 << 30) - held) // each))
        free = free_bytes(self.device)
        sharers = self.world.local_size if self.device.type == "cpu" else 1
        return None if free is None else int(_USED_OF_FREE * free / sharers // each)

    # ---- uneven work and gradients ------------------------------------------------------------------------------

    @contextmanager
    def join(self, model: PreTrainedModel) -> Iterator[None]:
        """Let ranks run different numbers of forward passes without gradients (generation, evaluation).

        A rank that leaves the block goes on taking part in the others' expert layers, with no tokens of its own,
        until every rank has left. Named after torch.distributed.algorithms.Join. `model.generate` does this itself.
        """
        self._join_depth += 1
        try:
            yield
        finally:
            self._join_depth -= 1
        if self._join_depth == 0 and self.size > 1:
            self._idle_until_all_idle(model)

    def _idle_until_all_idle(self, model: PreTrainedModel) -> None:
        first, *rest = expert_layers(model)
        dispatcher = first.moe_runtime_layer.dispatcher
        nothing = dispatcher.no_rows()
        with torch.no_grad():
            while True:
                first.idle_exchange(nothing)
                if all(state == IDLE for state in first.moe_runtime_layer.states):
                    return
                for layer in rest:
                    layer.idle_exchange(nothing)

    def sync_gradients(self, model: PreTrainedModel) -> None:
        """Sum gradients after backward (gradients.py). A rank's loss must be divided by the tokens of all ranks."""
        expert_dtypes.refuse_8_bits(model, "trained")
        gradients.sync_gradients(model, self.transport)
        rebalancer = getattr(model, "moe_runtime_rebalancer", None)
        if rebalancer is not None and rebalancer.optimizer is not None:
            rebalancer.finish()  # what has travelled is old once the optimizer has stepped

    def clip_grad_norm(self, model: PreTrainedModel, max_norm: float) -> float:
        """Clip by the norm of the whole model's gradients, experts of all ranks included; returns that norm."""
        return gradients.clip_grad_norm(model, self.transport, max_norm)

    def record(self, model: PreTrainedModel, path: str | Path, routing: bool = False) -> Recorder:
        """Record what tokens select, until `stop()` or the end of a with block. Every rank calls alike.

        Writes a load trace (.npz, [passes, L, E] of all ranks), or with `routing` every token's choices
        (experts/traces.py); what `plan` and `simulate` take. Raises ConfigError when `path` cannot be written.
        """
        with self.same_outcome("record"):
            if self.rank == 0 and not Path(path).parent.is_dir():
                raise ConfigError(f"{path}: there is no folder {Path(path).parent}; make it first")
        return Recorder(model, self.transport, path, routing)

    # ---- what runs ----------------------------------------------------------------------------------------------

    def load(self, model: PreTrainedModel, reset: bool = False, by_rank: bool = False) -> np.ndarray:
        """Tokens per expert [L, E] that all ranks' experts have computed since the last reset; or those of each rank,
        [R, L, E]. Every rank calls."""
        layers = [module.moe_runtime_layer for module in expert_layers(model)]
        placement = layers[0].placement
        load = torch.zeros(len(layers), placement.num_experts, dtype=torch.int64)
        for layer in layers:
            load[layer.index] = torch.from_numpy(layer.tokens_per_expert(self.rank))
            if reset:
                layer.tokens_per_slot[:], layer.earlier_tokens = 0, None
        if by_rank:
            return self.transport.all_gather(load, "load").numpy()
        self.transport.all_reduce(load, "load")
        return load.numpy()

    def describe(self) -> str:
        """What runs on this rank and how, in lines of text: launcher, transport, placement, kernels, notes."""
        lines = [
            f"rank {self.rank} of {self.size}, started by {self.world.launcher}, device {self.device}, "
            f"torch {torch.__version__}, {torch.get_num_threads()} threads",
            f"transport: {self.transport.name}, deadline {self.config.timeout_s:g} s",
            native.describe(),
            "expert compute: transformers' experts function"
            if self.config.expert_kernel == "transformers"
            else compute.describe(),
            dense.describe(self._dense_layers),
            "combine: "
            + ("one row per (token, expert)" if self.config.per_expert_sums else "one partial sum per (token, rank)"),
            *self._expert_lines,
        ]
        if self.view.placement is not None:
            counts = np.bincount(self.view.placement.slot_rank, minlength=self.size).tolist()
            if self._early_layers:
                lines.append(f"shared experts: computed while rows travel, in {self._early_layers} layers")
            lines.append(
                f"view {self.view.number}: slots per rank {counts} for {self.view.placement.num_experts} experts"
            )
            if self.view.placement.has_replicas():
                lines.append(f"replica choice: {describe_choice(self.config.replica_choice)}")
        if self._slowdown > 1:
            lines.append(f"emulated speed {1 / self._slowdown:g}: experts wait until they have taken that much longer")
        lines.append(f"place: {self.place.kind}, device {self.device}")
        lines += [*self.transport.describe(), pool.describe()]
        if self.device.type != "cpu":
            lines.append(staging.describe(self.device))
        if self.device.type == "cuda":
            lines.append(cuda.describe())
        for (_, hidden, _, dtype), dispatcher in self._dispatchers.items():
            lines.append(f"dispatch of [T, {hidden}] {dtype}: {dispatcher.describe()}")
            lines += formats.describe(dispatcher.formats, self._claims, dtype)
        for rebalancer in self._rebalancers:
            lines += rebalancer.describe()
        if self._survival is not None:
            lines.append(self._survival.describe())
        for model in self._models:
            lines += describe_lacking([layer.moe_runtime_layer for layer in expert_layers(model)])
        if any(self.transport.waits.count):
            lines.append(f"waited in exchanges of rows for: {self.transport.waits.describe()}")
        return "\n".join(lines + [f"note: {note}" for note in self._notes])

    def close(self) -> None:
        """Leave the world. Other ranks that still wait for this one get PeerLost."""
        self.transport.close()
        atexit.unregister(self.transport.close)
        if self._survival is not None:
            self._survival.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
