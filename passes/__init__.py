"""The built-in passes; importing this package registers all of them."""

import importlib
import pkgutil

if __name__ == "passes":
    raise ImportError("the folder 'passes' installs as 'graphopt.passes': import that instead")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
