"""Trained models for other runtimes: graphs of prefill and of one step with explicit state, as torch.export programs or as ONNX."""
