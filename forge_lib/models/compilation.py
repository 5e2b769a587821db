"""torch.compile that starts quickly: what one run has compiled, the next one loads from torch's cache on disk."""

import threading
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

AUTOCAST = ("torch.amp.autocast_mode._enter_autocast", "torch.amp.autocast_mode._exit_autocast")
AUTOCAST_IN_KEY = (2, 13)  # from this version on, the cache tells graphs of different autocast types apart


def prepare_compiler(device: str) -> threading.Thread:
    """Starts what the compiler does once in each process, while the model and the data are loaded; join the thread."""
    thread = threading.Thread(target=_prepare, args=(device,), name="compiler", daemon=True)
    thread.start()
    return thread


def _prepare(device: str) -> None:
    """Imports the compiler. For a CPU, lets it try out the vector instructions; notes on disk if all of them work."""
    import torch._inductor.compile_fx  # noqa: F401
    from torch._inductor import cpu_vec_isa

    if device != "cpu" or (passed := _passed_file()).exists():
        return
    with suppress(Exception):  # torch reports it at the first step, with its reason
        flags = cpu_vec_isa.x86_isa_checker()
        known = [isa for isa in cpu_vec_isa.supported_vec_isa_list if set(str(isa).split()) <= set(flags)]
        if known and cpu_vec_isa.valid_vec_isa_list() == known:
            passed.touch()


def _passed_file() -> Path:
    """Returns the file that says, for all processes of this machine, that the vector instructions work."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir(), f"vector-instructions-passed-{torch.__version__}")


def compile_model(model: nn.Module) -> None:
    """Compiles each layer of a model in place: the names and types of its parts do not change.

    Torch compiles the first layer, and uses the result for all layers that are alike: a start takes a fraction of the
    time, and a step on a CPU is as fast as with one graph for the whole model. The loss stays outside: measured on
    CPUs, its slices are slower compiled.

    By default torch's cache on disk keeps no graph that enters autocast or has an autograd function of another
    library. Both are safe: the key contains their arguments and their code. And in each process torch tries out the
    CPU's vector instructions, which takes longer than to load the graphs.
    """
    from torch._functorch import config as autograd_config
    from torch._inductor import config as inductor_config

    version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    if version >= AUTOCAST_IN_KEY:
        autograd_config.autograd_cache_allow_custom_autograd_functions = True
        inductor_config.unsafe_marked_cacheable_functions |= dict.fromkeys(AUTOCAST, torch.__version__)
    if _passed_file().exists():
        inductor_config.cpp.vec_isa_ok = True  # in this thread: the setting of another one has no effect
    for part in _layers(model) or [model]:
        part.compile()


def _layers(module: nn.Module) -> list[nn.Module]:
    """Returns the parts of the outermost lists of modules."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in _layers(child)]
