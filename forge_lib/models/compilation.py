"""torch.compile that starts quickly: what one run has compiled, the next one loads from torch's cache on disk."""

import threading
from contextlib import suppress

import torch
from torch import nn

AUTOCAST = ("torch.amp.autocast_mode._enter_autocast", "torch.amp.autocast_mode._exit_autocast")
AUTOCAST_IN_KEY = (2, 13)  # from this version on, the cache tells graphs of different autocast types apart


def prepare_compiler() -> threading.Thread:
    """Starts what the compiler does once in each process, while the model and the data are loaded; join the thread.

    It imports the compiler, and tries out the vector instructions of this CPU: two to three seconds.
    """
    thread = threading.Thread(target=_prepare, name="compiler", daemon=True)
    thread.start()
    return thread


def _prepare() -> None:
    from torch._inductor import cpu_vec_isa

    with suppress(Exception):  # torch reports it at the first step, with its reason
        cpu_vec_isa.pick_vec_isa()
    import torch._inductor.compile_fx  # noqa: F401


def compile_model(model: nn.Module) -> None:
    """Compiles a model in place: the names and types of its parts do not change.

    Torch caches compiled graphs on disk, but by default none that enters autocast or has an autograd function of our
    own. Both are safe: the graph, which is the key, contains their arguments and their code.
    """
    from torch._functorch import config as autograd_config
    from torch._inductor import config as inductor_config

    version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    if version >= AUTOCAST_IN_KEY:
        autograd_config.autograd_cache_allow_custom_autograd_functions = True
        inductor_config.unsafe_marked_cacheable_functions |= dict.fromkeys(AUTOCAST, torch.__version__)
    model.compile()
