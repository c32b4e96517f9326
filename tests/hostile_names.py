"""Names that somebody sends who wants to read what is not meant for him, as hypothesis draws them."""

from hypothesis import strategies as st

_PREFIXES = ["", "/", "./", "../secret/", "{secret}/", "file://{secret}/"]
_PARTS = "secret model 1_Pooling model.safetensors config.json v1".split()
_SEGMENTS = ["", " ", "\n", "\0", ".", "..", "..\\", "%2e%2e", "%2f", "~", "?a=b", "é", *_PARTS]


def hostile_names(secret: object) -> st.SearchStrategy[str]:
    """Some lead to the folder `secret` or into it: by its path, or as a neighbour of the folder they start from."""
    paths = st.lists(st.sampled_from(_SEGMENTS), max_size=6).map("/".join)
    return st.builds(lambda prefix, path: prefix.format(secret=secret) + path, st.sampled_from(_PREFIXES), paths)
