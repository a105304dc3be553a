"""Call hooks so that every error names its plugin, and reject implementations that would never be called.

pluggy stores the implementations, their order and their arguments. They are called here, one at a time, because an
error must name the plugin that raised it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pluggy

from rlinf_core.contract import hookspecs
from rlinf_core.errors import PluginError, UserError, did_you_mean
from rlinf_core.plugins.owners import Owner

CORE = "rlinf-core"
"""Core's own distribution. Its errors are about the user's input and name no plugin."""


class Hooks:
    """Every hook as a method: `hooks.rlinf_configure(run=run)`.

    A call returns the implementations' results in call order, without None; for a hook with a single result
    (`firstresult`) the first that is not None, or None.

    Args:
        relay: pluggy's callers, which store implementations and their order.
        owners: Plugin name -> its owner.
    """

    def __init__(self, relay: pluggy.HookRelay, owners: Mapping[str, Owner]) -> None:
        self._relay, self._owners = relay, owners

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in specified_hooks():
            raise AttributeError(f"there is no hook {name!r}{did_you_mean(name, specified_hooks())}")
        caller: pluggy.HookCaller = getattr(self._relay, name)

        def call(**arguments: Any) -> Any:
            return self._call(caller, arguments)

        return call

    def owners_of(self, name: str) -> list[Owner]:
        """The owners of a hook's implementations, in call order."""
        caller: pluggy.HookCaller = getattr(self._relay, name)
        return [self._owners[implementation.plugin_name] for implementation in reversed(caller.get_hookimpls())]

    def _call(self, caller: pluggy.HookCaller, arguments: Mapping[str, Any]) -> Any:
        spec = caller.spec
        assert spec is not None  # `__getattr__` lets only specified hooks through.
        if unknown := sorted(arguments.keys() - set(spec.argnames)):
            raise TypeError(f"{caller.name} has no argument {unknown[0]!r}; it has: {', '.join(spec.argnames)}")
        results = []
        # pluggy lists implementations in reverse call order.
        for implementation in reversed(caller.get_hookimpls()):
            owner = self._owners[implementation.plugin_name]
            missing = [name for name in implementation.argnames if name not in arguments]
            if missing:
                raise TypeError(f"{caller.name} was called without {missing[0]!r}, which {owner} needs")
            result = _call_one(
                caller.name, owner, implementation.function, [arguments[n] for n in implementation.argnames]
            )
            if result is not None:
                if spec.opts.get("firstresult"):
                    return result
                results.append(result)
        return None if spec.opts.get("firstresult") else results


def _call_one(hook: str, owner: Owner, function: Callable[..., Any], arguments: list[Any]) -> Any:
    try:
        return function(*arguments)
    except UserError as error:
        if owner.distribution == CORE:
            raise
        raise PluginError(f"{error} [{hook} of {owner}]") from error
    except Exception as error:
        error.add_note(f"in {hook} of {owner}")
        raise


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
