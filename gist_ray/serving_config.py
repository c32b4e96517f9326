"""The settings of an endpoint: the recipe's `serving` section, and part of a Serve config's `args`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gist_ray.section import Section

Backend = Literal["auto", "torch", "openvino"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]


class ServingConfig(Section):
    """How the model is served."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0: a free port."""
    grpc_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the gRPC route; None: there is none."""
    min_replicas: int = Field(default=1, ge=0)
    """0: the last replica goes when nobody asks, and the next request waits for a new one."""
    max_replicas: int = Field(default=1, ge=1)
    upscale_delay_s: float = Field(default=5.0, ge=0)
    """Seconds that more work than the replicas manage must last before there are more of them."""
    downscale_delay_s: float = Field(default=300.0, ge=0)
    threads: int = Field(default=1, ge=1)
    backend: Backend = "auto"
    """auto: torch on a GPU; on a CPU OpenVINO, where it is installed."""
    precision: Precision = "fp32"
    """bf16 and fp16 on a GPU; int8 on a CPU, of a model that was exported with `--int8`."""
    batch_tokens: int | None = Field(default=None, ge=16)
    """Padded tokens per forward. None: the best of several, measured at the start."""
    cache_mb: int = Field(default=256, ge=0)
    """Memory for the vectors of texts that were asked for lately; 0: each is computed anew."""
    max_queue_tokens: int = Field(default=200_000, ge=16)
    """Queued tokens above which a request is answered 429."""

    @model_validator(mode="after")
    def _replicas_ordered(self) -> ServingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self
