# mypy: allow-untyped-defs
# The code that `adaptq autoload on` puts into a .pth file of the environment. Python runs it at every start, before
# anything else is imported, so it stands alone and does nothing but wait for an import of peft.
import sys


class ImportAdaptQAfterPeft:
    """An import finder that finds nothing itself: once peft has been imported, it imports adaptq_peft."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft" or "adaptq_peft" in sys.modules:  # who imports adaptq_peft needs no help
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    break
        # Some ask for the spec only to know whether peft is installed, so wait until it is really executed.
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._run_after(spec.loader)
        return spec

    def _run_after(self, loader):
        execute = loader.exec_module

        def execute_and_register(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._import_adaptq()

        loader.exec_module = execute_and_register

    def _import_adaptq(self):
        try:
            import adaptq_peft  # noqa: F401
        except Exception as error:  # an `import peft` must never fail because of this
            if getattr(error, "name", None) != "adaptq_peft":  # else: it was uninstalled, and its .pth file was left
                import warnings

                message = f"adaptq_peft could not be loaded: {error!r}; `adaptq autoload off` stops the attempt"
                warnings.warn(message, stacklevel=2)


# Python may read the site-packages of an environment twice, and two such finders would ask each other forever.
if not any(type(finder).__name__ == "ImportAdaptQAfterPeft" for finder in sys.meta_path):
    sys.meta_path.insert(0, ImportAdaptQAfterPeft())
