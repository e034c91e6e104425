"""`gam serve`: a trained model over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gam_lm.errors import InputError, MissingExtraError


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer the OpenAI clients: /v1/models, /v1/completions, /v1/chat/completions, streaming too. No keys: keep it on loopback or behind a proxy."""

    run_directory: Path
    """Run directory of the model; its folder's name is the model's."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    most_tokens: int = 4096
    """Largest max_tokens that a request may ask for."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Serve until interrupted."""
        import socket

        try:
            import starlette as _starlette
            import uvicorn
        except ImportError as error:
            raise MissingExtraError("starlette and uvicorn", "serve", "gam serve") from error
        del _starlette
        from gam_lm.checkpoint import load_model, load_tokenizer_of
        from gam_lm.serve.app import make_app
        from gam_lm.serve.engine import Engine, read_chat_template
        from gam_lm.training.precision import choose_device

        if not 0 <= self.port < 2**16:
            raise InputError(f"port is {self.port}: use a number from 0 to 65535")
        if self.most_tokens < 1:
            raise InputError(f"most_tokens is {self.most_tokens}: use a whole number of at least 1")
        model = load_model(self.run_directory, device=choose_device(self.device))
        template, special_tokens = read_chat_template(self.run_directory)
        engine = Engine(model=model, tokenizer=load_tokenizer_of(self.run_directory), template=template, special_tokens=special_tokens)
        name = self.run_directory.resolve().name
        app = make_app(engine, name=name, most_tokens=self.most_tokens)
        try:
            listener = socket.create_server((self.host, self.port))
        except OSError as error:
            raise InputError(f"cannot listen on {self.host}:{self.port} ({error.strerror or error}): choose another --host or --port") from error
        print(f"model {name}: http://{self.host}:{listener.getsockname()[1]}/v1", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run(sockets=[listener])
