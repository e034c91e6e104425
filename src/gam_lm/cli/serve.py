"""`gam serve`: a trained model over HTTP."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from gam_lm.cli.numbers import Count, Natural
from gam_lm.errors import InputError, MissingExtraError

logger = logging.getLogger("gam_lm")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer the OpenAI clients: /v1/models, /v1/completions, /v1/chat/completions; a chat page at /, Prometheus figures at /metrics."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Model": ("run_directory", "device"),
        "Address": ("host", "port", "api_key", "allow_host", "cors"),
        "Speed": ("batch", "cache_mb", "speculate"),
    }

    run_directory: Path
    """Run directory of the model; its folder's name is the model's."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets others in, who then should need a key."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Key that requests must bring; by default that of the environment variable GAM_API_KEY, which other users of the machine cannot see."""
    allow_host: tuple[str, ...] = ()
    """Names of this server besides its addresses and localhost; * allows any."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may use the server from a browser, as https://example.org; * allows all."""
    cache_mb: Natural = 256
    """Memory for the states of earlier texts, so that a chat's next turn pays for its new tokens alone; 0 keeps none."""
    batch: Count = 16
    """Answers whose next tokens are computed in one call of the model; with 1 others do not change even the rounding of an answer."""
    speculate: Natural = 0
    """Longest draft of speculative decoding by prompt lookup; it pays for texts that repeat themselves. 0 draws without."""
    most_tokens: int = 4096
    """Most tokens that a request may ask for, all its answers together."""
    most_prompt_tokens: int = 131_072
    """Most tokens in the prompts of a request."""
    most_body_bytes: int = 4 * 2**20
    """Largest body of a request."""
    most_stops: int = 4
    """Most stop texts of a request."""
    most_stop_characters: int = 256
    """Longest stop text."""
    concurrent: int = 32
    """Requests that are answered at a time."""
    waiting: int = 128
    """Requests that may wait for their turn; those beyond get status 429."""
    header_seconds: float = 10.0
    """Time for the headers of a request."""
    body_seconds: float = 30.0
    """Time for the body of a request."""
    write_seconds: float = 30.0
    """Time in which a client must take what it is sent."""
    prefill_tokens: Count = 64
    """Tokens of a prompt that are read at a time: more read faster, and other answers wait longer for their tokens (on a GPU 1024)."""
    start: Path | None = None
    """Initial memory that `gam tune-state` wrote for this run."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Serve until interrupted."""
        try:
            import prometheus_client as _prometheus_client
            import starlette as _starlette
            import uvicorn as _uvicorn
        except ImportError as error:
            raise MissingExtraError("starlette, uvicorn and prometheus-client", "serve", "gam serve") from error
        del _starlette, _uvicorn, _prometheus_client
        import torch

        from gam_lm.checkpoint import load_tokenizer_of
        from gam_lm.cli.starting import load_started
        from gam_lm.serve.app import make_app
        from gam_lm.serve.chat import Chat, read_chat_template
        from gam_lm.serve.connections import listen, make_server
        from gam_lm.serve.engine import Engine
        from gam_lm.serve.limits import Limits

        limits = Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})
        key = self.api_key if self.api_key is not None else os.environ.get("GAM_API_KEY")
        if key is not None and not key.strip():
            raise InputError("the API key is empty: give one, or leave out --api-key and GAM_API_KEY")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, which then gets no helpers: see gam_lm.serve.model_thread
        model = load_started(self.run_directory, self.start, self.device)
        tokenizer = load_tokenizer_of(self.run_directory)
        engine = Engine(
            model=model, tokenizer=tokenizer, piece=self.prefill_tokens, cache_bytes=self.cache_mb * 2**20, batch=self.batch, draft=self.speculate, threads=threads
        )
        chat = Chat(tokenizer, *read_chat_template(self.run_directory))
        name = self.run_directory.resolve().name
        app = make_app(engine, chat, name=name, limits=limits, api_key=None if key is None else key.strip(), hosts=(self.host, *self.allow_host), cors=self.cors)
        try:
            if not self.host or "\0" in self.host:  # an empty one would be every address of the machine
                raise ValueError("no address")
            listener = listen(self.host, self.port)
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot listen on {self.host}:{self.port} ({reason}): choose another --host or --port") from error
        host = f"[{self.host}]" if ":" in self.host else self.host
        print(f"model {name}: http://{host}:{listener.getsockname()[1]}/v1", flush=True)
        if key is None and not _is_loopback(listener.getsockname()[0]):
            logger.warning("host is %s and there is no API key: whoever reaches this address may use the model, set GAM_API_KEY to ask for one", self.host)
        sys.setswitchinterval(0.0005)  # what waits for the interpreter, a token or an answer to /health, would wait ten times as long
        make_server(app, limits).run(sockets=[listener])


def _is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address that is listened on."""
    return ip_address(address.partition("%")[0]).is_loopback
