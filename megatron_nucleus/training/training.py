"""The training loop: batches in, optimizer steps, and everything a run leaves behind.

Every rank runs this same code on its own part of each global batch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_nucleus.core.collectives import on_first_rank
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.optimizer.clip import local_square_sum, scale_gradients
from megatron_nucleus.core.optimizer.optimizer import build_optimizer
from megatron_nucleus.core.optimizer.schedule import build_schedule
from megatron_nucleus.core.parallel_state import ParallelState
from megatron_nucleus.core.parallelize import expert_bytes_exchanged
from megatron_nucleus.data.dataset import Corpus, open_corpus
from megatron_nucleus.data.features import FeatureExtractor
from megatron_nucleus.data.loader import Loader, build_loader, check_draws
from megatron_nucleus.inference.pipeline import Pipeline
from megatron_nucleus.training import flops
from megatron_nucleus.training.arguments import RunConfig, batch_split
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.training.diagnostics import Diagnostics
from megatron_nucleus.training.faults import SkipRule, StopRequest
from megatron_nucleus.training.initialize import (
    Encoders,
    build_encoders,
    build_model,
    initialize,
    run_shape,
)
from megatron_nucleus.training.losses import check_losses
from megatron_nucleus.training.metrics import MetricsWriter, last_loss
from megatron_nucleus.training.out_of_memory import MemoryGuard
from megatron_nucleus.training.previews import check_previews, draw_previews, draw_routing_map
from megatron_nucleus.training.run_folder import (
    log_to_folder,
    open_run_folder,
    record_start,
    save_bucket_report,
)
from megatron_nucleus.training.run_state import (
    check_sampling,
    checkpoint_extra,
    restore,
    sampling_settings,
)
from megatron_nucleus.training.stage_checks import check_tokens
from megatron_nucleus.training.step import forward_backward
from megatron_nucleus.training.step_report import StepLosses, StepReport, share_step
from megatron_nucleus.training.timers import PartTimer, StepTimer
from megatron_nucleus.training.validation import Validator
from megatron_nucleus.training.warm_start import start_from
from megatron_nucleus.training.watchdog.watchdog import Watchdog, watch_ranks
from megatron_nucleus.types import Batch, RawBatch, TrainState
from megatron_nucleus.utils.errors import DataError, StoppedError
from megatron_nucleus.utils.memory import peak_memory_bytes

log = logging.getLogger(__name__)

LONG_PHASE_S = 3600.0  # what loading encoders, a checkpoint on a slow disk or a sheet of previews may take


class TrainResult(NamedTuple):
    """What a finished run reports. loss: of the last step, None where it was not finite (or is not on record)."""

    state: TrainState
    loss: float | None


def train(run: RunConfig) -> TrainResult:
    """Train until ``training.train_steps``; resumes from the newest checkpoint of the run folder.

    A run that is finished already is left as it is and reports its last loss again. With several ranks each calls
    this with the same ``run`` (`initialize`).

    Raises:
        ConfigError, DataError: settings or data that cannot be used, before the first step.
        OutOfMemory: the device is full; says what to change.
        StoppedError: a signal, the time limit or repeated skipped steps; a checkpoint was written in the first two
            cases.
        RankLostError: another rank died, failed or is stuck.
    """
    parallel = initialize(run)
    with (
        watch_ranks(parallel, 60.0 * run.parallel.distributed_timeout_minutes) as watch,
        open_run_folder(run, parallel),
        MemoryGuard(run, parallel) as guard,
    ):
        watch.at(0, "start-up", LONG_PHASE_S)
        # What the data may refuse comes before the model takes its memory, and before the folder says anything.
        corpus = open_corpus(run.data.data_path, run.validation.valid_samples)
        micro_batches = batch_split(run, parallel.world)[1]
        check_draws(
            run.data, corpus, run.curriculum, run.training.global_batch_size, micro_batches, parallel.world
        )
        encoders = build_encoders(run, corpus, parallel.device)
        shape = run_shape(run, encoders.text_dim)
        guard.shape = shape
        check_losses(run.losses, shape.patch_size)
        extractor = FeatureExtractor(encoders.codec, encoders.text_encoder, shape.patch_size, parallel.device)
        check_tokens(run, shape, corpus, extractor.multiple_px)
        check_sampling(run, shape, encoders)
        validator = build_validator(run, corpus, extractor, parallel)
        if validator:
            validator.check()
        model = build_model(run, parallel, encoders)
        pipeline = build_previews(run, model, encoders)
        state = TrainState(model, build_optimizer(model, run.optimizer, run.training.seed))
        with Checkpointer(
            run.training.run_dir / "checkpoints",
            keep_last=run.training.keep_last_checkpoints,
            keep_last_weights=run.training.keep_last_weights,
            control=parallel.control,
            asynchronous=run.training.async_save,
        ) as saver:
            started_from = _begin(state, saver, run, corpus, encoders, parallel)
            if state.step == run.training.train_steps:
                return TrainResult(state, _recorded_loss(run, state, parallel))
            on_first_rank(
                lambda: record_start(run, state, corpus.manifest_hash, started_from), parallel.control
            )
            extra = checkpoint_extra(run, model.shape, encoders, corpus) | {"started_from": started_from}
            with log_to_folder(run, parallel), _open_metrics(run, state, parallel) as writer:
                if state.step == 0:
                    on_first_rank(
                        lambda: save_bucket_report(run, corpus, extractor.multiple_px), parallel.control
                    )
                loop = Loop(
                    run, state, saver, extractor, validator, pipeline, writer, extra, parallel, watch, guard
                )
                return TrainResult(state, loop.run_to_end(corpus))


def _begin(
    state: TrainState,
    saver: Checkpointer,
    run: RunConfig,
    corpus: Corpus,
    encoders: Encoders,
    parallel: ParallelState,
) -> dict | None:
    """Resume, or start, from an earlier run's weights where they are asked for; returns ``started_from``."""
    stored = restore(state, saver, run, corpus)
    if stored is not None:
        return stored.get("started_from")
    return start_from(state, run, encoders, parallel) if run.training.init_from else None


def _recorded_loss(run: RunConfig, state: TrainState, parallel: ParallelState) -> float | None:
    return on_first_rank(lambda: last_loss(run.training.run_dir, state.step), parallel.control)


def _open_metrics(
    run: RunConfig, state: TrainState, parallel: ParallelState
) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    """Rank 0 writes the run's curve."""
    if parallel.rank != 0:
        return contextlib.nullcontext()
    return MetricsWriter(run.training.run_dir, state.step, tensorboard=run.training.tensorboard)


def build_previews(run: RunConfig, model: NucleusTransformer, encoders: Encoders) -> Pipeline | None:
    """What draws the preview pictures, None for a run without; the prompts are checked here."""
    if not run.training.sample_interval:
        return None
    pipeline = Pipeline(model, encoders.codec, encoders.text_encoder, sampling_settings(run))
    check_previews(pipeline, run.training.sample_prompts)
    return pipeline


def build_validator(
    run: RunConfig, corpus: Corpus, extractor: FeatureExtractor, parallel: ParallelState
) -> Validator | None:
    """What computes the loss on held-out images; None where none are held out."""
    if not run.validation.valid_samples:
        return None
    return Validator(
        run.validation,
        corpus,
        extractor,
        resolution_px=run.data.resolution_px,
        bf16=run.training.bf16,
        rank=parallel.rank,
        world=parallel.world,
        control=parallel.control,
    )


class Loop:
    """The parts that one optimizer step needs; built by `train`."""

    def __init__(
        self,
        run: RunConfig,
        state: TrainState,
        saver: Checkpointer,
        extractor: FeatureExtractor,
        validator: Validator | None,
        pipeline: Pipeline | None,
        writer: MetricsWriter | None,
        extra: dict,
        parallel: ParallelState,
        watch: Watchdog,
        guard: MemoryGuard,
    ):
        self.run, self.state, self.saver, self.extractor = run, state, saver, extractor
        self.validator, self.pipeline, self.writer, self.extra = validator, pipeline, writer, extra
        self.parallel, self.watch, self.guard = parallel, watch, guard
        t = run.training
        self.micro_batch_size, self.accumulation = batch_split(run, parallel.world)
        self.schedule = build_schedule(run.schedule, run.optimizer.lr, t.global_batch_size)
        self.skips = SkipRule(t.max_skipped_in_a_row, t.loss_spike_factor)
        self.optimizer_timer = PartTimer(parallel.device)
        self.diagnostics = Diagnostics(
            state.model.shape, parallel.device, t.routing_interval, parallel.control
        )
        dtype = torch.bfloat16 if t.bf16 else torch.float32
        table_peak = flops.device_peak_flops(parallel.device, dtype)
        self.peak_flops = t.peak_tflops * 1e12 if t.peak_tflops else table_peak

    def run_to_end(self, corpus: Corpus) -> float | None:
        """All remaining steps, of which there is one at least; returns the last loss, None if it is not finite."""
        state, t = self.state, self.run.training
        bar = tqdm(
            total=t.train_steps, initial=state.step, unit="step", desc="train", dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file gets a line now and then
            disable=self.parallel.rank != 0,
        )  # fmt: skip
        validator = self.validator
        with StopRequest(t.exit_duration_in_mins) as stop, bar, self.open_loader(corpus) as loader:
            timer = StepTimer()
            while state.step < t.train_steps:
                lr, before = self.schedule(state.samples_seen), state.samples_seen
                report, raw, step_flops = self.train_step(loader, lr, stop)
                timer.add(raw.step_samples, step_flops)
                bar.update()
                last = state.step == t.train_steps
                validation, damage = {}, None
                if validator and (last or self.run.validation.due(before, state.samples_seen)):
                    self.watch.at(state.step, "validation", LONG_PHASE_S)
                    try:
                        validation = validator.run(state.model)
                    except DataError as error:  # on all ranks alike; the step in hand is kept
                        damage = error
                if validation or damage or last or due(state.step, t.log_interval):
                    self.log(report, raw, lr, timer, loader, bar, validation)
                if due(state.step, t.save_interval) or report.stopping or last or damage:
                    self.watch.at(state.step, "checkpoint", LONG_PHASE_S)
                    self.saver.save(state, self.extra)
                if damage:
                    self.saver.wait()
                    again = f" (--train-steps above {state.step} validates again)" if last else ""
                    raise DataError(
                        f"{damage}; step {state.step} is saved, without its validation{again}"
                    ) from damage
                if report.stopping and not last:
                    self.saver.wait()
                    raise StoppedError(
                        f"{self.why_stopping(stop, report)}: saved step {state.step}; the same command resumes it"
                    )
                if due(state.step, t.sample_interval):
                    self.preview()
                timer.exclude_pause()
            self.watch.at(state.step, "checkpoint", LONG_PHASE_S)
            self.saver.wait()
        return report.loss if math.isfinite(report.loss) else None

    def why_stopping(self, stop: StopRequest, report: StepReport) -> str:
        """This rank's own reason, or whose it is."""
        return stop.due() or f"rank {report.stopping[0]} was asked to stop"

    def open_loader(self, corpus: Corpus) -> Loader:
        """This rank's micro-batches from the first sample that has not been seen."""
        t = self.run.training
        return build_loader(
            self.run.data,
            corpus,
            curriculum=self.run.curriculum,
            seed=t.seed,
            global_batch_size=t.global_batch_size,
            accumulation=self.accumulation,
            rank=self.parallel.rank,
            world=self.parallel.world,
            start_samples=self.state.samples_seen,
            multiple_px=self.extractor.multiple_px,
        )

    def train_step(self, loader: Loader, lr: float, stop: StopRequest) -> tuple[StepReport, RawBatch, int]:
        """One optimizer step: `accumulation` micro-batches, one agreement of all ranks, one update or none."""
        state, run = self.state, self.run
        state.model.train()
        state.optimizer.zero_grad()
        self.diagnostics.begin_step(state.step + 1)
        total, step_flops = None, 0
        for number in range(self.accumulation):
            self.watch.at(state.step + 1, "waiting for data")
            raw = next(loader)
            batch = self.extractor.extract(raw)
            self.guard.at(state.step + 1, batch)
            losses = self.forward_backward(batch, last=number == self.accumulation - 1)
            total = losses if total is None else StepLosses(*map(torch.add, total, losses))
            tokens, text_tokens = batch.latents_BSP.shape[1], batch.text.features_BLU.shape[1]
            step_flops += len(batch.draws) * flops.training_flops_per_image(
                state.model.shape, tokens, text_tokens
            )
        self.watch.at(state.step + 1, "sums of the step")
        params = state.optimizer.params.values()
        group = dist.group.WORLD if self.parallel.world > 1 else None
        report = share_step(
            total, local_square_sum(params, state.optimizer.clip_ops), stop.due() is not None, group
        )
        applies = self.skips.applies(report, state)
        if applies:
            self.watch.at(state.step + 1, "optimizer")
            with self.optimizer_timer.measure():
                scale_gradients(params, report.grad_norm, run.optimizer.clip_grad, state.optimizer.clip_ops)
                state.optimizer.step(lr)
        state.step += 1
        state.samples_seen += raw.step_samples
        state.skipped += not applies
        return report, raw, step_flops

    def forward_backward(self, batch: Batch, last: bool) -> StepLosses:
        """One micro-batch; copies of weights on other ranks learn of its gradient with the last one only."""
        model, world = self.state.model, self.parallel.world
        if world > 1:
            model.set_requires_all_reduce(last)
        self.watch.at(self.state.step + 1, "forward and backward")
        share = 1.0 / self.accumulation
        return forward_backward(model, batch, self.run, share, world, self.diagnostics.observe)

    def log(
        self,
        report: StepReport,
        raw: RawBatch,
        lr: float,
        timer: StepTimer,
        loader: Loader,
        bar: tqdm,
        validation: dict,
    ) -> None:
        """One row of metrics.jsonl and TensorBoard, and the progress bar's figures. Every rank calls it."""
        pace, orthogonality = timer.take(), self.state.optimizer.orthogonality
        row = {
            "step": self.state.step,
            "samples_seen": self.state.samples_seen,
            "loss": report.loss,
            "flow_loss": report.flow_loss,
            "router_z_loss": report.router_z_loss,
            "wavelet_loss": report.wavelet_loss,
            "grad_norm": report.grad_norm,
            "lr": lr,
            "step_s": pace.step_s,
            "samples_per_s": pace.samples_per_s,
            "model_tflops_per_device": pace.flops_per_s / 1e12,
            "mfu": pace.flops_per_s / self.peak_flops if self.peak_flops else None,
            "skipped": self.state.skipped,
            "bucket": raw.bucket,
            "peak_memory_bytes": peak_memory_bytes(self.parallel.device),
            "timestamp": time.time(),
            **self.diagnostics.drawn(loader),
            "optimizer_s": self.optimizer_timer.take(),
            "muon_bytes": sum(self.state.optimizer.muon.traffic().values()),
            "router_bytes": orthogonality.traffic() if orthogonality else 0,
            "all_to_all_bytes": expert_bytes_exchanged(self.state.model) // pace.steps,
            "data_s": loader.take_waited_s() / pace.steps,
            **self.diagnostics.row(),
            **validation,
        }
        if self.writer is not None:
            self.writer.write(row)
            self.diagnostics.histograms(self.writer, self.state.step)
        told = f", validation {row['valid_loss']:.4f}" if validation else ""
        bar.set_postfix_str(
            refresh=False, s=f"loss {row['loss']:.4f}{told}, {pace.samples_per_s:.0f} images/s"
        )

    def preview(self) -> None:
        """Draw the preview prompts with the weights as they are, and where the experts look in the first picture.

        Every rank draws, because each holds a part of the weights; rank 0 keeps the pictures.
        """
        t = self.run.training
        self.watch.at(self.state.step, "preview pictures", LONG_PHASE_S)
        folder = t.run_dir / "samples" if self.parallel.rank == 0 else None
        sheet = draw_previews(self.pipeline, t.sample_prompts, folder, self.state.step)
        routing = draw_routing_map(self.pipeline, t.sample_prompts[0])
        if self.writer is not None:
            self.writer.image("samples", sheet, self.state.step)
            if routing is not None:
                self.writer.image("routing", routing, self.state.step)


def due(step: int, interval: int) -> bool:
    """Whether ``step`` falls on ``interval``; 0 means never."""
    return interval > 0 and step % interval == 0
