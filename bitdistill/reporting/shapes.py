"""What the files of a run hold, as far as the report relies on it: a file of another shape is left out and named.

A shape is a type; a tuple of shapes, one of which is enough; a dict of shapes, whose keys ending in "!" must be there and whose
key "*" stands for all others; or a list: with one shape of any length, with several of exactly these. Every value may be null,
unless its key must be there.
"""

from typing import Any

NUMBER = (int, float)
INTERVAL = [NUMBER, NUMBER]
SCORE = {"score!": NUMBER, "interval": INTERVAL}
LAYERS = {"*": NUMBER}  # what was measured of a layer
SHAPES = {
    "versions.json": {"*": str},
    "evaluate/scores.json": {
        "task": str,
        "metric": str,
        "majority": NUMBER,
        "rows": [
            {"setting!": str, **SCORE, "examples": int, "extra": {"*": (int, float, SCORE)}, "splits": {"*": SCORE}}
        ],
        "paired": [{"a!": str, "b!": str, "difference!": NUMBER, "interval!": INTERVAL}],
    },
    "export/speed.json": {
        "machine": str,
        "rows": [
            {
                "setting!": str,
                "runner": str,
                "linear_bytes": NUMBER,
                "model_bytes": NUMBER,
                "bits_per_weight": NUMBER,
                "model_bits_per_parameter": NUMBER,
                "tokens_per_second": NUMBER,
                "spread": INTERVAL,
            }
        ],
    },
    "export/proof.json": {},
    "done.json": {"steps": int, "seconds": NUMBER},
    "weights.json": {"edges!": [NUMBER], "layers!": {"*": {"counts!": [NUMBER], "weight_scale": NUMBER}}},
    "health": {"learning_rate": NUMBER, "layers!": {"*": LAYERS}},
}


def fits(value: Any, shape: Any) -> bool:
    """Whether a value of a JSON file has a shape.

    Args:
        value: as json.loads gives it. shape: as the module's docstring describes it.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        named = {key.removesuffix("!"): one for key, one in shape.items() if key != "*"}
        needed = [key[:-1] for key in shape if key.endswith("!")]
        rest = shape.get("*")
        return all(value.get(key) is not None for key in needed) and all(
            one is None or (key not in named and rest is None) or fits(one, named.get(key, rest))
            for key, one in value.items()
        )
    if isinstance(shape, list):
        shapes = shape * len(value) if len(shape) == 1 and isinstance(value, list) else shape
        return (
            isinstance(value, list)
            and len(value) == len(shapes)
            and all(fits(one, wanted) for one, wanted in zip(value, shapes, strict=True))
        )
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))


def fits_file(content: Any, name: str) -> bool:
    """Whether a file of a run holds what the report relies on.

    Args:
        content: of the JSON file. name: its path in the run directory.
    """
    last = name.rpartition("/")[2]
    if not fits(content, SHAPES.get(name) or SHAPES.get(last, {})):
        return False
    bins = len(content["edges"]) - 1 if last == "weights.json" else None
    return bins is None or all(len(layer["counts"]) == bins > 0 for layer in content["layers"].values())
