"""Models and precisions, as data: each is a row of the table in nsgd/README.md, and a test for each source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

GRADIENTS, AT_ONCE, ONE_BY_ONE, PRODUCTS = "training gradients", "samples at once", "samples one by one", "products"
SOURCES = (GRADIENTS, AT_ONCE, ONE_BY_ONE, PRODUCTS)

Context = Callable[[str], AbstractContextManager[Any]]  # of a kind of device
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@dataclass(frozen=True)
class Way:
    """What is refused: by these words, and the way out in the table."""

    words: str
    out: str


CUDNN = {PRODUCTS: Way("cuDNN's recurrent networks have no double backward; run", "`cudnn.flags(enabled=False)`")}
NO_VMAP = {AT_ONCE: Way("taken at once.*leave module out", "leave `module` out")}
FUSED = {PRODUCTS: Way("fused attention has no double backward; run", "take `SDPBackend.MATH`")}
COMPILED = {PRODUCTS: Way("under torch.compile has no double backward; pass", "pass a closure")}
SPARSE = Way(r"with sparse gradients \(1\) train under the base optimizer alone", "all but the embedding")
DENSE = Way("expected dense gradients, got a sparse one; build", "`sparse=False`")
REENTRANT = Way("cannot be differentiated by torch.autograd.grad; pass use_reentrant=False", "`use_reentrant=False`")
COMPLEX = Way("got complex parameters; hold their real and imaginary parts", "hold two real ones")
HOOKS = Way("when there are global hooks", "")  # torch's own, of what does no harm


def _cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out if out.dtype == torch.float64 else out.float(), y)


@dataclass(frozen=True)
class Case:
    """A model, its batches, and what each source makes of it."""

    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[], tuple[Tensor, ...]]
    loss: Callable[..., Tensor] = _cross_entropy
    refused: Mapping[str, Way] = field(default_factory=dict)  # by source
    refused_on_gpu: Mapping[str, Way] = field(default_factory=dict)  # there beside the others
    said: Mapping[str, Way] = field(default_factory=dict)  # by source, where it works but for what is said
    without: frozenset[str] = frozenset()  # parameters in which no direction has a share
    context: Context = nullcontext  # of the forward pass
    group_size: int = 1
    batch_dim: tuple[int, int] = (0, 0)
    scaled: bool = False  # by a GradScaler
    precision: torch.dtype = torch.float32  # of the forward pass
    exact: bool = True  # whether a second forward pass of the same batch gives the same loss
    needs: str = ""  # a package


def _rows(n: int = 12, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(n, *(shape or (6,))).to(dtype), torch.randint(3, (n,)))


def _tokens(n: int = 10, length: int = 7, words: int = 9) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(words, (n, length)), torch.randint(3, (n,)))


def _mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Tanh(), nn.Linear(8, 3))


def _conv(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), *between, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))


class Attention(nn.Module):
    """Two heads of scaled-dot-product attention."""

    def __init__(self, context: Context = nullcontext) -> None:
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(8, 3)
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        with self.context():
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(h.transpose(1, 2).flatten(2)[:, -1])


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], *, batch_first: bool = True) -> None:
        super().__init__()
        self.net, self.head = kind(6, 5, batch_first=batch_first), nn.Linear(5, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.net(x)
        return self.head(out[:, -1] if self.batch_first else out[-1])


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x).mean(1)))


class Tied(nn.Module):
    """One matrix reads tokens and scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x).sum(1)))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        def inner(h: Tensor) -> Tensor:
            return torch.tanh(self.middle(h))

        return self.last(checkpoint(inner, self.first(x), use_reentrant=self.reentrant))


class Unused(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.spare = nn.Parameter(torch.ones(2, 2))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 8, dtype=torch.complex64)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(torch.complex64) @ self.weight).abs())


class LoRA(nn.Module):
    """A frozen linear map with a trained one of rank 2 beside it (Hu et al. 2022)."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down, self.up = nn.Linear(frozen.in_features, 2, bias=False), nn.Linear(2, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class OfDict(nn.Module):
    """Takes a dict that holds a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp()

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.net(sum(batch["parts"]))


def _frozen() -> nn.Module:
    net = _mlp()
    for p in (net[0].bias, net[2].weight):
        p.requires_grad_(False)
    return net


def _lazy() -> nn.Module:
    net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    net(torch.zeros(1, 6))
    return net


def _in_evaluation(*between: nn.Module) -> nn.Module:
    return _mlp(*between).eval()


def _gpt2(attention: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=1,
            n_head=2,
            n_embd=8,
            vocab_size=9,
            n_positions=8,
            attn_implementation=attention,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _llama(attention: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_size=8,
            intermediate_size=16,
            vocab_size=9,
            max_position_embeddings=8,
            attn_implementation=attention,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _vit(attention: str) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_size=8,
            intermediate_size=16,
            image_size=6,
            patch_size=3,
            num_channels=2,
            num_labels=3,
            attn_implementation=attention,
        )
    )


def _language(model: nn.Module, ids: Tensor, _: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _classified(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).logits, y)


def _autocast(dtype: torch.dtype) -> Context:
    return lambda device: torch.autocast(device, dtype)


def _compiled(backend: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch._dynamo.reset()  # after some modules of one kind it would go on without compiling
        return torch.compile(_mlp(), backend=backend)  # type: ignore[return-value]

    return make


def _math() -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH)


CASES = (
    Case("bfloat16 mixed (autocast)", _mlp, _rows(), context=_autocast(torch.bfloat16), precision=torch.bfloat16),
    Case(
        "float16 mixed, GradScaler",
        _mlp,
        _rows(),
        context=_autocast(torch.float16),
        precision=torch.float16,
        scaled=True,
    ),
    Case("true bfloat16", lambda: _mlp().bfloat16(), _rows(dtype=torch.bfloat16), precision=torch.bfloat16),
    Case("float64", lambda: _mlp().double(), _rows(dtype=torch.float64), precision=torch.float64),
    Case("torch.compile, eager", _compiled("eager"), _rows(), said=dict.fromkeys((AT_ONCE, ONE_BY_ONE), HOOKS)),
    Case(
        "torch.compile",
        _compiled("aot_eager"),
        _rows(),
        refused=COMPILED,
        said=dict.fromkeys((AT_ONCE, ONE_BY_ONE), HOOKS),
    ),
    Case("fused attention", Attention, _tokens(), refused=FUSED),
    Case("attention, SDPBackend.MATH", lambda: Attention(_math), _tokens()),
    Case("RNN", lambda: Recurrent(nn.RNN), _rows(12, 4, 6), refused=NO_VMAP, refused_on_gpu=CUDNN),
    Case("GRU", lambda: Recurrent(nn.GRU), _rows(12, 4, 6), refused=NO_VMAP, refused_on_gpu=CUDNN),
    Case("LSTM", lambda: Recurrent(nn.LSTM), _rows(12, 4, 6), refused_on_gpu=NO_VMAP | CUDNN),
    Case(
        "time-major batch, batch_dim=(1, 0)",
        lambda: Recurrent(nn.LSTM, batch_first=False),
        lambda: (torch.randn(4, 12, 6), torch.randint(3, (12,))),
        batch_dim=(1, 0),
        refused_on_gpu=NO_VMAP | CUDNN,
    ),
    Case("embedding", lambda: Words(sparse=False), _tokens()),
    Case(
        "embedding, sparse gradients",
        lambda: Words(sparse=True),
        _tokens(),
        without=frozenset({"embedding.weight"}),
        said={GRADIENTS: SPARSE},
        refused=dict.fromkeys((AT_ONCE, ONE_BY_ONE, PRODUCTS), DENSE),
    ),
    Case("tied weights", Tied, _tokens()),
    Case("checkpointing", lambda: Checkpointed(reentrant=False), _rows(), refused=NO_VMAP),
    Case(
        "checkpointing, reentrant",
        lambda: Checkpointed(reentrant=True),
        _rows(),
        refused={**NO_VMAP, ONE_BY_ONE: REENTRANT, PRODUCTS: REENTRANT},
    ),
    Case(
        "channels-last",
        lambda: _conv().to(memory_format=torch.channels_last),
        lambda: (torch.randn(12, 2, 6, 6).to(memory_format=torch.channels_last), torch.randint(3, (12,))),
    ),
    Case("frozen parameters", _frozen, _rows()),
    Case("unused parameters", Unused, _rows(), without=frozenset({"spare"})),
    Case("lazy modules, after a forward pass", _lazy, _rows()),
    Case("complex parameters", Complex, _rows(), refused=dict.fromkeys(SOURCES, COMPLEX)),
    Case("BatchNorm", lambda: _mlp(nn.BatchNorm1d(8)), _rows(), group_size=4),
    Case("BatchNorm, evaluation", lambda: _in_evaluation(nn.BatchNorm1d(8)), _rows()),
    Case(
        "BatchNorm, no running statistics",
        lambda: _mlp(nn.BatchNorm1d(8, track_running_stats=False)),
        _rows(),
        group_size=4,
    ),
    Case(
        "BatchNorm, momentum=None",
        lambda: _mlp(nn.BatchNorm1d(8, momentum=None)),
        _rows(),
        group_size=4,
        refused=NO_VMAP,
    ),
    Case("dropout", lambda: _mlp(nn.Dropout(0.3)), _rows(), exact=False),
    Case(
        "spectral norm",
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)),
        _rows(),
        exact=False,
        refused=NO_VMAP,
    ),
    Case(
        "weight norm",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)),
        _rows(),
    ),
    Case("LoRA", lambda: nn.Sequential(LoRA(nn.Linear(6, 8)), nn.Tanh(), LoRA(nn.Linear(8, 3))), _rows()),
    Case(
        "lists and dicts as batches",
        OfDict,
        _rows(),
        loss=lambda m, x, y: F.cross_entropy(m({"parts": [x, 0.5 * x]}), y),
    ),
    Case("GPT-2", lambda: _gpt2("sdpa"), _tokens(), loss=_language, refused=FUSED, needs="transformers"),
    Case("GPT-2, eager attention", lambda: _gpt2("eager"), _tokens(), loss=_language, needs="transformers"),
    Case("Llama", lambda: _llama("sdpa"), _tokens(), loss=_language, refused=FUSED, needs="transformers"),
    Case("Llama, eager attention", lambda: _llama("eager"), _tokens(), loss=_language, needs="transformers"),
    Case("ViT", lambda: _vit("sdpa"), _rows(12, 2, 6, 6), loss=_classified, refused=FUSED, needs="transformers"),
    Case("ViT, eager attention", lambda: _vit("eager"), _rows(12, 2, 6, 6), loss=_classified, needs="transformers"),
)
