"""Register plugins with pluggy so that every error names its plugin, and reject what would never be called.

pluggy stores, orders and calls the implementations. Each is wrapped once, when its plugin is registered.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pluggy

from rlinf_core.contract import hookspecs
from rlinf_core.errors import PluginError, UserError, did_you_mean
from rlinf_core.plugins.owners import CORE, Owner, exited
from rlinf_core.plugins.process_state import kept


class OwnedPlugin:
    """A plugin's hook implementations for pluggy; the errors that they raise name hook and owner.

    Args:
        owner: The source of the plugin.
        plugin: A module, or an object with functions, that `check_plugin` accepts.
        manager: Reads the `@hookimpl` marks.
    """

    def __init__(self, owner: Owner, plugin: object, manager: pluggy.PluginManager) -> None:
        self.owner, self.plugin = owner, plugin
        for name in dir(plugin):
            options = manager.parse_hookimpl_opts(plugin, name)
            hook = options and (options.get("specname") or name)
            if hook in specified_hooks():  # Else it is optional, for another release of core.
                setattr(self, name, naming(hook, owner, getattr(plugin, name)))


def owned(plugin: object) -> OwnedPlugin:
    """What pluggy has registered, as what it is."""
    assert isinstance(plugin, OwnedPlugin)
    return plugin


def naming(what: str, owner: Owner, function: Callable[..., Any]) -> Callable[..., Any]:
    """A plugin's function whose errors name it and its owner; keeps its signature and mark for pluggy.

    A `UserError` becomes a `PluginError`, except one of core's: those are about the user's input. One of a registration
    hook stays as it is, too: it is recorded as a `Failure`, which names both. A `SystemExit` becomes a `PluginError`
    too: it would end the run with whatever code it has, even 0. Settings of the process are put back.

    Args:
        what: The hook, or what else the function is.
        owner: Where it comes from.
        function: The function.
    """
    keep = owner.distribution == CORE or what.startswith("rlinf_register_")

    @functools.wraps(function)
    def named(*arguments: Any, **options: Any) -> Any:
        try:
            with kept(lambda: f"{what} of {owner}"):
                return function(*arguments, **options)
        except UserError as error:
            if keep:
                raise
            raise PluginError(f"{error} [{what} of {owner}]") from error
        except SystemExit as error:
            raise PluginError(exited(error) + ("" if keep else f" [{what} of {owner}]")) from error
        except Exception as error:
            error.add_note(f"in {what} of {owner}")
            raise

    return named


def create_manager() -> pluggy.PluginManager:
    """Pluggy's manager with every hook of `hookspecs`, which refuses calls with wrong arguments."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    known = {name: tuple(inspect.signature(spec).parameters) for name, spec in specified_hooks().items()}

    def before(hook: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
        # pluggy ignores unknown arguments.
        if unknown := sorted(arguments.keys() - set(known[hook])):
            raise TypeError(f"{hook} has no argument {unknown[0]!r}; it has: {', '.join(known[hook])}")
        for implementation in reversed(implementations):
            if missing := [name for name in implementation.argnames if name not in arguments]:
                raise TypeError(
                    f"{hook} was called without {missing[0]!r}, which {owned(implementation.plugin).owner} needs"
                )

    manager.add_hookcall_monitoring(before, lambda *_: None)
    return manager


def specified_hooks() -> dict[str, Callable[..., Any]]:
    """The functions of `hookspecs` that specify hooks, in call order."""
    return {name: function for name, function in vars(hookspecs).items() if name.startswith("rlinf_")}


def check_plugin(manager: pluggy.PluginManager, plugin: object) -> None:
    """Reject hooks that would be ignored or misunderstood: unknown names, missing marks, signatures nobody can call.

    Args:
        manager: Reads the `@hookimpl` marks.
        plugin: A module, or an object with functions.

    Raises:
        PluginError: If the plugin has such a hook, or no hook at all; the message names it and similar names.
    """
    implemented = 0
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            item = inspect.getattr_static(plugin, name)
            own = getattr(item, "__module__", None) == getattr(plugin, "__name__", None)
            if name.startswith("rlinf_") and inspect.isfunction(item) and own:
                raise PluginError(f"{name} is named like a hook but is not marked with @hookimpl")
            continue
        implemented += 1
        hook = options.get("specname") or name
        if hook in specified_hooks():
            if options.get("wrapper") or options.get("hookwrapper"):
                raise PluginError(f"{name} is a hook wrapper, which rlinf does not support: use a plain implementation")
            _check_signature(hook, getattr(plugin, name))
        elif not options.get("optionalhook"):
            raise PluginError(f"there is no hook {hook!r}{did_you_mean(hook, specified_hooks())}")
    if not implemented:
        raise PluginError(
            f"{getattr(plugin, '__name__', repr(plugin))} implements no hook: mark functions with @hookimpl"
        )


def _check_signature(hook: str, function: Callable[..., Any]) -> None:
    """Check that a hook can be called with the arguments it names; hooks are neither iterated nor awaited."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise PluginError(f"{hook} is async: hooks are called, not awaited")
    if inspect.isgeneratorfunction(function) and not hook.startswith("rlinf_register_"):
        raise PluginError(f"{hook} contains yield: its body would never run")
    allowed = list(inspect.signature(specified_hooks()[hook]).parameters)
    known = f"its arguments are {', '.join(allowed)}" if allowed else "it takes none"
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise PluginError(f"{hook} takes {parameter}, which is never passed: name the arguments it needs ({known})")
        if name not in allowed and parameter.default is parameter.empty:
            raise PluginError(f"{hook} has no argument {name!r} ({known}){did_you_mean(name, allowed)}")
        if name in allowed and parameter.default is not parameter.empty:
            raise PluginError(f"{hook} gives its argument {name!r} a default, which would always be used: remove it")
