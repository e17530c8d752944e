"""A plugin of vLLM: mmgraft's grafts beside the base that they were made for.

A folder comes from ``mmgraft export --to vllm``. Rows with an image run the workflow that their
request names, all others the base unless the request asks for the workflow in any case.
"""

from __future__ import annotations

TESTED = ("0.32.0", "0.33")
"""The first release of vLLM that is tested, and the first that is not."""

KEY = "workflow"
"""Key of ``mm_processor_kwargs`` that names a request's workflow; default: the first."""

ALWAYS = "always"
"""Another key: where it is true, a request without an image runs the workflow too."""


def register() -> None:
    """Register the model; vLLM calls this in each of its processes.

    Raises:
        RuntimeError: This release of vLLM was not tested.
    """
    import vllm
    from packaging.version import Version
    from vllm import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY

    first, end = TESTED
    if not Version(first) <= Version(Version(vllm.__version__).base_version) < Version(end):
        raise RuntimeError(
            f"mmgraft-vllm is tested with vLLM from {first} to before {end}, and this is "
            f"{vllm.__version__}; install one of those, or uninstall mmgraft-vllm"
        )
    name = "MMGraftForConditionalGeneration"
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"mmgraft_vllm.model:{name}")
    # Its method ``register`` warns where a mode is known already.
    RENDERER_REGISTRY.renderers["hf"] = ("mmgraft_vllm.renderer", "GraftRenderer")
