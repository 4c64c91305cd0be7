"""The names that sslctl takes from its dependencies though they promise nothing of them: all of them, each as it is used."""

import ast
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import sslctl
from sslctl.config.schema import CONFIGS

# name -> where it is used, and what to do when it has moved or behaves otherwise
PRIVATE = {
    "hydra._internal": "config/command_line.py reads one experiment's YAML with it: look for Hydra's own loader, or read the file"
    " with OmegaConf.load. config/hydra_files.py puts a loader of its own in its place, which checks all that Hydra composes"
    " and parses files once: find what Hydra calls now, without it files of --config-dir are code",
    "_get_node": "config/diagnose.py lists keys without resolving them: OmegaConf.to_container(config, resolve=False) does too",
    "_is_none": "as _get_node",
    "_is_missing": "as _get_node",
    "_shutdown_workers": "data/workers.py ends worker processes with it, which ignore SIGTERM: see what torch's iterator calls in"
    " __del__, or join the processes in iterator._workers",
    "_BatchNorm": "models/batchnorm.py takes every BatchNorm by it: name BatchNorm1d, 2d, 3d and SyncBatchNorm instead",
    "_pos_embed": "models/vit.py adds positions and prefix tokens with it: copy what timm's VisionTransformer.forward_features"
    " does between patch_embed and norm_pre",
    **dict.fromkeys(
        ("_foreach_add", "_foreach_copy_", "_foreach_lerp_", "_foreach_mul_", "_foreach_norm"),
        "one kernel for many tensors, as torch.optim's own: write a loop over the tensors where it is gone",
    ),
    "_fused_sgd_": "training/optim.py's LARS takes its step with it, as torch.optim.SGD(fused=True): write its docstring with"
    " _foreach_mul_ and _foreach_add_ where it is gone",
}
PUBLIC = {"_exit", "_target_"}  # os._exit and a key of Hydra, documented under these names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_in(tree: ast.AST):
    """Private names that a module takes from others: imports, and attributes of anything but self, cls and super()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
                yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            if module.split(".")[0] == "sslctl":
                continue
            for path in [module, *(alias.name for alias in node.names)]:
                parts = path.split(".")
                private = next((i for i, part in enumerate(parts) if is_private(part)), None)
                if private is not None:
                    yield ".".join(parts[: private + 1])


def test_no_other_private_name_is_used_and_none_is_listed_in_vain():
    root = Path(sslctl.__file__).parent
    used = {name for path in root.rglob("*.py") for name in names_in(ast.parse(path.read_text()))}
    assert used - PUBLIC == set(PRIVATE), "use a public name, or list it here with what to do when it moves"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from a._b.c import d", {"a._b"}),
        ("from a.b import _c", {"_c"}),
        ("import a._b", {"a._b"}),
        ("x = a.b._c(1)", {"_c"}),
        ("self._a = cls._b = super()._c", set()),
        ("from sslctl.a import _b; x.__class__", set()),
    ],
)
def test_the_search_sees_private_names(code, names):
    assert set(names_in(ast.parse(code))) == names


def test_hydras_loader_reads_one_file():
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    repository = ConfigLoaderImpl(create_config_search_path(str(CONFIGS))).repository
    name = next((CONFIGS / "method").glob("*.yaml")).stem
    loaded = repository.load_config(f"method/{name}")
    assert "_target_" in loaded.config.method, PRIVATE["hydra._internal"]
    assert repository.load_config("method/none_of_this_name") is None, PRIVATE["hydra._internal"]


def test_omegaconf_gives_nodes_without_resolving_them():
    config = OmegaConf.create({"nowhere": "${gone}", "none": None, "inner": {"a": 1}, "missing": "???"})
    assert config._get_node("nowhere")._value() == "${gone}", PRIVATE["_get_node"]
    assert config._get_node("none")._is_none(), PRIVATE["_is_none"]
    assert config._get_node("missing")._is_missing(), PRIVATE["_is_missing"]
    assert not config._get_node("inner")._is_none()
    assert not config._get_node("inner")._is_missing()


def test_torchs_loader_ends_its_workers():
    iterator = iter(torch.utils.data.DataLoader(range(4), num_workers=1))
    workers = list(iterator._workers)
    iterator._shutdown_workers()
    assert not any(worker.is_alive() for worker in workers), PRIVATE["_shutdown_workers"]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_torchs_batchnorms_have_one_parent(kind):
    from torch.nn.modules.batchnorm import _BatchNorm

    assert issubclass(kind, _BatchNorm), PRIVATE["_BatchNorm"]
    assert not issubclass(nn.GroupNorm, _BatchNorm)


def test_timms_transformer_adds_positions_and_prefix_tokens():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    patches = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    tokens = model._pos_embed(patches)
    assert tokens.shape == (2, 17, 8), PRIVATE["_pos_embed"]
    assert torch.equal(tokens[:, 1:], patches + model.pos_embed[:, 1:]), PRIVATE["_pos_embed"]


def test_torch_works_on_many_tensors_at_once():
    first, second = [torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 2.0])]
    advice = PRIVATE["_foreach_norm"]
    assert torch._foreach_norm(first)[0] == 5, advice
    assert torch._foreach_add(first, second, alpha=2)[0].tolist() == [5, 8], advice
    torch._foreach_mul_(first, [torch.tensor(2.0)])
    assert first[0].tolist() == [6, 8], advice
    torch._foreach_add_(first, second, alpha=-1)
    assert first[0].tolist() == [5, 6], advice
    torch._foreach_lerp_(first, second, 0.5)
    assert first[0].tolist() == [3, 4], advice
    torch._foreach_copy_(first, second)
    assert torch.equal(first[0], second[0]), advice
