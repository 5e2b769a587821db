"""The flags that scripts/train_elastic.py has in addition to those of scripts/train.py."""

import socket
from dataclasses import dataclass
from typing import Literal

from forge_lib.config import TrainConfig, flag

PEER_PORT = 29511


@dataclass(kw_only=True)
class PeersConfig:
    """The other peers, and how the changes of the weights are exchanged with them."""

    _argument_group_name = "peers"

    lighthouse: str = flag(
        "", "address of the lighthouse: http://HOST:PORT; several, with commas: the first one that answers", "URL"
    )
    serve_lighthouse: bool = flag(
        False, "also start the lighthouse on this machine, unless another address of --lighthouse has one"
    )
    peer_name: str = flag("", "name of this peer; empty: the host name", "NAME")
    peer_address: str = flag(
        "", "IP address at which the others reach this peer; empty: on the route to the lighthouse", "ADDRESS"
    )
    peer_port: int = flag(
        PEER_PORT, "this peer's first port; the next one is used too", "PORT", at_least=1, below=65535
    )
    min_peers: int = flag(1, "begin the first round when this many peers are there", "COUNT", at_least=1)
    sync_every: int = flag(
        0,
        "steps of a peer between two exchanges, more for a peer that is very slow or catches up; 0: 10 to 100, from "
        "the time of an exchange; 1: average each gradient",
        "STEPS",
        at_least=0,
    )
    outer_compression: Literal["auto", "no", "fp16", "int8", "int4", "sparse"] = flag(
        "auto",
        "how changes are sent: no (fp32), fp16, int8, int4 or sparse; auto: int4, but no for --sync-every 1",
        "TYPE",
    )
    outer_learning_rate: float = flag(
        0.0, "learning rate of the outer optimizer; 0: 0.7, or 1 for one peer and for sparse", "RATE", at_least=0
    )
    outer_momentum: float = flag(
        -1.0,
        "Nesterov momentum of the outer optimizer; -1: 0.6, or 0 for one peer and for sparse",
        "MOMENTUM",
        at_least=-1,
        below=1,
    )
    exchange_timeout_seconds: float = flag(
        0.0,
        "time limit of each phase of an exchange; 0: from the slowest of the last exchanges",
        "SECONDS",
        at_least=0,
    )
    late_seconds: float = flag(
        0.0, "a peer this much later than planned is not waited for; 0: a tenth of the round", "SECONDS", at_least=0
    )

    def find_peer_mistakes(self) -> list[str]:
        """Returns a line for each mistake in these flags that is more than the range of one."""
        mistakes = []
        if not self.lighthouse:
            mistakes.append("--lighthouse is missing: the address of the lighthouse, as in http://alder:29510")
        return mistakes

    @property
    def lighthouses(self) -> list[str]:
        """The addresses in --lighthouse."""
        return [url.strip() for url in self.lighthouse.split(",")]

    @property
    def compression(self) -> str:
        """How changes are sent; with `--sync-every 1`, gradients."""
        if self.outer_compression == "auto":
            return "no" if self.sync_every == 1 else "int4"
        return self.outer_compression

    @property
    def name(self) -> str:
        """The name of this peer."""
        return self.peer_name or socket.gethostname()


@dataclass(kw_only=True)
class ElasticConfig(PeersConfig, TrainConfig):
    """Every flag of scripts/train_elastic.py."""

    def find_mistakes(self) -> list[str]:
        """Returns a line for each pair of values that do not go together."""
        mistakes = super().find_mistakes() + self.find_peer_mistakes()
        if self.mixed_precision == "fp16":
            mistakes.append("train_elastic.py does not train with --mixed-precision fp16; use bf16 or no")
        return mistakes
