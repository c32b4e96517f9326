"""Evaluation without Ray, for what does not depend on it."""

import contextlib

from gist_ray.encoder import Encoder
from gist_ray.evaluation.pool import LocalPool
from gist_ray.evaluation.unit import scored


@contextlib.contextmanager
def local(model, **settings):
    """`encoder_pool` without Ray, for what does not depend on it."""
    yield LocalPool(Encoder.load(model))


def here(tasks, pool, model, *, retries=0, trained_on=None):
    """`schedule.outcomes` in this process, one after another."""
    for task in tasks:
        try:
            yield task, scored(task, pool, model, trained_on)
        except Exception as error:
            yield task, error
