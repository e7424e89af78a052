"""A plugin for vLLM: parked weights lie in the host's memory broker, sealed once, and come back at link speed.

vLLM finds `register` by its entry point (`integrations/vllm_store`) and uses the backend when it is started with
``--enable-sleep-mode --sleep-mode-backend sublet-store``.
"""

BACKEND_NAME = "sublet-store"


def register() -> None:
    """Make the backend known. vLLM calls it in each of its processes, possibly several times."""
    import contextlib

    from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory

    with contextlib.suppress(ValueError):  # it is registered already
        SleepModeBackendFactory.register_backend(BACKEND_NAME, "engines.vllm_plugin.backend", "StoreBackend")
