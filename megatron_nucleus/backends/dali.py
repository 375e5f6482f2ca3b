"""NVIDIA DALI: a batch of JPEGs decoded, cropped and resized, on the CPU or partly on an NVIDIA GPU (``mixed``).

A pipeline that has met an image it cannot decode raises, and is of no use afterwards: whoever runs it opens another
(`data/decoders.py`). The CPU pipeline needs neither a GPU nor a driver. A child of fork may open pipelines of its own.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from nvidia import dali
from nvidia.dali import fn, types

from megatron_nucleus.backends.recorded import Call, drift

MAX_IMAGES = 32  # of one run; own choice: a larger batch is run in pieces
_MIXED_THREADS = 4  # that parse for the GPU; own choice
# Read in nvidia-dali-cuda130 2.4.0, November 2026. Positions are written as keywords.
CALLS = (
    Call(
        "Pipeline.__init__",
        "self batch_size= num_threads= device_id= seed= exec_pipelined= prefetch_queue_depth= exec_async= "
        "bytes_per_sample= set_affinity= max_streams= default_cuda_stream_priority= *enable_memory_stats= "
        "*enable_checkpointing= *checkpoint= *py_num_workers= *py_start_method= *py_callback_pickler= "
        "*output_dtype= *output_ndim= *output_layout= *exec_dynamic= *experimental_exec_dynamic= *stream_policy= "
        "*concurrency=",
        "batch_size num_threads device_id exec_pipelined prefetch_queue_depth exec_async",
    ),
    Call(
        "Pipeline.feed_input", "self data_node data layout= cuda_stream= use_copy_kernel=", "data_node data"
    ),
    Call(
        "fn.external_source",
        "source= num_outputs= *cycle= *name= *device= *layout= *dtype= *ndim= *cuda_stream= *use_copy_kernel= "
        "*blocking= *batch= *repeat_last= *parallel= *no_copy= *prefetch_queue_depth= *bytes_per_sample_hint= "
        "*batch_info= kwargs",
        "name dtype ndim",
    ),
    Call(
        "fn.decoders.image",
        "input *device= *name= *adjust_orientation= *affine= *bytes_per_sample_hint= *cache_batch_copy= "
        "*cache_debug= *cache_size= *cache_threshold= *cache_type= *device_memory_padding= "
        "*device_memory_padding_jpeg2k= *dtype= *host_memory_padding= *host_memory_padding_jpeg2k= "
        "*hw_decoder_load= *hybrid_huffman_threshold= *jpeg_fancy_upsampling= *output_type= "
        "*preallocate_height_hint= *preallocate_width_hint= *preserve= *use_fast_idct=",
        "input device output_type adjust_orientation jpeg_fancy_upsampling",
    ),
    Call(
        "fn.resize",
        "input *device= *name= *antialias= *bytes_per_sample_hint= *dtype= *interp_type= *mag_filter= *max_size= "
        "*min_filter= *minibatch_size= *mode= *preserve= *resize_longer= *resize_shorter= *resize_x= *resize_y= "
        "*resize_z= *roi_end= *roi_relative= *roi_start= *save_attrs= *size= *subpixel_scale= *temp_buffer_hint=",
        "input size roi_start roi_end interp_type antialias",
    ),
)
_LAST_WORDS = "Current pipeline object is no longer valid."  # of every report, whatever the cause
_opened: weakref.WeakSet[dali.Pipeline] = weakref.WeakSet()
_inherited: list[dali.Pipeline] = []
# A child of fork has none of their threads, for which their destructor would wait for ever: there they are kept.
os.register_at_fork(after_in_child=lambda: _inherited.extend(_opened))


def why_unavailable(device: str) -> str | None:
    """Reason why pipelines cannot run on ``device`` (``cpu`` or ``mixed``), or None."""
    if device == "mixed" and not torch.cuda.is_available():
        return "needs an NVIDIA GPU, none is visible"
    return drift(dali, CALLS)


def current_gpu() -> int:
    """Number of the GPU that this thread computes on."""
    return torch.cuda.current_device()


class JpegPipeline:
    """Up to `MAX_IMAGES` JPEGs at a time, each cut and resized by its own figures. Lanczos with 3 lobes, as Pillow's.

    The EXIF orientation is not looked at: boxes, sizes and results are those of the picture as it is stored.
    """

    def __init__(self, device: str, device_id: int | None = None):
        """device: ``cpu`` or ``mixed``. device_id: number of the GPU, None for ``cpu``.

        One thread decodes on the CPU: loaders have a process for each core already.
        """
        self._pipeline = dali.Pipeline(
            batch_size=MAX_IMAGES,
            num_threads=1 if device == "cpu" else _MIXED_THREADS,
            device_id=device_id,
            exec_pipelined=False,  # a run returns what it was given
            prefetch_queue_depth=1,
            exec_async=False,
        )
        _opened.add(self._pipeline)
        with self._pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start, end, size = (
                fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "end", "size")
            )
            whole = fn.decoders.image(
                encoded,
                device=device,
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # on the GPU too: what libjpeg-turbo does
            )
            fitted = fn.resize(
                whole,
                size=size,
                roi_start=start,
                roi_end=end,
                interp_type=types.INTERP_LANCZOS3,
                antialias=True,
            )
            self._pipeline.set_outputs(fitted)
        self._pipeline.build()

    def run(
        self,
        payloads: Sequence[bytes],
        boxes_px: Sequence[tuple[float, float, float, float]],
        sizes_px: Sequence[tuple[int, int]],
    ) -> list[np.ndarray]:
        """Decode, cut, resize.

        Args:
            payloads: 1 to `MAX_IMAGES` JPEGs. boxes_px: (left, top, right, bottom) to keep of each.
            sizes_px: (width, height) to make of it.

        Returns:
            uint8 RGB [height, width, 3] each.

        Raises:
            RuntimeError: an image cannot be decoded, which one is not told, or no memory is left, in one line. The
                pipeline is lost.
        """
        feeds = {
            "encoded": [np.frombuffer(payload, np.uint8) for payload in payloads],
            "start": [np.array((top, left), np.float32) for left, top, _, _ in boxes_px],
            "end": [np.array((bottom, right), np.float32) for _, _, right, bottom in boxes_px],
            "size": [np.array((height, width), np.float32) for width, height in sizes_px],
        }
        for name, values in feeds.items():
            self._pipeline.feed_input(name, values)
        try:
            (fitted,) = self._pipeline.run()
        except RuntimeError as error:
            raise RuntimeError(_cause(str(error))) from error
        fitted = fitted.as_cpu()
        return [np.array(fitted[i]) for i in range(len(payloads))]


def _cause(report: str) -> str:
    """What DALI's report, which tells where in the pipeline it happened, says of the cause."""
    cause = report.rpartition("encountered:")[2].replace(_LAST_WORDS, "")
    return " ".join(cause.split()).rstrip(" :")
