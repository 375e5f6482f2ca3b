"""`QwenImageVae`: the published model's VAE, through diffusers."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_nucleus.data.encoders.dct import check_stride
from megatron_nucleus.data.encoders.model_folder import (
    dtype_named,
    first_line,
    import_library,
    locate,
    model_folder,
    weight_files,
)
from megatron_nucleus.utils.errors import DataError


class QwenImageVae:
    """Qwen-Image's VAE (`AutoencoderKLQwenImage`) on single images: stride 8, 16 channels.

    Latents are (z - mean) / std per channel with the config's constants, which the pipeline inverts before it
    decodes. ``encode`` takes the mode of the posterior, so equal pixels give equal latents in every epoch.

    Args:
        path: folder of the VAE or of a diffusers pipeline, or a hub id ``owner/name[@revision]``.
        tiling: work in overlapping 256 px tiles: less memory for large images, slightly other values.
        dtype: float32, bfloat16 or float16, of the network; latents are always fp32.

    Raises:
        ConfigError: no path, no such folder or hub id, or diffusers is not installed.
        DataError: the folder lacks a file, holds another model, or its weights are damaged.
    """

    name = "qwen_image_vae"

    def __init__(
        self,
        path: str | None,
        tiling: bool = False,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
    ):
        root = locate(path, "codec_path", _ALLOW, _IGNORE)
        folder = model_folder(root, "vae", "_class_name", "AutoencoderKLQwenImage")
        weight_files(folder, "diffusion_pytorch_model")
        diffusers = import_library("diffusers", "encoders.latent_codec = qwen_image_vae")
        self.path, self.tiling, self.dtype = str(path), tiling, dtype
        self.device = torch.device(device)
        try:
            vae, found = diffusers.AutoencoderKLQwenImage.from_pretrained(
                folder,
                torch_dtype=dtype_named(dtype),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{folder}: cannot load the VAE ({first_line(error)}); copy it again") from error
        if found["missing_keys"]:  # diffusers only warns, and leaves such tensors random
            raise DataError(f"{folder}: the weights lack {found['missing_keys'][0]}; copy them again")
        self._vae = vae.to(self.device).eval().requires_grad_(False)
        if tiling:
            self._vae.enable_tiling()
        self.channels = int(vae.config.z_dim)
        self.stride_px = 2 ** len(vae.config.temperal_downsample)  # spelled so upstream
        shape = (1, self.channels, 1, 1)
        self._mean_1C11 = torch.tensor(vae.config.latents_mean, device=self.device).view(shape)
        self._std_1C11 = torch.tensor(vae.config.latents_std, device=self.device).view(shape)

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] -> normalised latents fp32 [B, channels, H/8, W/8].

        Raises:
            ConfigError: H or W is not a multiple of the stride.
        """
        check_stride(pixels_BCHW, self.stride_px)
        x_BCHW = pixels_BCHW.to(self.device).float() / 127.5 - 1.0
        x_BCTHW = x_BCHW[:, :, None].to(self._vae.dtype)
        z_BCHW = self._vae.encode(x_BCTHW).latent_dist.mode()[:, :, 0].float()
        return (z_BCHW - self._mean_1C11) / self._std_1C11

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents -> uint8 RGB, rounded; values outside the displayable range clip to 0..255."""
        z_BCHW = latents_BCHW.to(self.device).float() * self._std_1C11 + self._mean_1C11
        x_BCHW = self._vae.decode(z_BCHW[:, :, None].to(self._vae.dtype)).sample[:, :, 0].float()
        return ((x_BCHW + 1.0) * 127.5).round_().clamp_(0, 255).to(torch.uint8)

    def spec(self) -> dict:
        """JSON description that rebuilds this codec where ``path`` can be read."""
        return {"name": self.name, "path": self.path, "tiling": self.tiling, "dtype": self.dtype}


_ALLOW = ("vae/*", "*.json", "*.safetensors")
_IGNORE = ("transformer/*", "text_encoder/*", "unet/*")
