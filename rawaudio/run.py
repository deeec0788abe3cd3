"""A training run: what its settings stand for, made ready or gone on with.

`with Run(cfg, command) as run:` has the data, the model, its average and optimizer, and where the
run is; train.py's loop moves it on, step by step.
"""

import contextlib
import copy
import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cauchy_kernel import NotFinite
from rawaudio import processes, resume, tbptt
from rawaudio.batches import Batch, GainSpeed, prefetched
from rawaudio.checkpoint import load_model, save_checkpoint
from rawaudio.config import to_dict, usable_device
from rawaudio.data import ClipDataset, find_conditions, read_csv
from rawaudio.errors import CheckpointError, UserError
from rawaudio.families import FAMILIES, family_of
from rawaudio.family import Family
from rawaudio.files import FORMAT
from rawaudio.logbook import Clock, Logbook, environment, terminal_bar
from rawaudio.model import Model
from rawaudio.optimizers import go_on, make_optimizer
from rawaudio.processes import gathered, rank, summed, world
from rawaudio.quantizers import quantizer
from rawaudio.seeds import seed_of, seeded
from rawaudio.signals import Signals
from rawaudio.tbptt import Carried, pieces


class Run:
    """Sets everything up, in this order: processes, state to go on from, data, model, log."""

    def __init__(self, cfg: Any, command: str):
        self.cfg, self.command, self.signals = cfg, command, Signals()
        self.part = cfg.batch_size // (world() * cfg.accumulate)  # clips computed at once
        if self.part * world() * cfg.accumulate != cfg.batch_size:
            raise UserError(
                f"batch_size={cfg.batch_size}: must be divisible by accumulate={cfg.accumulate} x "
                f"{world()} processes (torchrun --nproc_per_node x --nnodes)"
            )
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.device = own_device(cfg.device)
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            torch.set_float32_matmul_precision("high")  # TF32
        self.folder = Path(cfg.checkpoint_path)
        if cfg.resume == "never" and (self.folder / "last.pt").exists():
            raise UserError(
                f"{self.folder} holds a run: leave resume=never out, or choose another folder"
            )
        if cfg.conditions:
            clips = read_csv(cfg.train_csv, cfg.data_root)
            values, counts = find_conditions(clips, cfg.conditions, cfg.train_csv)
            cfg.model = dataclasses.replace(cfg.model, conditions=values, condition_counts=counts)
        family = next(family for family in FAMILIES.values() if family.config is type(cfg.model))
        last, self.source = resume.find(self.folder, cfg.resume_checkpoint, cfg.model) or (None, "")
        if cfg.tbptt:
            tbptt.check(cfg.tbptt, family.module, cfg.compile)
        init = read_init(cfg) if cfg.init_from and last is None else None
        processes.join("nccl" if self.on_gpu else "gloo")
        self.seq_len = cfg.seq_len or cfg.model.training_length
        self.task = family.task(cfg.model, self.seq_len)
        if last is not None and cfg.conditions:  # in the order of the run's embeddings
            cfg.model.conditions = last["config"]["conditions"]
            cfg.model.condition_counts = last["config"]["condition_counts"]
        self._load_data()
        self._make_model(family, init)
        if last is not None:
            self._go_on(last)
        self.stepped = {name: self._stepped(net) for name, net in self.networks.items()}
        if summed([self.position.step], self.device)[0] != world() * self.position.step:
            raise UserError(
                f"checkpoint_path={self.folder}: processes see different states; it must be on a "
                "disk that all machines share"
            )
        self._open_log(going_on=last is not None)

    def __enter__(self) -> "Run":
        self.signals.__enter__()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.signals.__exit__()
        if self.book:
            self.book.close()
        if kind is NotFinite:
            said = "the last step has made S4's parameters too large"
            raise UserError(f"step {self.position.step:,}: {said}. {self.remedy}") from None

    @property
    def remedy(self) -> str:
        """What to do about numbers that are not finite."""
        return f"Lower start_lr or set grad_clip; the last good state is {self.folder / 'last.pt'}"

    # ---------------------------------------------------------------- set-up

    def _load_data(self) -> None:
        cfg, rate = self.cfg, self.cfg.model.sample_rate
        options = {"pcm": self.task.pcm, "peak": cfg.peak, "sample_len": cfg.sample_len,
                   "cache": cfg.cache, "progress": rank() == 0,
                   "quantizer": getattr(cfg.model, "quantizer", "mulaw")}  # fmt: skip
        in_turn = world() > 1 and cfg.sample_len  # the first of each machine writes the cache
        if in_turn and processes.local_rank():
            processes.wait()
        self.train_ds = ClipDataset(
            cfg.train_csv, rate, cfg.data_root, cfg.append_silence, **options
        )
        self.valid_ds = ClipDataset(cfg.valid_csv, rate, cfg.data_root, **options)
        if in_turn and not processes.local_rank():
            processes.wait()
        if cfg.conditions:
            for ds in (self.train_ds, self.valid_ds):
                ds.tell(cfg.model.conditions)
        augment = GainSpeed(cfg.gain_db, cfg.speed, cfg.augmented, quantizer(options["quantizer"]))
        self.augment = augment if cfg.gain_db or cfg.speed else None
        size = sum(ds.data.numel() * ds.data.itemsize for ds in (self.train_ds, self.valid_ds))
        self.prefetch = self.on_gpu
        if self.on_gpu and self.train_ds.mapped is None and self.augment is None:
            self.prefetch = size > torch.cuda.mem_get_info(self.device)[0] / 4
        if self.on_gpu and not self.prefetch:  # they fit on the GPU
            self.train_ds = self.train_ds.to(self.device)
            self.valid_ds = self.valid_ds.to(self.device)
        self.order = seeded("order", cfg.seed)
        depends = f"{cfg.batch_size} {self.seq_len} {self.train_ds.lengths.tolist()}"
        if cfg.tbptt:  # carried states are those of the pieces, processes and parts
            depends += f" {cfg.tbptt} {world()} {cfg.accumulate}"
        plan = hashlib.sha256(depends.encode()).hexdigest()[:16]
        self.position = resume.Position(self.order.get_state(), plan=plan)
        self.carried = Carried([])

    def _make_model(self, family: Family, init: Model | None) -> None:
        cfg = self.cfg
        torch.manual_seed(seed_of("weights", cfg.seed))
        self.model = family.module(cfg.model).to(self.device).train()
        if init is not None:
            # what the other has not was made to change nothing: embeddings of conditions are zero
            own = {k: v for k, v in init.state_dict().items() if not k.startswith("told.")}
            self.model.load_state_dict(own, strict=False)
            self.model.told.start_from(init.told)
        if cfg.recompute_tiers:
            if not hasattr(self.model, "backbone"):
                raise UserError(f"recompute_tiers={cfg.recompute_tiers}: this model has no tiers")
            self.model.backbone.recomputed_tiers = cfg.recompute_tiers
        self.networks = self.task.networks(self.model)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = make_optimizer(self.networks, cfg, fused)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False) if cfg.ema else None

    def _stepped(self, network: nn.Module) -> nn.Module:
        """A network as the loop calls it: compiled, and shared by the processes."""
        if self.cfg.compile:
            if len(self.networks) > 1:
                raise UserError(
                    "compile=true: not for losses with second derivatives; leave it out"
                )
            network = torch.compile(network)
        if world() > 1:
            devices = [processes.local_rank()] if self.on_gpu else None
            network = DistributedDataParallel(
                network, devices, gradient_as_bucket_view=True,
                find_unused_parameters=bool(self.cfg.tbptt),  # what makes the first state
            )  # fmt: skip
        return network

    def _go_on(self, last: dict[str, Any]) -> None:
        """Takes over the state of a last.pt."""
        position, plan = self.position, self.position.plan
        self.model.load_state_dict(last["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(last["averaged"] or last["model"])
        self.task.load_state_dict(last["task"])
        go_on(self.optimizer, last["optimizer"], self.cfg.optimizer, self.source)
        position.validated = last["step"]  # of a file that does not say
        vars(position).update({k: last[k] for k in vars(position) if k in last})
        if self.source.parent.resolve() != self.folder.resolve():
            position.origin = str(self.source.resolve())
        if self.source != self.folder / "last.pt":
            position.saved = -1
        if position.plan != plan:
            logging.warning(
                "data or batch_size changed since step %s: a new epoch begins", position.step
            )
            position.plan, position.epoch = plan, position.epoch + 1
            position.batches_done = position.pieces_done = 0
        if position.pieces_done:
            self.carried = Carried(position.carried[rank()])

    def _open_log(self, going_on: bool) -> None:
        cfg, rate, step = self.cfg, self.cfg.model.sample_rate, self.position.step
        self.book = Logbook(self.folder, step) if rank() == 0 else None
        self.bar = terminal_bar() if rank() == 0 else None
        minutes = [len(ds.data) / rate / 60 for ds in (self.train_ds, self.valid_ds)]
        self.facts = environment(self.device) | {
            "processes": f"{world()}, {cfg.accumulate} parts of {self.part} clips each",
            "parameters": f"{sum(p.numel() for p in self.model.parameters()):,}",
            "training": f"{len(self.train_ds):,} clips, {minutes[0]:.1f} minutes, "
            f"{Path(cfg.train_csv).name}",
            "validation": f"{len(self.valid_ds):,} clips, {minutes[1]:.1f} minutes, "
            f"{Path(cfg.valid_csv).name}",
        }
        self.say(
            f"{self.facts['parameters']} parameters on {self.facts['device']}; "
            f"{len(self.train_ds):,} training clips ({minutes[0]:.1f} min), "
            f"{len(self.valid_ds):,} for validation; run folder {self.folder}"
            + (f"; going on from step {step:,}" if going_on else "")
        )
        if rank() == 0 and (line := self.task.comparison(self.valid_ds)):
            self.say(line)
        self.clock = Clock(self.device if self.on_gpu else None)
        self.started = time.monotonic() - self.position.seconds
        self.saved_at = self.position.seconds

    # ---------------------------------------------------------------- on the way

    def say(self, line: str) -> None:
        if rank() == 0:
            print(line if self.bar is None else f"\n{line}", flush=True)

    def progress(self) -> float:
        """0 at the start, 1 where the run ends by its steps or its minutes."""
        cfg, position = self.cfg, self.position
        by_steps = position.step / cfg.max_steps if cfg.max_steps else 0.0
        by_time = position.seconds / 60 / cfg.max_minutes if cfg.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def batches(self) -> Iterator[tuple[Batch, float]]:
        """Batches without end, from where the run is; the samples of each in all processes."""
        position = self.position
        while True:
            self.order.set_state(position.epoch_order)
            batches = self.task.batches(
                self.train_ds,
                self.cfg.batch_size,
                self.order,
                augment=self.augment,
                start=position.batches_done,
                shard=(rank(), world()),
                pad_multiple=self.seq_len if self.cfg.compile else 16,  # one shape: compiled once
            )
            batches = prefetched(batches, pin=True) if self.prefetch else batches
            if self.cfg.tbptt:
                batches = pieces(batches, self.cfg.tbptt, position.pieces_done)
            empty = position.batches_done == 0
            for batch in batches:
                count = summed([float(batch["samples"])], self.device)[0]
                empty = empty and count == 0
                yield batch, count
            if empty:
                raise UserError(f"{self.cfg.train_csv}: no clip of it can be read any more")
            position.epoch, position.batches_done = position.epoch + 1, 0
            position.epoch_order = self.order.get_state()

    def autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.cfg.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def validation_due(self, finished: bool) -> bool:
        due = finished or self.position.step % self.cfg.validation_interval == 0
        return due and self.position.validated != self.position.step

    def save_due(self, ending: bool) -> bool:
        """Whether this process has to save; ending: the run does, for now or for good."""
        cfg, position = self.cfg, self.position
        due = ending or position.step % cfg.checkpoint_interval == 0
        due = due or position.seconds > self.saved_at + 60 * cfg.checkpoint_minutes
        return due and position.saved != position.step

    def validate(self) -> None:
        """Scores the model, keeps the best weights, and writes down what it sounds like."""
        cfg, position, unit = self.cfg, self.position, self.task.unit
        eval_model = (self.averaged or self.model).eval()
        with self.signals.interruptible():
            shard = (rank(), world())
            total = self.task.validate(eval_model, self.valid_ds, cfg.batch_size, shard)
            total, count = summed(list(total), self.device)
            loss = total / count
        is_best = loss < position.best
        position.bad_validations = 0 if is_best else position.bad_validations + 1
        position.best, position.validated = min(loss, position.best), position.step
        if cfg.schedule == "plateau" and position.bad_validations > cfg.plateau_patience:
            position.scale, position.bad_validations = position.scale * cfg.plateau_factor, 0
        if rank():
            return
        self.say(
            f"step {position.step:,}: validation {loss:.4f} {unit}" + (" (best)" if is_best else "")
        )
        spectra = self.book.spectra(position.step, eval_model)
        self.book.numbers(position.step, position.seconds, **{f"valid_{unit}": loss}, **spectra)
        if is_best:
            save_checkpoint(
                self.folder / "best.safetensors",
                eval_model,
                step=position.step,
                data=Path(cfg.train_csv).name,
                command=self.command,
                **{f"valid_{unit}": round(loss, 4)},
            )
        self.book.page(unit, self.task.axis, self.command, self.facts, to_dict(cfg))
        if cfg.n_listen:
            with self.signals.interruptible():
                wavs, names = self.task.listen(eval_model, self.valid_ds, cfg.n_listen)
            self.book.clips(position.step, wavs, cfg.model.sample_rate, names)

    def save(self) -> None:
        """Writes last.pt: all that the run needs to go on."""
        position = self.position
        position.carried = gathered(self.carried.tensors()) if position.pieces_done else []
        self.saved_at = position.seconds
        if rank():
            position.saved = position.step
            return
        content = {
            "format": FORMAT, "kind": family_of(self.model).kind,
            "config": to_dict(self.cfg.model), "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "optimizer": self.optimizer.state_dict(), "task": self.task.state_dict(),
        }  # fmt: skip
        resume.save(self.folder, content, position, self.cfg.keep_last)

    def agree(self, loss: float, count: float) -> tuple[float, int]:
        """What all processes must agree on: the mean loss, the time, and whether to stop."""
        position = self.position
        position.seconds = time.monotonic() - self.started
        stopping = self.signals.last
        if world() > 1:
            mine = [loss, 0.0 if rank() else position.seconds, stopping]
            loss, position.seconds, any_signal = summed(mine, self.device)
            stopping = int(any_signal > 0) and (stopping or 15)  # SIGTERM, to another one
        return loss / max(1, count), stopping

    def set_rates(self) -> None:
        """Learning rates of the next step: warm-up, and the schedule."""
        cfg = self.cfg
        warm = min(
            1.0,
            max(
                (self.position.step + 1) / max(1, cfg.warmup_steps), self.progress() / SHORT_WARM_UP
            ),
        )
        cosine = (1 + math.cos(math.pi * self.progress())) / 2
        anneal = cosine if cfg.schedule == "cosine" else self.position.scale
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * warm * anneal

    @torch.no_grad()
    def average(self) -> None:
        """Moves the averaged weights towards the model's."""
        if self.averaged is not None:
            step = self.position.step + 1  # which this one is
            decay = min(self.cfg.ema, step / (step + 10))  # short memory while all is new
            theirs = list(self.model.parameters())
            torch._foreach_lerp_(list(self.averaged.parameters()), theirs, 1 - decay)
            ours, theirs = (dict(m.named_buffers()) for m in (self.averaged, self.model))
            for name in ours.keys() & theirs.keys():  # such as norms that are measured
                if ours[name].is_floating_point():
                    ours[name].lerp_(theirs[name], 1 - decay)

    def finish(self) -> None:
        """Tells where the time went, and where the weights are."""
        self.say(f"time: {self.clock.shares()}")
        best = self.folder / "best.safetensors"
        if not best.exists() and self.source:  # gone on with in a new folder, nothing better since
            best = self.source.parent / best.name
        kept = f"weights {best}" if best.exists() else "no weights are kept"
        self.say(f"finished: best validation {self.position.best:.4f} {self.task.unit}, {kept}")


SKIPS = 10  # steps in a row without a finite gradient that end the run
SHORT_WARM_UP = 0.05  # of the run: a warm-up is no longer than that


def own_device(name: str | None) -> torch.device:
    """The device of this process: of several on one machine, each has a GPU."""
    if world() > 1 and name in (None, "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(processes.local_rank())
        name = f"cuda:{processes.local_rank()}"
    return usable_device(name)


def read_init(cfg: Any) -> Model:
    """The model that a new run starts from; CheckpointError for one that does not fit."""
    init, name = load_model(cfg.init_from, key="init_from"), f"init_from={cfg.init_from}"
    free = ["conditions"] if init.conditions else ["conditions", "d_condition"]
    if init.conditions and not cfg.conditions:
        names = ",".join(init.conditions)
        raise CheckpointError(
            f"{name}: these weights are used to being told: write conditions=[{names}]"
        )
    kind, theirs = family_of(init).kind, to_dict(init.config)
    resume.check_architecture(name, kind, theirs, cfg.model, free)
    return init


def skip(run: Run, name: str, loss: float, norm: float) -> None:
    """Leaves a step out that has no finite gradient; UserError after too many in a row."""
    position = run.position
    position.skipped += 1
    position.skipped_in_a_row += 1
    step = position.step + 1
    run.say(f"step {step:,}: loss {loss}, gradient norm {norm}: skipped")
    if position.skipped_in_a_row == SKIPS:
        bad = first_bad(run.networks[name])
        steps = f"steps {step + 1 - SKIPS:,} to {step:,}"
        raise UserError(f"{steps}: not finite, first in {bad}. {run.remedy}")


def first_bad(model: nn.Module) -> str:
    """The first parameter that is not finite, or else whose gradient is not."""
    for word in ("", "the gradient of "):
        for name, p in model.named_parameters():
            value = p.grad if word else p
            if value is not None and not value.isfinite().all():
                return f"{word}{name}"
    return "the loss alone"


def norm_of(tensors: list[Tensor]) -> Tensor:
    """The norm of all of them together; they stay as they are, also where it is not finite."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
