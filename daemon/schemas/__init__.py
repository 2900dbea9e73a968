"""The JSON Schemas (2020-12) of all payloads, for subscribers: one file each, named as in `inspectd.NAME/1`.

They demand every key that a payload has and forbid none, since a version may gain some.
"""

from importlib.resources import files

_SUFFIX = ".json"


def names() -> list[str]:
    """The names of all schemas, in their order."""
    return sorted(file.name.removesuffix(_SUFFIX) for file in files(__name__).iterdir() if file.name.endswith(_SUFFIX))


def read(name: str) -> str:
    """The text of one schema.

    Raises:
        KeyError: there is none of this name.
    """
    if name not in names():
        raise KeyError(name)
    return (files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
