"""Forms of `quantize` that are asked for by name, and that keep float arithmetic: which passes make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from graphopt import spec
from graphopt.optimizer import DEFAULT_OPSET

BLOCKS_OPSET = 21
"""DequantizeLinear takes blocks and 4 bits from here on."""

BLOCKS = (0, 16, 32, 64, 128)
"""Weights that may share a scale in weight-only forms; 0 is a scale per channel."""

WEIGHT_ONLY: Mapping[str, spec.PassStep] = {
    "int8": spec.PassStep("quantize-weights", {"bits": 8}),
    "int4": spec.PassStep("quantize-weights", {"bits": 4, "block": 32}),
    "nf4": spec.PassStep("compress-weights", {"levels": "nf4", "bits": 4}),
    "codebook": spec.PassStep("compress-weights", {"levels": "kmeans"}),
}
"""Forms that keep float arithmetic: what makes them."""


@dataclass(frozen=True)
class NamedForm:
    """A form that is asked for by name: what reports call it, the opset it needs, and its passes, its own first."""

    name: str
    opset: int
    steps: tuple[spec.PassStep, ...]

    @classmethod
    def of(cls, weight_only: str | None, block: int | None, *, sampled: bool) -> NamedForm:
        """Return a weight-only form; with None, weights of 16 bits.  `sampled`: whether GPTQ has something to go by."""
        if weight_only is None:
            return cls("weight-only fp16", DEFAULT_OPSET, (spec.PassStep("store-fp16"),))
        step = WEIGHT_ONLY[weight_only]
        options = dict(step.options)
        if block is not None:
            options["block"] = block
        if sampled and step.name == "quantize-weights" and options["bits"] < 8:
            options["method"] = "gptq"
        steps = (spec.PassStep(step.name, options), spec.PassStep("eliminate-dead"))
        return cls(f"weight-only {weight_only}", BLOCKS_OPSET, steps)

    def smaller(self) -> NamedForm:
        """Return the form with all other weights in 16 bits."""
        rest = spec.PassStep("store-fp16")
        return self if rest in self.steps else replace(self, name=f"{self.name} and fp16", steps=(*self.steps, rest))


HALF = NamedForm("fp16", DEFAULT_OPSET, (spec.PassStep("convert-fp16"), spec.PassStep("eliminate-dead")))
"""Arithmetic of 16 bits, for providers that gain by it."""
