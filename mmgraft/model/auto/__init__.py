"""Grafts in transformers' Auto classes, from ``import mmgraft`` on, which imports neither."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"


def _tell(module: Any) -> None:
    """Make the config known to ``AutoConfig``, and the model when a config is read."""
    from mmgraft.model.auto.config import BEFORE_READING, GraftedConfig

    BEFORE_READING[:] = [_register_model]
    module.AutoConfig.register("mmgraft", GraftedConfig, exist_ok=True)


def _register_model() -> None:
    from mmgraft.model.auto.loading import register

    register()


class _Watch(MetaPathFinder):
    """Import hook: make the config known once the module of ``AutoConfig`` is imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        spec: Any = PathFinder.find_spec(fullname, path) if fullname == _CONFIGS else None
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), _tell(module))
        return spec


def register() -> None:
    """Tell ``AutoConfig`` now where it is imported, else when it is."""
    if _CONFIGS in sys.modules:
        _tell(sys.modules[_CONFIGS])
    else:
        sys.meta_path.insert(0, _Watch())
