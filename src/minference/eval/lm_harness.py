"""lm-eval's model `minference`: its own `hf` model, attached, so that its tasks run with methods.

    lm_eval run --model minference --model_args pretrained=ID,method=a_shape:local=1024 --tasks ...

Releases of lm-eval that read entry points find it by name; with older ones (0.4.13) the same
command line is `python -m minference.eval.lm_harness run ...`.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from minference.eval.scoring import SERVE_ALL
from minference.integrations.transformers import attach
from minference.integrations.transformers.load import default_dtype
from minference.methods.spec import build_method, parse_method
from minference.ops._dispatch import default_device


@register_model("minference")
class SparseLM(HFLM):
    """`HFLM` whose model prefills with a method, however short the prompt.

    Attributes:
        handle: the attached model.
        densities: mean density over layers of every prefill so far, in the order they were run.
    """

    def __init__(self, pretrained: Any, method: str = "minference", **options: Any) -> None:  # noqa: ANN401
        """Loads the model as `HFLM` does, and attaches it.

        Args:
            pretrained: hub id, path or a loaded model.
            method: `name:key=value;key=value`; semicolons, since lm-eval splits at commas.
            **options: what `HFLM` takes.
        """
        spec = parse_method(method.replace(";", ","))
        if isinstance(pretrained, str):
            options["device"] = options.get("device") or default_device().type
            options.setdefault("dtype", default_dtype(options["device"]))
        super().__init__(pretrained, **options)
        own = build_method(spec, self.model.config)
        self.method_label = spec.label
        self.densities: list[float] = []
        self.handle = attach(
            self.model,
            own,
            min_seq_len=own.min_seq_len or 0,
            dense_from=SERVE_ALL,
            record=True,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results: the method, and the density that it had."""
        count = len(self.densities)
        density = sum(self.densities) / count if count else None
        own = {"minference_method": self.method_label, "minference_density": density}
        return super().get_model_info() | own

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        out = super()._model_generate(*args, **kwargs)
        self._note()
        return out

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        out = super()._model_call(*args, **kwargs)
        self._note()
        return out

    def _note(self) -> None:
        layers = [record["density"] for record in self.handle.records]
        # layers that are not in it have a window or were not asked
        count = self.model.config.get_text_config(decoder=True).num_hidden_layers
        self.densities.append((sum(layers) + count - len(layers)) / count)


def main() -> None:
    """lm-eval's own command line, with the model `minference` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
