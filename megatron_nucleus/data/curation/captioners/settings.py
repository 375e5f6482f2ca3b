"""Which captioner runs, and within which limits of time, rate and money."""

from __future__ import annotations

import dataclasses
import math
import urllib.parse
from typing import ClassVar

from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError, nearest

KINDS = ("none", "http", "transformers")
_ONLY_FOR = {"endpoint": "http", "api_key_env": "http", "device": "transformers"}


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Who writes captions."""

    # Knobs that decide where, how fast and at what risk the work is done, not what comes out of it.
    EXECUTION: ClassVar[tuple[str, ...]] = (
        *("endpoint", "api_key_env", "timeout_s", "max_retries", "backoff_s", "concurrency", "max_cost"),
        *("requests_per_minute", "tokens_per_minute", "cache_dir"),
    )

    captioner: str = knob(
        "none", "none, http (a server), transformers (a model in this process), or FILE.py:CLASS of your own"
    )
    model: str | None = knob(None, "name at the endpoint; local folder or hub id for transformers")
    model_revision: str | None = knob(
        None,
        "stored with every caption: a hub model's commit, or your name for what a server runs; not for a folder",
    )
    image_side_px: int = knob(768, "longest side of the picture as the captioner sees it", unit="px")
    max_new_tokens: int = knob(400, "longest answer; one that is cut off there is no caption", unit="tokens")
    endpoint: str | None = knob(None, "base URL of an OpenAI-compatible server, such as http://host:8000/v1")
    api_key_env: str | None = knob(None, "name of the environment variable that holds the key; None: no key")
    temperature: float | None = knob(0.0, "0 asks for the likeliest words; None: do not send it (http)")
    max_tokens_key: str = knob(
        "max_tokens",
        "what the server calls the longest answer (http)",
        choices=("max_tokens", "max_completion_tokens"),
    )
    timeout_s: float = knob(120.0, "longest wait for one answer (http)", unit="s")
    max_retries: int = knob(5, "how often a request that failed for a passing reason is sent again (http)")
    backoff_s: float = knob(1.0, "wait before the first repeat; doubles, with jitter, up to 60 s", unit="s")
    concurrency: int = knob(8, "requests in flight per worker (http)")
    requests_per_minute: float | None = knob(
        None, "limit for all workers that share cache_dir", unit="requests/min"
    )
    tokens_per_minute: float | None = knob(
        None, "limit for all workers that share cache_dir", unit="tokens/min"
    )
    price_in: float = knob(0.0, "price of a million input tokens, in any currency")
    price_out: float = knob(0.0, "price of a million output tokens, in the same currency")
    max_cost: float | None = knob(
        None, "stop when all runs that share cache_dir have cost this much; requests in flight still finish"
    )
    cache_dir: str | None = knob(
        None, "folder where workers keep answers, pace and spending; no answer is paid for twice"
    )
    device: str = knob("auto", "where the model runs: auto, cpu or cuda (transformers)")
    dtype: str = knob(
        "auto",
        "precision; auto: float32 on a CPU, else bfloat16 (transformers)",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    captioner_batch: int = knob(8, "pictures the model sees at a time (transformers)")

    def __post_init__(self) -> None:
        self._check_kind()
        self._check_ranges()
        if self.endpoint is not None:
            _check_endpoint(self.endpoint)
        shared = ("requests_per_minute", "tokens_per_minute", "max_cost")
        for name in shared:
            if getattr(self, name) is not None and self.cache_dir is None:
                raise ConfigError(
                    f"{name} is a limit for all workers together: set cache_dir, the folder where they count"
                )
        if self.max_cost is not None and not (self.price_in or self.price_out):
            raise ConfigError(
                f"max_cost {self.max_cost:g}: give price_in and price_out, or nothing costs anything"
            )

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """Price of an answer, in the currency of the prices."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def _check_kind(self) -> None:
        kind = self.captioner
        if kind not in KINDS and ".py:" not in kind:
            raise ConfigError(
                f"captioner {kind}: one of {', '.join(KINDS)}, or FILE.py:CLASS{nearest(kind, KINDS)}"
            )
        needed = {"http": ("endpoint", "model"), "transformers": ("model",)}.get(kind, ())
        for name in needed:
            if not getattr(self, name):
                raise ConfigError(f"captioner {kind} needs {name}")
        if kind in KINDS:
            default = {f.name: f.default for f in dataclasses.fields(CaptionerConfig)}
            for name, owner in _ONLY_FOR.items():
                if owner != kind and getattr(self, name) != default[name]:
                    raise ConfigError(
                        f"{name} is for captioner {owner}, not {kind}; remove it or change captioner"
                    )

    def _check_ranges(self) -> None:
        for name, least in (("image_side_px", 32), ("max_new_tokens", 1), ("max_retries", 0), ("concurrency", 1),
                            ("captioner_batch", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)}: at least {least}")
        positive = ("timeout_s", "backoff_s", "requests_per_minute", "tokens_per_minute", "max_cost")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name} {value}: more than 0")
        for name in ("price_in", "price_out", "temperature"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf):
                raise ConfigError(f"{name} {value}: 0 or more")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"device {self.device}: auto, cpu or cuda{nearest(self.device, ('auto', 'cpu', 'cuda'))}"
            )


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urllib.parse.urlsplit(endpoint)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ConfigError("endpoint: not a URL; give one such as http://host:8000/v1") from None
    # A key in the URL would reach configurations, logs and reports, so such a URL is not repeated here either.
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "endpoint: a URL without user, password, query or fragment; the key goes into api_key_env"
        )
    if not whole:
        raise ConfigError(f"endpoint {endpoint}: give a URL such as http://host:8000/v1")
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise ConfigError(f"endpoint {endpoint}: give it without /chat/completions, which is added")
