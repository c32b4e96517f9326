import inspect
from pathlib import Path

import gist_ray


def test_the_public_surface_is_frozen():
    assert gist_ray.__all__ == sorted(gist_ray.__all__) == dir(gist_ray)
    for name in gist_ray.__all__:
        value = getattr(gist_ray, name)
        assert inspect.isclass(value) or inspect.isfunction(value), name
        assert value.__doc__
    assert set(gist_ray.__all__) == set(gist_ray._HOMES)


def test_no_module_hides_a_verb():
    """`gist_ray.export` must stay the function, whichever modules have been imported."""
    modules = {entry.stem for entry in Path(gist_ray.__file__).parent.iterdir()}
    assert not modules & set(gist_ray.__all__)
