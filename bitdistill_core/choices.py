"""The values that a setting chooses from: for the schema (`config.py`) and for the code that acts on them.

Where that code ends in `assert_never`, mypy names every place that a new value must reach.
"""

from typing import Literal

ModelType = Literal["qwen3", "qwen2", "llama", "mistral", "gemma3_text"]

Precision = Literal["float32", "bfloat16"]
Schedule = Literal["cosine", "linear", "constant", "two_stage"]

Subln = Literal["none", "output", "all"]
SublnGain = Literal["one", "preserve"]
Grid = Literal["ternary", "binary"]
Granularity = Literal["tensor", "row", "block"]
ScaleRule = Literal["absmean", "least_squares"]
Initializer = Literal["none", "gptq", "awq"]

ChannelWeights = Literal["none", "next_norm"]
LossVariant = Literal["paper", "authors"]

Encoding = Literal["2bit", "base3"]
