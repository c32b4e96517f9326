"""The `args:` and the `user_config:` of a Serve config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints, field_validator

from gist_ray.section import Section
from gist_ray.serving_config import ServingConfig


def _named_once(models: Mapping[str, str]) -> Mapping[str, str]:
    if not models:
        raise ValueError("holds no model; give `NAME: FOLDER or Hub id`")
    return models


Name = Annotated[str, StringConstraints(min_length=1)]
ModelPlaces = Annotated[dict[Name, Name], AfterValidator(_named_once)]
"""The name that clients send as `model`, to a model folder on storage that every node sees, or a Hub id. The first one
is for requests that name none."""


class UserConfig(Section):
    """`user_config:` of the deployment `embedder`: what can change while replicas run, without a restart."""

    models: ModelPlaces


class ServeArgs(Section):
    """`args:` of the application. A change of these makes new replicas, which take over one after the other."""

    models: ModelPlaces | None = None
    """None: they are given in the deployment's `user_config`, which is also what counts where both are given."""
    serving: ServingConfig = ServingConfig()
    drain_s: float = Field(default=30.0, ge=0)
    """How long a replica that is told to stop may finish the requests it holds."""
    local_only: bool = False
    """Answer requests from this machine only: behind HAProxy a replica's own port is open on every interface."""
    access_log: bool = False
    """A line per answer in the replica's log: route, status, time, tokens; never a text."""

    @field_validator("serving")
    @classmethod
    def _address_is_not_ours(cls, serving: ServingConfig) -> ServingConfig:
        if address := sorted({"host", "port", "grpc_port"} & serving.model_fields_set):
            raise ValueError(f"{' and '.join(address)} belong in the Serve config's http_options and grpc_options")
        return serving
