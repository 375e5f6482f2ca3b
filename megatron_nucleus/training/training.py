"""The training loop: batches in, optimizer steps, and everything a run leaves behind."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_nucleus.core import flow
from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.optimizer.clip import ClipReport, clip_gradients
from megatron_nucleus.core.optimizer.optimizer import build_optimizer
from megatron_nucleus.core.optimizer.schedule import build_schedule
from megatron_nucleus.data.dataset import Corpus, open_corpus
from megatron_nucleus.data.features import FeatureExtractor
from megatron_nucleus.data.loader import Loader, build_loader
from megatron_nucleus.inference.pipeline import Pipeline
from megatron_nucleus.training import flops
from megatron_nucleus.training.arguments import RunConfig
from megatron_nucleus.training.checkpointing import Checkpointer
from megatron_nucleus.training.faults import SkipCounter, StopRequest
from megatron_nucleus.training.initialize import (
    Encoders,
    build_encoders,
    build_model,
    initialize,
    open_run_folder,
    save_config,
)
from megatron_nucleus.training.losses import flow_loss, router_z_loss
from megatron_nucleus.training.metrics import MetricsWriter, last_loss
from megatron_nucleus.training.previews import check_previews, draw_previews, draw_routing_map
from megatron_nucleus.training.run_state import (
    check_sampling,
    checkpoint_extra,
    restore,
    sampling_settings,
)
from megatron_nucleus.types import Batch, TrainState
from megatron_nucleus.utils.errors import StoppedError
from megatron_nucleus.utils.memory import peak_memory_bytes

log = logging.getLogger(__name__)


class StepLosses(NamedTuple):
    """Means over the global batch: fp32 scalar tensors, detached."""

    loss: Tensor
    flow_loss: Tensor
    router_z_loss: Tensor


class TrainResult(NamedTuple):
    """What a finished run reports. loss: of the last step, None where it was not finite (or is not on record)."""

    state: TrainState
    loss: float | None


def train(run: RunConfig) -> TrainResult:
    """Train until ``training.train_steps``; resumes from the newest checkpoint of the run folder.

    A run that is finished already is left as it is and reports its last loss again.

    Raises:
        ConfigError, DataError: settings or data that cannot be used, before the first step.
        StoppedError: a signal, the time limit or repeated non-finite gradients; a checkpoint was written in the
            first two cases.
    """
    device = initialize(run)
    with open_run_folder(run):
        corpus = open_corpus(run.data.data_path)
        encoders = build_encoders(run, corpus, device)
        model = build_model(run, device, encoders)
        pipeline = build_previews(run, model, encoders)
        state = TrainState(model, build_optimizer(model, run.optimizer))
        saver = Checkpointer(
            run.training.run_dir / "checkpoints", keep_last=run.training.keep_last_checkpoints
        )
        restore(state, saver, run, corpus)
        save_config(run)
        if state.step == run.training.train_steps:
            return TrainResult(state, last_loss(run.training.run_dir, state.step))
        extractor = FeatureExtractor(encoders.codec, encoders.text_encoder, model.shape.patch_size, device)
        extra = checkpoint_extra(run, model.shape, encoders, corpus)
        with MetricsWriter(run.training.run_dir, state.step, tensorboard=run.training.tensorboard) as writer:
            loop = Loop(run, state, saver, extractor, pipeline, writer, extra, device)
            return TrainResult(state, loop.run_to_end(corpus))


def build_previews(run: RunConfig, model: NucleusTransformer, encoders: Encoders) -> Pipeline | None:
    """What draws the preview pictures, None for a run without; settings and prompts are checked here."""
    check_sampling(run, model.shape, encoders)
    if not run.training.sample_interval:
        return None
    pipeline = Pipeline(model, encoders.codec, encoders.text_encoder, sampling_settings(run))
    check_previews(pipeline, run.training.sample_prompts)
    return pipeline


class Loop:
    """The parts that one optimizer step needs; built by `train`."""

    def __init__(self, run, state, saver, extractor, pipeline, writer: MetricsWriter, extra: dict, device):
        self.run, self.state, self.saver, self.extractor = run, state, saver, extractor
        self.pipeline, self.writer, self.extra, self.device = pipeline, writer, extra, device
        t = run.training
        self.schedule = build_schedule(run.schedule, run.optimizer.lr, t.global_batch_size)
        self.skips = SkipCounter(t.max_skipped_in_a_row)
        table_peak = flops.device_peak_flops(device, torch.bfloat16 if t.bf16 else torch.float32)
        self.peak_flops = t.peak_tflops * 1e12 if t.peak_tflops else table_peak

    def run_to_end(self, corpus: Corpus) -> float | None:
        """All remaining steps, of which there is one at least; returns the last loss, None if it is not finite."""
        state, t = self.state, self.run.training
        bar = tqdm(
            total=t.train_steps, initial=state.step, unit="step", desc="train", dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file gets a line now and then
        )  # fmt: skip
        with StopRequest(t.exit_duration_in_mins) as stop, bar, self.open_loader(corpus) as loader:
            timer = StepTimer()
            while state.step < t.train_steps:
                lr = self.schedule(state.samples_seen)
                losses, report, batch, step_flops = self.train_step(loader, lr)
                timer.add(t.global_batch_size, step_flops)
                bar.update()
                if due(state.step, t.log_interval) or state.step == t.train_steps:
                    self.log(losses, report, batch, lr, timer, loader, bar)
                reason = stop.due()
                if due(state.step, t.save_interval) or reason or state.step == t.train_steps:
                    self.saver.save(state, self.extra)
                if reason and state.step < t.train_steps:
                    raise StoppedError(f"{reason}: saved step {state.step}; the same command resumes it")
                if due(state.step, t.sample_interval):
                    self.preview()
                timer.exclude_pause()
        loss = float(losses.loss)
        return loss if math.isfinite(loss) else None

    def open_loader(self, corpus: Corpus) -> Loader:
        """Micro-batches from the first sample that has not been seen."""
        t, codec = self.run.training, self.extractor.codec
        return build_loader(
            self.run.data,
            corpus,
            seed=t.seed,
            global_batch_size=t.global_batch_size,
            micro_batch_size=self.run.micro_batch_size,
            start_samples=self.state.samples_seen,
            multiple_px=codec.stride_px * self.extractor.patch_size if codec else 1,  # 1: stored at its size
        )

    def train_step(self, loader: Loader, lr: float) -> tuple[StepLosses, ClipReport, Batch, int]:
        """One optimizer step over ``accumulation_steps`` micro-batches."""
        state, run = self.state, self.run
        state.model.train()
        state.optimizer.zero_grad()
        total, step_flops = None, 0
        for _ in range(run.accumulation_steps):
            batch = self.extractor.extract(next(loader))
            losses = forward_backward(state.model, batch, run, 1.0 / run.accumulation_steps)
            total = (
                losses if total is None else StepLosses(*(a + b for a, b in zip(total, losses, strict=True)))
            )
            tokens, text_tokens = batch.latents_BSP.shape[1], batch.text.features_BLU.shape[1]
            step_flops += len(batch.draws) * flops.training_flops_per_image(
                state.model.shape, tokens, text_tokens
            )
        report = clip_gradients(state.optimizer.params.values(), run.optimizer.clip_grad)
        finite = bool(report.finite & torch.isfinite(total.loss))
        if finite:
            state.optimizer.step(lr)
        state.step += 1
        state.samples_seen += run.training.global_batch_size
        state.skipped += not finite
        self.skips.record(not finite, state.step)
        return total, report, batch, step_flops

    def log(
        self,
        losses: StepLosses,
        report: ClipReport,
        batch: Batch,
        lr: float,
        timer: StepTimer,
        loader: Loader,
        bar: tqdm,
    ) -> None:
        """One row of metrics.jsonl and TensorBoard, and the progress bar's figures."""
        step_s, samples_per_s, flops_per_s = timer.take()
        row = {
            "step": self.state.step,
            "samples_seen": self.state.samples_seen,
            "loss": float(losses.loss),
            "flow_loss": float(losses.flow_loss),
            "router_z_loss": float(losses.router_z_loss),
            "grad_norm": float(report.norm),
            "lr": lr,
            "step_s": step_s,
            "samples_per_s": samples_per_s,
            "model_tflops_per_device": flops_per_s / 1e12,
            "mfu": flops_per_s / self.peak_flops if self.peak_flops else None,
            "skipped": self.state.skipped,
            "bucket": batch.bucket,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "timestamp": time.time(),
            "substituted": loader.substituted,
        }
        self.writer.write(row)
        bar.set_postfix_str(refresh=False, s=f"loss {row['loss']:.4f}, {samples_per_s:.0f} images/s")

    def preview(self) -> None:
        """Draw the preview prompts with the weights as they are, and where the experts look in the first picture."""
        t = self.run.training
        sheet = draw_previews(self.pipeline, t.sample_prompts, t.run_dir / "samples", self.state.step)
        self.writer.image("samples", sheet, self.state.step)
        routing = draw_routing_map(self.pipeline, t.sample_prompts[0])
        if routing is not None:
            self.writer.image("routing", routing, self.state.step)


def forward_backward(model: NucleusTransformer, batch: Batch, run: RunConfig, share: float) -> StepLosses:
    """Add one micro-batch's gradient; returns its losses times ``share`` (its part of the global batch).

    Noise and noise level of a sample depend on (seed, draw) alone.
    """
    clean_BSP = batch.latents_BSP
    seed, device = run.training.seed, clean_BSP.device
    noise_BSP = flow.sample_noise(seed, batch.draws, tuple(clean_BSP.shape[1:])).to(device, non_blocking=True)
    sigma_B = flow.sample_sigma(run.flow, seed, batch.draws, clean_BSP.shape[1]).to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=run.training.bf16):
        noisy_BSP = flow.add_noise(clean_BSP, noise_BSP, sigma_B)
        velocity_BSP, routings = model(noisy_BSP, sigma_B, batch.text, batch.grid, return_routing=True)
    flow_part = flow_loss(velocity_BSP, flow.velocity_target(clean_BSP, noise_BSP))
    z_part = router_z_loss(routings)
    loss = flow_part + run.losses.moe_z_loss_coeff * z_part
    (loss * share).backward()
    return StepLosses(*(share * x.detach() for x in (loss, flow_part, z_part)))


def due(step: int, interval: int) -> bool:
    """Whether ``step`` falls on ``interval``; 0 means never."""
    return interval > 0 and step % interval == 0


class StepTimer:
    """Mean step time between two log rows, without the pauses for saving and previews."""

    def __init__(self):
        self._reset()
        self._mark = time.perf_counter()

    def add(self, samples: int, step_flops: int) -> None:
        """Count one step that ends now."""
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now
        self._steps += 1
        self._samples += samples
        self._flops += step_flops

    def exclude_pause(self) -> None:
        """What happened since the last `add` was no training."""
        self._mark = time.perf_counter()

    def take(self) -> tuple[float, float, float]:
        """(seconds per step, samples per second, FLOP/s) since the last call."""
        out = (self._seconds / self._steps, self._samples / self._seconds, self._flops / self._seconds)
        self._reset()
        return out

    def _reset(self) -> None:
        self._seconds, self._steps, self._samples, self._flops = 0.0, 0, 0, 0
