"""The hooks that this distribution implements, found through the entry point `rlinf-plugins-openpi`."""

from rlinf_core import AugmentationConfig, Command, PolicyConfig, hookimpl
from rlinf_plugins_openpi.config import Pi0Config, Pi05Config
from rlinf_plugins_openpi.inputs.augmentation import OpenpiAugmentationConfig


@hookimpl
def rlinf_register_policies() -> list[type[PolicyConfig]]:
    """Offer π0 and π0.5."""
    return [Pi0Config, Pi05Config]


@hookimpl
def rlinf_register_augmentations() -> list[type[AugmentationConfig]]:
    """Offer openpi's own image augmentation."""
    return [OpenpiAugmentationConfig]


@hookimpl
def rlinf_register_commands() -> list[Command]:
    """Offer `rlinf convert`, `rlinf import-rlinf` and `rlinf new-plugin`."""
    convert = "convert π0 or π0.5 weights (JAX, lerobot, RLinf) to openpi's PyTorch layout"
    import_rlinf = "turn a recipe of RLinf for π0 or π0.5 into a config"
    new_plugin = "write a package with a format for a dataset of your own"
    return [
        Command("convert", convert, "rlinf_plugins_openpi.weights.convert"),
        Command("import-rlinf", import_rlinf, "rlinf_plugins_openpi.recipes.import_rlinf"),
        Command("new-plugin", new_plugin, "rlinf_plugins_openpi.scaffold.new_plugin"),
    ]
