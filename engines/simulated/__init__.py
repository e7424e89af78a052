"""An OpenAI-compatible inference server with real device memory and modelled speed. See docs/engines.md."""
