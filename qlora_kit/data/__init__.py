"""Chapter *data*. Projects made by an older kit import `qlora_kit.data`, which was one module; its names are found here still."""


def __getattr__(name):
    from importlib import import_module

    for page in ("files", "rows"):
        module = import_module(f"{__name__}.{page}")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
